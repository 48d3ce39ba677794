"""Describe com.microsoft.Attention: one operand ``(in_dim, q + k + v)`` for three projections, one bias."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.sites.operand import Operand, Operator


def operands(node: ir.Node) -> list[Operand]:
    """Return the fused weight and the fused bias (ONNX Runtime ``ContribOperators.md``)."""
    inside = "com.microsoft.Attention projects and attends in one operator: nothing can be added in between"
    return [
        Operand(index=1, kind="linear", transposed=True, no_branch=inside),
        Operand(index=2, kind="vector", parameter="bias"),
    ]


ATTENTION = Operator(operands=operands)
