"""Describe Gather along axis 0: an embedding ``(num_embeddings, dim)``, or the selection of experts."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.sites.slot import Operator, Slot


def slots(node: ir.Node) -> list[Slot]:
    """Return the table; a Gather along another axis is not an embedding."""
    return [Slot(index=0, kind="embedding")] if node.attributes.get_int("axis", 0) == 0 else []


GATHER = Operator(slots=slots, weight=0)
