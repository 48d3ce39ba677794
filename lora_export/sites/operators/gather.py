"""Describe Gather along axis 0: an embedding ``(num_embeddings, dim)``, or the selection of experts."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.sites.operand import Operand, Operator


def operands(node: ir.Node) -> list[Operand]:
    """Return the table; a Gather along another axis is not an embedding."""
    return [Operand(index=0, kind="embedding")] if node.attributes.get_int("axis", 0) == 0 else []


GATHER = Operator(operands=operands, weight=0)
