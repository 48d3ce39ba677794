"""Where the rows of the batch lie in one value of a graph, and what rules ask for (see `batch_rows`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from lora_export.modes.branches.batch.sizes import Size


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the batch's rows lie in a value.

    Attributes:
        axis: The axis; None: the value has no rows.
        outermost: Nothing else is outside of them along that axis.
        alone: There is nothing else along that axis.
        moved: The node behind which they are not known to be all of the batch's in its order; nothing else is
            known then.
        summed: The node that made one value of all rows, which are the same for all since then.
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
        """Whether the first axis is the batch, or the batch and something inside of it."""
        return self.axis == 0 and self.outermost


SAME = Rows(axis=None)


def moved_by(node: ir.Node) -> Rows:
    """Return the place of rows that a node takes apart, or doesn't leave in their order."""
    return Rows(axis=None, moved=name_of(node))


def summed_by(node: ir.Node) -> Rows:
    """Return the place of rows of which a node makes one value."""
    return Rows(axis=None, summed=name_of(node))


def name_of(node: ir.Node) -> str:
    """Return a node's operator and name, for messages."""
    return f"{node.op_type} {node.name or node.outputs[0].name}"


class Flow(Protocol):
    """What is known of a graph's values so far."""

    @property
    def batch(self) -> object:
        """The size of the batch: a number or a symbol."""

    def of(self, value: ir.Value | None) -> Rows | None:
        """Return where the rows are; None where that is unknown."""

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of a value's axes, where it is known."""

    def size(self, value: ir.Value, axis: int) -> Size:
        """Return what the size of an axis has to do with the batch."""


def from_front(flow: Flow, axis: int, value: ir.Value | None) -> int | None:
    """Return an axis counted from the front; None where it is counted from the back of an unknown rank."""
    if axis >= 0:
        return axis
    rank = flow.rank(value)
    return None if rank is None else axis + rank
