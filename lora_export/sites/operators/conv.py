"""Describe Conv and FusedConv: the operand is PyTorch's own ``(out_dim, in_dim/groups, *kernel)``."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from lora_export.sites.slot import Operator, Slot


def slots(node: ir.Node) -> list[Slot]:
    """Return weight and bias."""
    return [Slot(index=1, kind="conv"), Slot(index=2, kind="vector", parameter="bias")]


def refused_slots(node: ir.Node) -> list[Slot]:
    """Return the weight of an operator whose layout is not PyTorch's."""
    layout = f"{node.op_type} stores its weight in another layout"
    return [Slot(index=1, kind="conv", refusal=layout, no_branch=layout)]


CONV = Operator(slots=slots, weight=1, bias=2, is_convolution=True, folds_norms=True)
FUSED_CONV = replace(CONV, without_activation="Conv")
OTHER_LAYOUT = Operator(slots=refused_slots, is_convolution=True, folds_norms=True)
