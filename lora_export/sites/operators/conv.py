"""Describe Conv and FusedConv: the operand is PyTorch's own ``(out_dim, in_dim/groups, *kernel)``."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from lora_export.sites.operand import Operand, Operator


def operands(node: ir.Node) -> list[Operand]:
    """Return weight and bias."""
    return [Operand(index=1, kind="conv"), Operand(index=2, kind="vector", parameter="bias")]


def refused_operands(node: ir.Node) -> list[Operand]:
    """Return the weight of an operator whose layout is not PyTorch's."""
    layout = f"{node.op_type} stores its weight in another layout"
    return [Operand(index=1, kind="conv", refusal=layout, no_branch=layout)]


CONV = Operator(operands=operands, weight=1, bias=2, is_convolution=True, folds_norms=True)
FUSED_CONV = replace(CONV, without_activation="Conv")
OTHER_LAYOUT = Operator(operands=refused_operands, is_convolution=True, folds_norms=True)
