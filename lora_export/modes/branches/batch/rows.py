"""Describe the position of the batch's rows in one value of a graph, and what rules need (see `follow`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from lora_export.modes.branches.batch.sizes import Size


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Position of the batch's rows in a value.

    Attributes:
        axis: The axis; None if the value has no rows.
        outermost: True if nothing else is outside of them along that axis.
        alone: True if there is nothing else along that axis.
        moved: The node after which they are not known to be all of the batch's in its order; nothing else is
            known then.
        summed: The node that made one value from all rows, which is the same for all of them.
        doubt: A node that is not followed, whose result was combined with rows that are here.
    """

    axis: int | None
    outermost: bool = True
    alone: bool = True
    moved: str = ""
    summed: str = ""
    doubt: str = ""

    @property
    def in_front(self) -> bool:
        """True if the first axis is the batch, or the batch and something inside of it."""
        return self.axis == 0 and self.outermost


SAME = Rows(axis=None)


def moved_by(node: ir.Node) -> Rows:
    """Return the position of rows that a node takes apart, or doesn't leave in their order."""
    return Rows(axis=None, moved=name_of(node))


def summed_by(node: ir.Node) -> Rows:
    """Return the position of rows from which a node makes one value."""
    return Rows(axis=None, summed=name_of(node))


def name_of(node: ir.Node) -> str:
    """Return a node's operator and name, for messages."""
    return f"{node.op_type} {node.name or node.outputs[0].name}"


class Flow(Protocol):
    """Facts about a graph's values that are known so far."""

    @property
    def batch(self) -> object:
        """Size of the batch: a number or a symbol."""

    def of(self, value: ir.Value | None) -> Rows | None:
        """Return the position of the rows; None if it is unknown."""

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of a value's axes, or None if it is unknown."""

    def size(self, value: ir.Value, axis: int) -> Size:
        """Return the size of an axis in relation to the batch."""


def from_front(flow: Flow, axis: int, value: ir.Value | None) -> int | None:
    """Return an axis counted from the front; None if it is counted from the back of an unknown rank."""
    if axis >= 0:
        return axis
    rank = flow.rank(value)
    return None if rank is None else axis + rank
