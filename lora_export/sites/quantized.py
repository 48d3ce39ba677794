"""Operators with quantised weights: recognised, so that a merge is refused by name and not "not found"."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.sites.slot import Slot, SlotKind

# Position of the weight among the inputs, where it is not 1.
_WEIGHT_INDEX = {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3, "GatherBlockQuantized": 0}


def slots(node: ir.Node) -> list[Slot]:
    """Return the quantised weight."""
    kind: SlotKind = (
        "embedding" if node.op_type.startswith("Gather") else "conv" if "Conv" in node.op_type else "linear"
    )
    refusal = f"quantised weight ({node.op_type})"
    return [Slot(_WEIGHT_INDEX.get(node.op_type, 1), kind, transposed=True, refusal=refusal)]
