"""Compute a sum and its norm in one node of ONNX Runtime.

``SkipSimplifiedLayerNormalization`` is a sum's RMS norm, ``SkipLayerNormalization`` its layer norm, and the
sum is an output of both:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Rules:

1. The terms have one type and one shape of three axes; the norm is over the last axis, computed in float32.
2. The norm's weight and bias are constants, or computed from constants: the sum may wait for them.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_export.base.capture.fuse import is_constant
from lora_export.base.lowering.replacing import CONTRIB, add_node

_SKIPS = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
# Of both norms, where the node does not say it.
_EPSILON = 1e-5


def add_in_norms(model: ir.Model) -> int:
    """Fuse each sum with the norm that reads it; return how many there were."""
    count = 0
    for total in list(model.graph):
        norm = _norm_of(total) if total.op_type == "Add" and not total.domain else None
        if norm is None:
            continue
        made = ir.node(
            _SKIPS[norm.op_type],
            [*total.inputs, *norm.inputs[1:]],
            {"epsilon": norm.attributes.get_float("epsilon", _EPSILON)},
            domain=CONTRIB,
            num_outputs=4,
            name=norm.name,
            metadata_props=norm.metadata_props,
        )
        add_node(made, total, [norm.outputs[0], None, None, total.outputs[0]])
        model.graph.remove([norm, total], safe=True)
        count += 1
    return count


def _norm_of(total: ir.Node) -> ir.Node | None:
    """Return the norm that reads a sum; None if there is none, or the rules don't hold."""
    first, second = total.inputs
    if first is None or second is None or first.dtype != second.dtype:
        return None
    if first.shape is None or len(first.shape) != 3 or first.shape != second.shape:
        return None
    for node in total.outputs[0].consumers():
        if node.domain or node.op_type not in _SKIPS or node.inputs[0] is not total.outputs[0]:
            continue
        is_last = node.attributes.get_int("axis", -1) in (-1, 2)
        in_float = node.attributes.get_int("stash_type", 1) == ir.DataType.FLOAT
        weights = [value for value in node.inputs[1:] if value is not None]
        fits = all(value.dtype == first.dtype and is_constant(value) for value in weights)
        # The mean and the deviation, which ONNX's layer norm has as well, would have other places.
        if is_last and in_float and fits and len(node.outputs) == 1:
            return node
    return None
