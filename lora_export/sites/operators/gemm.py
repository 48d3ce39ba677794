"""Describe Gemm and its fused forms: ``y = alpha * x @ W + beta * c``; merging into W keeps both factors."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from lora_export.sites.operand import LEFT, Operand, Operator


def operands(node: ir.Node) -> list[Operand]:
    """Return both matrix operands and the bias."""
    trans_b = node.attributes.get_int("transB", 0)
    trans_a = node.attributes.get_int("transA", 0)
    # Beta differs from 1 only if an exporter folded a factor in; then the operand is not the module's bias.
    beta = node.attributes.get_float("beta", 1.0)
    refusal = "" if beta == 1.0 else f"Gemm with beta={beta}: the bias operand is not the module's bias"
    return [
        Operand(index=1, kind="linear", transposed=not trans_b),
        Operand(index=0, kind="linear", transposed=bool(trans_a), no_branch=LEFT),
        Operand(index=2, kind="vector", parameter="bias", refusal=refusal),
    ]


def fused_operands(node: ir.Node) -> list[Operand]:
    """Return the operands of GemmFastGelu, which takes ``(in_dim, out_dim)`` and has no attributes."""
    inside = "GemmFastGelu applies its activation inside: nothing can be added before it"
    return [
        Operand(index=1, kind="linear", transposed=True, no_branch=inside),
        Operand(index=2, kind="vector", parameter="bias"),
    ]


GEMM = Operator(operands=operands, weight=1, bias=2, folds_norms=True)
FUSED_GEMM = replace(GEMM, without_activation="Gemm")
GEMM_FAST_GELU = Operator(operands=fused_operands, folds_norms=True)
