"""Tell whether the outputs of a graph depend on some columns of a node's result (beside `graph.reach`).

A tool packs several weights into one, ``q``, ``k`` and ``v`` side by side, and the graph takes their products
apart behind it. That the packed product is used says nothing of each of its parts.

Followed are operators that keep columns apart and whose sizes the graph states: elementwise ones, Split,
Slice, Gather, Reshape and Transpose. Any other operator that reads the columns counts as using them.

A stranger's graph may cut a value into any number of pieces: there is a limit for following them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_export.graph.reach import Reach
from lora_export.untrusted.computed import Budget, UncomputedError

_DEFAULT = ("", "ai.onnx")
# Sizes, places and axes are fewer numbers than that.
_MOST = 1 << 12
# Limit of inputs and outputs that are looked at to follow the columns of all modules: some seconds.
MAX_FOLLOWED = 1 << 19
# So many numbers of a constant take as long as one input.
_NUMBERS = 1 << 6
# The first result has the columns of the only input that has any.
_ELEMENTWISE = frozenset(
    {
        *("Identity", "Cast", "Dropout", "Neg", "Abs", "Sqrt", "Exp", "Log", "Erf", "Sin", "Cos", "Clip"),
        *("Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "Sigmoid", "HardSigmoid", "Tanh", "Softplus", "Mish"),
        *("HardSwish", "Reciprocal", "Round", "Floor", "Ceil", "Sign"),
        *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean"),
    }
)


class Columns(NamedTuple):
    """Some columns of a value.

    Attributes:
        value: The value.
        axis: Their axis, counted from the last one, which is -1.
        size: Number of all columns.
        start: First of them.
        stop: One behind the last.
        rank: The value's number of axes, where the graph doesn't say it; None: not known.
    """

    value: ir.Value
    axis: int
    size: int
    start: int
    stop: int
    rank: int | None = None


def depend_on_columns(reach: Reach, columns: Columns, budget: Budget | None = None) -> bool:
    """Return whether an output depends on columns of a value; True also if this can't be told.

    Args:
        reach: What the graph's outputs depend on.
        columns: The columns.
        budget: What is left for the graph, of `MAX_FOLLOWED`; None if this is all of it.
    """
    try:
        return _is_reached(reach, columns, budget or Budget(MAX_FOLLOWED))
    except UncomputedError:
        return True


def _is_reached(reach: Reach, columns: Columns, budget: Budget) -> bool:
    pending, seen = [columns], set()
    while pending:
        part = pending.pop()
        key = id(part.value), *part[1:]
        budget.spend(1)
        if key in seen or part.start >= part.stop or not reach.depends_on(part.value):
            continue
        seen.add(key)
        if part.value.is_graph_output():
            return True
        for node, index in part.value.uses():
            budget.spend(_work(node))
            if not reach.reads(node, index):
                continue
            behind = _behind(node, index, part)
            if behind is None:
                return True
            pending += behind
    return False


def _work(node: ir.Node) -> int:
    """Return what it takes to follow columns through a node, in inputs and outputs."""
    work = len(node.inputs) + len(node.outputs)
    if node.op_type not in _STEPS:
        return work
    constants = [value.const_value for value in node.inputs if value is not None]
    return work + sum(min(constant.size, _MOST) for constant in constants if constant is not None) // _NUMBERS


def _behind(node: ir.Node, index: int, part: Columns) -> list[Columns] | None:
    """Return where columns are in a node's results; None if this can't be told."""
    if node.domain not in _DEFAULT:
        return None
    if node.op_type in _ELEMENTWISE:
        return [part._replace(value=node.outputs[0], rank=largest_rank(node, part))]
    step = _STEPS.get(node.op_type)
    return step(node, part) if step is not None and index == 0 else None


def _split(node: ir.Node, part: Columns) -> list[Columns] | None:
    sizes = _ints(node, 1)
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        each = -(-part.size // len(node.outputs))
        sizes = [each] * (len(node.outputs) - 1)
        sizes.append(part.size - sum(sizes))
    own = _is_own_axis(node.attributes.get_int("axis", 0), part)
    if own is False or len(sizes) != len(node.outputs) or sum(sizes) != part.size:
        return None
    found, first = [], 0
    for value, size in zip(node.outputs, sizes, strict=True):
        found.append(_cut(part, value, first, first + size))
        first += size
    return found


def _slice(node: ir.Node, part: Columns) -> list[Columns] | None:
    starts, stops = _ints(node, 1), _ints(node, 2)
    if starts is None or stops is None:
        return None
    axes = _ints(node, 3) if _has_input(node, 3) else list(range(len(starts)))
    steps = _ints(node, 4) if _has_input(node, 4) else [1] * len(starts)
    if axes is None or steps is None or not len(axes) == len(starts) == len(stops) == len(steps):
        return None
    behind = part._replace(value=node.outputs[0])
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        own = _is_own_axis(axis, part)
        if own is None or (own and step != 1):
            return None
        if own:
            first, end, _ = slice(start, stop).indices(part.size)
            behind = _cut(part, node.outputs[0], first, max(first, end))
    return [behind]


def _gather(node: ir.Node, part: Columns) -> list[Columns] | None:
    chosen = _ints(node, 1)
    if chosen is None or not _is_own_axis(node.attributes.get_int("axis", 0), part):
        return None
    at = [number + part.size if number < 0 else number for number in chosen]
    return None if any(part.start <= number < part.stop for number in at) else []


def _reshape(node: ir.Node, part: Columns) -> list[Columns] | None:
    """Follow columns of the last axis that become whole entries of an axis, ``(…, 3, heads, head_dim)``."""
    result, inner = node.outputs[0], 1
    dims = _ints(node, 1) or _dims(result)
    if part.axis != -1 or dims is None:
        return None
    for back, dim in enumerate(reversed(dims), start=1):
        if dim <= 0 or part.size % (inner * dim):
            return None
        if inner * dim == part.size:
            if part.start % inner or part.stop % inner:
                return None
            start, stop = part.start // inner, part.stop // inner
            return [Columns(result, -back, size=dim, start=start, stop=stop, rank=len(dims))]
        inner *= dim
    return None


def _transpose(node: ir.Node, part: Columns) -> list[Columns] | None:
    order = list(node.attributes.get_ints("perm", ()))
    before = len(order) + part.axis
    if before not in order:
        return None
    axis = order.index(before) - len(order)
    return [part._replace(value=node.outputs[0], axis=axis, rank=len(order))]


def _cut(part: Columns, value: ir.Value, first: int, end: int) -> Columns:
    """Return which columns of a result, which has those from ``first`` to ``end``, are of the part."""
    start, stop = max(part.start, first) - first, min(part.stop, end) - first
    return part._replace(value=value, size=end - first, start=start, stop=stop)


def _is_own_axis(axis: int, part: Columns) -> bool | None:
    """Return whether an operator's axis is the columns'; None if the value's number of axes is not known."""
    if axis < 0:
        return axis == part.axis
    rank = _rank_of(part.value, part.rank)
    return None if rank is None else axis - rank == part.axis


def largest_rank(node: ir.Node, part: Columns | None = None) -> int | None:
    """Return the largest number of axes of a node's inputs, of which one may be columns; None: not known."""
    ranks = [
        _rank_of(value, part.rank if part is not None and value is part.value else None)
        for value in node.inputs
        if value is not None
    ]
    return None if None in ranks else max(rank for rank in ranks if rank is not None)


def _rank_of(value: ir.Value, otherwise: int | None) -> int | None:
    """Return a value's number of axes, where the graph says it."""
    return otherwise if value.shape is None else len(value.shape)


def _has_input(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _ints(node: ir.Node, index: int) -> list[int] | None:
    """Return the numbers of an input that is a constant of the graph, else None."""
    value = node.inputs[index] if _has_input(node, index) else None
    if value is None or value.is_graph_input() or value.const_value is None:
        return None
    if value.const_value.size > _MOST:
        return None
    return [int(number) for number in np.asarray(value.const_value.numpy()).reshape(-1)]


def _dims(value: ir.Value) -> list[int] | None:
    """Return a value's sizes, 0 for each that is not a number."""
    return None if value.shape is None else [dim if isinstance(dim, int) else 0 for dim in value.shape]


_STEPS = {
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Reshape": _reshape,
    "Transpose": _transpose,
}
