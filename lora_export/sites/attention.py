"""com.microsoft.Attention: one operand ``(in_dim, q + k + v)`` for three projections, one bias for all."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.sites.slot import Slot


def slots(node: ir.Node) -> list[Slot]:
    """Return the fused weight and the fused bias (ONNX Runtime ``ContribOperators.md``)."""
    return [Slot(1, "linear", transposed=True), Slot(2, "vector", parameter="bias")]
