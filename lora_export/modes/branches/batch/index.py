"""Tell whether an index counts the batch's rows, by computing it for two sizes of the batch.

Exporters write ``x[arange(batch), length]`` and the reads of attention masks as a Gather of computed numbers.
Values that depend only on sizes are computed as the graph does; values that depend on the model's inputs (the
length) are filled in with several kinds of numbers: if they have a part in the row's number, the results
differ. Numbers with which the index leads out of its data are not such as the model gets (no mask is all
zeros).

A graph may compute from one vector as often as it likes: each value is computed once for each probe, and all
of a graph's values within one budget (`Work`). What does not fit into it stays unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.modes.branches.batch.rows import SAME, Flow, Rows, moved_by
from lora_export.untrusted.computed import MAX_ELEMENTS, NODE_WORK, Budget, UncomputedError
from lora_export.untrusted.computed import computed as values_of

Numbers = NDArray[np.int64]
# Operators with which an index is computed; numbers are filled in after others that read an input.
_ARITHMETIC = {
    *("Add", "Cast", "CastLike", "Concat", "Div", "Equal", "Expand", "Flatten", "GreaterOrEqual"),
    *("Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Sub"),
    *("Tile", "Transpose", "Unsqueeze", "Where"),
}
# Opset assumed for an If's body, which has none of its own.
_OPSET = 18
_MAX_NODES = 300
# Largest number of elements of a value whose rows are numbered, to see where a Reshape puts them, and of all
# such values of a graph; layers repeat the same sizes, which are numbered once.
_MAX_NUMBERED, _MAX_ALL_NUMBERED = 1 << 24, 1 << 30
# Number of Reshapes after each other whose sizes are followed.
_MAX_CHAIN = 100
# Sizes to compute with if they have no number: the batch's, and that of any other axis.
_PROBES = ((3, 7), (5, 11))
# Lengths to see whether a number divides a size that is not known.
_LENGTHS = (7, 720)
# Numbers to fill in: one number; or along the last axis a one followed by zeros, and only ones if that axis
# holds nothing but rows.
Fill = Literal[0, 1, 2, "first"]
_FILLS: tuple[Fill, ...] = (0, 1)
_MORE_FILLS: tuple[Fill, ...] = (*_FILLS, 2, "first")
# Number of fills that must lead to the same position.
_ENOUGH = 2


class _UnknownError(Exception):
    """Error for a number that can't be computed."""


@dataclass
class Work:
    """Values that were computed of one graph, and the work that is left.

    Attributes:
        budget: Work that is left for the values of its indices.
        numbered: Work that is left for the rows of its Reshapes.
        values: Computed values, None for those that can't be, by id and probe; ids of values of a graph stay.
        reshaped: Positions of rows after a Reshape, by sizes before and after, position before and batch.
    """

    budget: Budget = field(default_factory=Budget)
    numbered: Budget = field(default_factory=lambda: Budget(_MAX_ALL_NUMBERED))
    values: dict[tuple[int, int, int, Fill], Numbers | None] = field(default_factory=dict)
    reshaped: dict[tuple[tuple[int, ...], tuple[int, ...], int, int], Rows] = field(default_factory=dict)


@dataclass(frozen=True)
class SizedValues:
    """Computation of a graph's values for given sizes.

    Attributes:
        flow: Facts about the graph's values.
        batch: Size of the batch.
        other: Size of other axes without a number.
        fill: Numbers of values that depend on the graph's inputs, see `Fill`.
    """

    flow: Flow
    batch: int
    other: int
    fill: Fill

    def size(self, value: ir.Value, axis: int) -> int:
        """Return the size of an axis.

        Raises:
            _UnknownError: The axis has none.
        """
        size = self.flow.size(value, axis)
        if isinstance(size, int):
            return size
        if size is None:
            raise _UnknownError
        return {"batch": self.batch, "times": self.batch * self.other, "other": self.other}[size]

    def compute(self, value: ir.Value) -> Numbers:
        """Return the numbers of a value.

        Raises:
            _UnknownError: The value can't be computed.
        """
        work = self.flow.work
        key = (id(value), self.batch, self.other, self.fill)
        try:
            if key not in work.values:
                # Until it is known, it is not.
                work.values[key] = None
                work.values[key] = self._computed(value, work.budget)
            numbers = work.values[key]
            # Who asks for a value reads it.
            work.budget.spend(NODE_WORK if numbers is None else numbers.size)
        except UncomputedError as error:
            raise _UnknownError from error
        if numbers is None:
            raise _UnknownError
        return numbers

    def _computed(self, value: ir.Value, budget: Budget) -> Numbers | None:
        from onnx import helper

        part = _Part(probe=self)
        try:
            part.add(value)
        except _UnknownError:
            return None
        finally:
            budget.spend(NODE_WORK * (len(part.seen) + 1) + part.size)
        graph = helper.make_graph(
            [ir.to_proto(node) for node in part.nodes],
            "index",
            [],
            [helper.make_tensor_value_info(str(value.name), 0, None)],
            initializer=[ir.to_proto(ir.tensor(array, name=name)) for name, array in part.known.items()],
        )
        return values_of(graph, _opset(value), budget)


@dataclass(kw_only=True)
class _Part:
    """Nodes that compute a value, and the values that they read."""

    probe: SizedValues
    nodes: list[ir.Node] = field(default_factory=list)
    known: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    size: int = 0

    def add(self, value: ir.Value) -> None:
        """Add the nodes that compute a value."""
        node = value.producer()
        if str(value.name) in self.known or (node is not None and id(node) in self.seen):
            return
        if value.const_value is not None:
            self._admit(value.const_value.size)
            self.known[str(value.name)] = value.const_value.numpy()
        elif node is not None and node.op_type == "Shape" and self._has_sizes(node):
            self.known[str(value.name)] = self._shape(node)
        elif node is not None and self._is_computed(node):
            self.seen.add(id(node))
            if len(self.seen) > _MAX_NODES:
                raise _UnknownError
            for read in node.inputs:
                if read is not None:
                    self.add(read)
            self.nodes.append(node)
        else:
            self.known[str(value.name)] = self._filled(value)

    def _admit(self, size: int) -> None:
        """Count the elements that are read; an untrusted shape must not fill the memory."""
        self.size += size
        if self.size > MAX_ELEMENTS:
            raise _UnknownError

    def _is_computed(self, node: ir.Node) -> bool:
        if node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in _ARITHMETIC:
            return True
        bodies = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        return not bodies and all(self.probe.flow.of(read) == SAME for read in node.inputs)

    def _has_sizes(self, node: ir.Node) -> bool:
        """Return True if a Shape's sizes are known; else it is computed from its input."""
        flow, source = self.probe.flow, node.inputs[0]
        rank = flow.rank(source)
        if flow.of(source) != SAME:
            if rank is None:
                raise _UnknownError
            return True
        assert source is not None
        # In a value without rows, an axis without a number may still have the batch's size.
        numbers = [flow.size(source, axis) for axis in range(rank or 0)]
        return rank is not None and all(isinstance(number, int) for number in numbers)

    def _shape(self, node: ir.Node) -> NDArray[np.generic]:
        source = node.inputs[0]
        assert source is not None
        rank = self.probe.flow.rank(source) or 0
        stop = node.attributes.get_int("end", rank)
        axes = range(rank)[node.attributes.get_int("start", 0) : stop]
        return np.array([self.probe.size(source, axis) for axis in axes], np.int64)

    def _filled(self, value: ir.Value) -> NDArray[np.generic]:
        rank, dtype = self.probe.flow.rank(value), value.dtype
        if rank is None or self.probe.flow.of(value) is None:
            raise _UnknownError
        shape = [self.probe.size(value, axis) for axis in range(rank)]
        self._admit(math.prod(shape))
        fill = self.probe.fill
        numbers = np.full(shape, 0 if fill == "first" else fill, np.int64 if dtype is None else dtype.numpy())
        rows = self.probe.flow.of(value)
        if fill == "first":
            numbers[..., : None if rows is not None and rows.axis == len(shape) - 1 else 1] = 1
        return numbers


def rows_of_index(
    flow: Flow, index: ir.Value, number: Callable[[SizedValues, Numbers], Numbers | None]
) -> Rows | None:
    """Return the position of the rows whose numbers an index has in their order: 0, 1, 2, ….

    Args:
        flow: Facts about the graph's values.
        index: The index.
        number: Function that turns the index's values into numbers of rows; None if they lead out of its
            data.

    Returns:
        The position; `SAME` if the index takes them in another order, or not all of them. None if the index
        can't be computed.
    """
    found: set[Rows] = set()
    told: Counter[tuple[int, int]] = Counter()
    for probe in _probes(flow, _MORE_FILLS):
        try:
            numbers = number(probe, probe.compute(index))
        except _UnknownError:
            return None
        if numbers is not None:
            found.add(_counted(numbers, probe.batch))
            told[probe.batch, probe.other] += 1
    if min((told[sizes] for sizes in _sizes(flow)), default=0) < _ENOUGH:
        return None
    return found.pop() if len(found) == 1 else SAME


def rows_reshaped(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return where a Reshape puts rows, by numbering the rows of a value of its sizes; None if unknown.

    Where it cuts across them for some size of the batch, no axis has them in their order any more.
    """
    source, target = node.inputs[0], node.outputs[0]
    if source is None or rows.axis is None or not rows.outermost:
        return None
    if _cuts_rows(flow, node, rows.axis):
        return moved_by(node)
    found: set[Rows] = set()
    is_outside = True
    for probe in _probes(flow):
        try:
            before, after = computed_shape(probe, source), computed_shape(probe, target)
        except _UnknownError:
            return None
        is_outside = is_outside and math.prod(before[: rows.axis]) == 1
        key = (before, after, rows.axis, probe.batch)
        if key not in flow.work.reshaped:
            size = math.prod(before)
            try:
                flow.work.numbered.spend(size)
            except UncomputedError:
                return None
            if size > _MAX_NUMBERED:
                return None
            flow.work.reshaped[key] = _renumbered(*key)
        found.add(flow.work.reshaped[key])
    if SAME in found:
        # Behind an axis of something else, rows may be inside of that along one axis.
        return moved_by(node) if is_outside else None
    return found.pop() if len(found) == 1 else None


def _cuts_rows(flow: Flow, node: ir.Node, axis: int) -> bool:
    """Return True if a Reshape to numbers and one open axis (-1) does not keep rows together.

    The open axis would have to hold whole rows, or equal pieces of each, for every size of the batch. Sizes
    that are not known may be multiples of anything.
    """
    source, target = node.inputs[0], node.inputs[1]
    if isinstance(flow.batch, int) or source is None or target is None:
        return False
    for other in _LENGTHS:
        probes = [SizedValues(flow, batch, other, 0) for batch, _ in _PROBES]
        try:
            sizes, *more = [[int(size) for size in probe.compute(target).reshape(-1)] for probe in probes]
            before = computed_shape(probes[0], source)
        except _UnknownError:
            return False
        if sizes.count(-1) != 1 or any(sizes != others for others in more) or 0 in sizes[axis : axis + 1]:
            return False
        sizes = [size or before[place] for place, size in enumerate(sizes) if size or place < len(before)]
        if 0 in sizes:
            return False
        place = sizes.index(-1)
        outside = math.prod(before[:axis])
        inside = math.prod(before[axis:]) // probes[0].batch
        if outside % math.prod(sizes[:place]) == 0 and inside % math.prod(sizes[place + 1 :]) == 0:
            return False
    return True


def _renumbered(before: tuple[int, ...], after: tuple[int, ...], place: int, batch: int) -> Rows:
    """Return where rows along an axis are after a Reshape."""
    numbers = np.repeat(_rows(batch), before[place] // batch)
    numbers = numbers.reshape([-1 if axis == place else 1 for axis in range(len(before))])
    return _counted(np.broadcast_to(numbers, before).reshape(after), batch)


def same_size(flow: Flow, one: ir.Value, two: ir.Value, axis: int) -> bool:
    """Return True if two values are known to have one size along an axis; the first depends only on sizes."""
    try:
        return all(
            probe.compute(one).shape[axis : axis + 1] == computed_shape(probe, two)[axis : axis + 1]
            for probe in _probes(flow)
        )
    except _UnknownError:
        return False


def keeps_size(flow: Flow, given: ir.Value, place: int, data: ir.Value, axis: int) -> bool | None:
    """Return True if an axis keeps its size by a vector of sizes, or of factors; None if that is unknown."""
    kept = []
    for probe in _probes(flow):
        try:
            numbers = probe.compute(given).reshape(-1)
            kept.append(
                numbers[place] == (1 if numbers.dtype.kind == "f" else computed_shape(probe, data)[axis])
            )
        except (_UnknownError, IndexError):
            return None
    return all(kept)


def computed_vector(flow: Flow, value: ir.Value) -> list[int] | None:
    """Return the numbers of a vector that depends on no size and on no input; None for other vectors."""
    found: set[tuple[int, ...]] = set()
    for probe in _probes(flow):
        try:
            numbers = probe.compute(value)
        except _UnknownError:
            return None
        found.add(tuple(int(number) for number in numbers.reshape(-1)))
    return list(found.pop()) if len(found) == 1 else None


def computed_shape(probe: SizedValues, value: ir.Value, depth: int = 0) -> tuple[int, ...]:
    """Return a value's shape; if it was flattened or reshaped, as its node computes it.

    Raises:
        _UnknownError: The shape can't be computed.
    """
    node, rank = value.producer(), probe.flow.rank(value)
    if node is not None and node.op_type in ("Flatten", "Reshape") and node.inputs[0] is not None:
        if depth > _MAX_CHAIN:
            raise _UnknownError
        before = computed_shape(probe, node.inputs[0], depth + 1)
        if node.op_type == "Flatten":
            axis = node.attributes.get_int("axis", 1)
            return math.prod(before[:axis]), math.prod(before[axis:])
        assert node.inputs[1] is not None
        target = [int(size) for size in probe.compute(node.inputs[1])]
        try:
            return _reshaped(before, target)
        except ValueError as error:
            raise _UnknownError from error
    if rank is None:
        raise _UnknownError
    return tuple(probe.size(value, axis) for axis in range(rank))


def _reshaped(shape: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a Reshape gives to a value of a shape."""
    sizes = list(target)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0:
        sizes[sizes.index(-1)] = math.prod(shape) // known
    if math.prod(sizes) != math.prod(shape) or min(sizes, default=1) < 0:
        raise ValueError
    return tuple(sizes)


def _rows(batch: int) -> NDArray[np.unsignedinteger]:
    """Return the rows' numbers in the smallest dtype, because all elements of a value get one."""
    numbers: NDArray[np.unsignedinteger] = np.arange(batch, dtype=np.min_scalar_type(batch))
    return numbers


def _sizes(flow: Flow) -> list[tuple[int, int]]:
    return [(flow.batch if isinstance(flow.batch, int) else batch, other) for batch, other in _PROBES]


def _probes(flow: Flow, fills: tuple[Fill, ...] = _FILLS) -> list[SizedValues]:
    return [SizedValues(flow, batch, other, fill) for batch, other in _sizes(flow) for fill in fills]


def _counted(numbers: Numbers, batch: int) -> Rows:
    for axis, size in enumerate(numbers.shape):
        if size and size % batch == 0:
            rows = np.repeat(_rows(batch), size // batch)
            shape = [size if place == axis else 1 for place in range(numbers.ndim)]
            if np.array_equal(numbers, np.broadcast_to(rows.reshape(shape), numbers.shape)):
                return Rows(axis=axis, alone=size == batch)
    return SAME


def _opset(value: ir.Value) -> int:
    node = value.producer()
    graph = node.graph if node is not None else None
    version = graph.opset_imports.get("") if graph is not None else None
    return version or _OPSET
