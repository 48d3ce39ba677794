"""Read what a quantised candidate lost from its metadata, where that names all its codes."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.quantised import pooled, quantised_in
from lora_export.parity.judge.limits import CODES_MOST, CodesLoss

# Operators that `quantize-onnx` writes → input with the codes.
_OURS = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
# MatMulNBits' accuracy_level from which activations are rounded to 8 bits.
_ROUNDED = 4


def codes_loss(graph: GraphFile, quantised: tuple[str, ...]) -> CodesLoss | None:
    """Return the loss of a graph's codes; None if it has none, or some that its metadata don't name.

    Args:
        graph: The candidate.
        quantised: Its operators that quantise.

    Raises:
        GraphError: The metadata's record is damaged.
    """
    records = quantised_in(graph.model.metadata_props)
    if not quantised or not records or set(quantised) - set(_OURS):
        return None
    known = {weight.codes for record in records for weight in record.weights}
    nodes = [node for node in graph.graph.all_nodes() if node.op_type in _OURS]
    if any(_codes(node) not in known for node in nodes) or any(one.to not in CODES_MOST for one in records):
        return None
    levels = [node.attributes.get_int("accuracy_level", 0) for node in nodes]
    coarsest = max((record.to for record in records), key=lambda to: CODES_MOST[to])
    return CodesLoss(pooled(records), coarsest, activations=max(levels, default=0) >= _ROUNDED)


def _codes(node: ir.Node) -> str:
    value = node.inputs[_OURS[node.op_type]]
    return "" if value is None else str(value.name)
