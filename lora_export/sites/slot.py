"""The words that operator files and the resolver share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

# Nodes that read a weight's shape alone: no values reach them.
SHAPE_ONLY = frozenset({"Shape", "Size"})
# Nodes that a weight may pass on its way into an operator.
PASSED = frozenset({"Transpose", "Cast", "CastLike", "Identity"})
SlotKind = Literal["linear", "conv", "embedding", "vector", "other"]


@dataclass(frozen=True)
class Slot:
    """An input of a node that takes a weight.

    Attributes:
        index: Position among the node's inputs.
        kind: What module such a weight belongs to.
        transposed: The operand is the transpose of PyTorch's canonical weight.
        parameter: Name of the module's parameter that it is: ``weight`` or ``bias``.
        refusal: Why nothing can be merged into it, if so.
    """

    index: int
    kind: SlotKind
    transposed: bool = False
    parameter: str = "weight"
    refusal: str = ""


@dataclass(frozen=True, eq=False)
class Use:
    """A weight's way into an operator.

    Attributes:
        node: The operator.
        slot: Which input, and how the operator reads it.
        root: The constant at the start of the way.
        chain: Nodes between ``root`` and ``node`` (Transpose, Cast, Identity …), from the root on.
        transposed: ``root`` as stored is the transpose of the canonical weight.
        refusal: Why nothing can be merged here, if so.
    """

    node: ir.Node
    slot: Slot
    root: ir.Value
    chain: tuple[ir.Node, ...]
    transposed: bool
    refusal: str = ""
