"""Relate sizes to the batch: trace the target of a Reshape to the axes whose sizes it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

BATCH: Literal["batch"] = "batch"
TIMES: Literal["times"] = "times"
OTHER: Literal["other"] = "other"
# A number (0 and -1 as a Reshape means them), the batch's size, a multiple of it, a size that is unrelated to
# it, or None if it is unknown.
Size = int | Literal["batch", "times", "other"] | None
SizeOf = Callable[[ir.Value, int], Size]
_PASSED = {"Cast", "Identity", "Unsqueeze", "Squeeze"}
_MANY_AXES = 16
# Limits of a vector of sizes: its length, and the depth and values that it is computed from (64 axes at
# most).
_MAX_LENGTH, _MAX_DEPTH, _MAX_VALUES = 256, 100, 2000
_MAX_SIZE = 2**63 - 1
_ARITHMETIC = {"Add", "Div", "Mod", "Mul", "Sub"}


def sizes_of(value: ir.Value | None, size_of: SizeOf) -> list[Size] | None:
    """Return the numbers of a small vector, or of a scalar; None if their count is unknown.

    Args:
        value: The vector.
        size_of: Function that returns the size of a value's axis.
    """
    return _Vectors(size_of).of(value)


class _Vectors:
    """Reader of vectors of sizes, each once: a graph may add a vector to itself any number of times.

    A vector that is longer than a shape, or computed from more than exporters compute one from, is unknown.
    """

    def __init__(self, size_of: SizeOf) -> None:
        self._size_of = size_of
        self._found: dict[int, list[Size] | None] = {}
        self._depth = 0

    def of(self, value: ir.Value | None) -> list[Size] | None:
        """Return the numbers of a vector, see `sizes_of`."""
        if value is None:
            return None
        if id(value) not in self._found:
            if self._depth >= _MAX_DEPTH or len(self._found) >= _MAX_VALUES:
                return None
            self._depth += 1
            sizes = self._read(value)
            self._depth -= 1
            self._found[id(value)] = sizes if sizes is None or len(sizes) <= _MAX_LENGTH else None
        return self._found[id(value)]

    def _read(self, value: ir.Value) -> list[Size] | None:
        if value.const_value is not None and value.const_value.size > _MAX_LENGTH:
            return None
        if (numbers := numbers_of(value)) is not None:
            return list(numbers)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in _PASSED:
            # A value that is unsqueezed to be joined with others is a scalar.
            return self.of(node.inputs[0]) or ([None] if node.op_type == "Unsqueeze" else None)
        if node.op_type == "Reshape":
            inner = self.of(node.inputs[0])
            return inner if inner is not None and len(inner) == 1 else None
        if node.op_type == "Concat":
            parts = [self.of(part) for part in node.inputs]
            return None if None in parts else [size for part in parts if part is not None for size in part]
        if node.op_type == "Shape":
            return _of_shape(node, self._size_of)
        if node.op_type in ("Gather", "Slice"):
            return self._chosen(node)
        if node.op_type in _ARITHMETIC:
            pair = [self.of(part) for part in node.inputs]
            if any(part is None or len(part) != 1 for part in pair):
                return None
            return [_computed(node.op_type, [part[0] for part in pair if part is not None])]
        return None

    def _chosen(self, node: ir.Node) -> list[Size] | None:
        """Return one or some numbers of a vector, mostly of a Shape."""
        lost: list[Size] | None = [None] if node.op_type == "Gather" else None
        vector = node.inputs[0]
        bounds = [numbers_of(part) for part in node.inputs[1:]]
        if vector is None or any(bound is None or len(bound) != 1 for bound in bounds):
            return lost
        numbers = [bound[0] for bound in bounds if bound is not None]
        start, end = (numbers[0], numbers[0] + 1) if node.op_type == "Gather" else (numbers[0], numbers[1])
        if node.op_type == "Slice" and numbers[3:] not in ([], [1]):
            return None
        whole = self.of(vector)
        if whole is not None:
            return whole[start : end or None] if start == -1 else whole[start:end]
        maker = vector.producer()
        plain = maker is not None and maker.op_type == "Shape" and not maker.attributes
        if maker is None or maker.inputs[0] is None or not plain:
            return lost
        if node.op_type == "Gather":
            return [self._size_of(maker.inputs[0], start)]
        if not 0 <= start < end < _MANY_AXES:
            return lost
        # The Shape is that of an activation whose rank is unknown.
        return [self._size_of(maker.inputs[0], axis) for axis in range(start, end)]


def numbers_of(value: ir.Value | None) -> list[int] | None:
    """Return the numbers of a constant, whatever its axes; None if a value isn't constant."""
    node = None if value is None else value.producer()
    # Not recursive, because a chain may be as long as the graph.
    while value is not None and value.const_value is None and node is not None:
        if node.op_type not in (*_PASSED, "Reshape"):
            break
        value = node.inputs[0] if node.inputs else None
        node = None if value is None else value.producer()
    if value is None:
        return None
    if value.const_value is not None:
        return [int(number) for number in np.asarray(value.const_value.numpy()).reshape(-1)]
    for name in ("value_ints", "value_int") if node is not None and node.op_type == "Constant" else ():
        if node is not None and name in node.attributes:
            found = node.attributes[name].value
            return [int(found)] if name == "value_int" else [int(number) for number in found]
    return None


def _of_shape(node: ir.Node, size_of: SizeOf) -> list[Size] | None:
    source, start, end = (
        node.inputs[0],
        node.attributes.get_int("start", 0),
        node.attributes.get_int("end", 0),
    )
    assert source is not None
    shape = source.shape
    if "end" in node.attributes and 0 <= start < end:
        return [size_of(source, axis) for axis in range(start, end)]
    if shape is None:
        return None
    axes = range(len(shape))[start : end if "end" in node.attributes else None]
    return [size_of(source, axis) for axis in axes]


def _computed(operator: str, sizes: Sequence[Size]) -> Size:
    one, two = sizes
    if all(isinstance(size, int) or size == OTHER for size in sizes):
        if operator == "Mul" and isinstance(one, int) and isinstance(two, int):
            return one * two if abs(one * two) <= _MAX_SIZE else None
        return OTHER
    if operator != "Mul" or None in sizes:
        return None
    if 1 in sizes:
        return two if one == 1 else one
    return TIMES


def reshaped(
    before: Sequence[Size], outermost: bool, sizes: Sequence[Size], batch: int | None
) -> tuple[int, bool, bool] | None:
    """Return where a Reshape puts the batch's rows: their axis, and whether they are outermost and alone.

    Args:
        before: Sizes of the axes before that of the rows.
        outermost: True if the rows are outermost along their own axis.
        sizes: The result's sizes.
        batch: The batch's size, if it is a number.
    """
    if batch is not None and all(isinstance(size, int) and size > 0 for size in (*before, *sizes)):
        return _counted([n for n in before if isinstance(n, int)], outermost, list(sizes), batch)
    exact = [axis for axis, size in enumerate(sizes) if size == BATCH]
    found = exact or [axis for axis, size in enumerate(sizes) if size == TIMES]
    open_ones = [axis for axis, size in enumerate(sizes) if size in (-1, None)]
    found = found or open_ones
    if len(found) != 1:
        return None
    (axis,) = found
    alone = bool(exact)
    outside = [size for size in before if size != 1]
    ahead = [size for size in sizes[:axis] if size != 1]
    if not outside and not ahead:
        return axis, outermost, alone and outermost
    if not outermost:
        # (sequence · batch) cut into (sequence, batch), or still one axis.
        return (axis, True, True) if alone and ahead else (axis, False, False) if not ahead else None
    if outside and not ahead:
        # Rule 4 of `follow`: an axis before that of the rows has gone into theirs, or it was cut wrongly.
        return None if alone else (axis, False, False)
    return (axis, True, alone) if outside and (alone or len(outside) == len(ahead)) else None


def _counted(
    before: Sequence[int], outermost: bool, sizes: Sequence[Size], batch: int
) -> tuple[int, bool, bool] | None:
    """Return the result of `reshaped` if all sizes are numbers."""
    outside, ahead = int(np.prod(before, dtype=np.int64)), 1
    for axis, size in enumerate(sizes):
        assert isinstance(size, int)
        if ahead == outside and (size != 1 or batch == 1):
            if size % batch:
                return None
            return axis, outermost, outermost and size == batch
        if ahead < outside < ahead * size:
            return axis, False, False
        ahead *= size
    return None
