"""Follow rows through operators that pick or place elements by index: some keep the batch's rows in order.

Rules:

1. Along another axis than the batch's, rows stay what they are, each with the same picks or with its own.
2. Along the batch's, rows stay in their order if the index counts them (`index`), else they have moved; with
   an index that can't be computed this is unknown.
3. Slice, Split, Compress and Pad along the batch's axis move them, unless they leave all of it as it is.
4. Tile and Resize along it put several versions of the rows after each other, or others between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir

from lora_export.modes.branches.batch.index import (
    Numbers,
    SizedValues,
    computed_shape,
    computed_vector,
    keeps_size,
    rows_of_index,
    same_size,
)
from lora_export.modes.branches.batch.rows import SAME, Flow, Rows, from_front, moved_by
from lora_export.modes.branches.batch.sizes import BATCH, numbers_of, sizes_of

_FAR = (1 << 31) - 1


def _gather(flow: Flow, node: ir.Node, inputs: Sequence[Rows | None]) -> Rows | None:
    data, index = inputs[0], inputs[1]
    axis = from_front(flow, node.attributes.get_int("axis", 0), node.inputs[0])
    if axis is None or data is None or data.axis is None:
        return None if axis is None or data is None or index is None else _shifted(index, axis)
    if data.axis == axis:
        return _by_index(flow, node, data=data, index=index, before=axis, part=lambda numbers: numbers)
    count = flow.rank(node.inputs[1])
    if index != SAME:
        return None
    if data.axis < axis:
        return data
    return None if count is None else replace(data, axis=data.axis - 1 + count)


def _gather_nd(flow: Flow, node: ir.Node, inputs: Sequence[Rows | None]) -> Rows | None:
    (data, index), count = inputs, flow.rank(node.inputs[1])
    shared, chosen = node.attributes.get_int("batch_dims", 0), _components(flow, node.inputs[1])
    if data is None or count is None:
        return None
    if data.axis is None:
        return index if index is not None and index.axis != count - 1 else None
    if data.axis < shared:
        return data if index is not None and index.axis in (data.axis, None) else None
    if chosen is None:
        return None
    component = data.axis - shared
    if component < chosen:
        return (
            None
            if shared
            else _by_index(
                flow, node, data=data, index=index, before=0, part=lambda all_: all_[..., component]
            )
        )
    return replace(data, axis=count - 1 + component - chosen) if index == SAME else None


def _gather_elements(flow: Flow, node: ir.Node, inputs: Sequence[Rows | None]) -> Rows | None:
    data, index = inputs
    axis = from_front(flow, node.attributes.get_int("axis", 0), node.inputs[0])
    if axis is None or data is None:
        return None
    if data.axis is None:
        return index
    if data.axis == axis:
        return _by_index(flow, node, data=data, index=index, before=0, part=lambda numbers: numbers)
    whole = index == SAME and same_size(flow, _value(node.inputs[1]), _value(node.inputs[0]), data.axis)
    return data if whole or (index is not None and index.axis == data.axis) else None


def _scatter_elements(flow: Flow, node: ir.Node, inputs: Sequence[Rows | None]) -> Rows | None:
    data, index, updates = inputs
    axis = from_front(flow, node.attributes.get_int("axis", 0), node.inputs[0])
    if axis is None or data is None or index is None or updates is None:
        return None
    carriers = [rows for rows in (data, index, updates) if rows.axis is not None]
    found = carriers[0]
    if any(rows.axis != found.axis for rows in carriers):
        return None
    if axis == found.axis:
        return moved_by(node) if index.axis is not None or updates.axis is not None else data
    return found if all(rows.outermost for rows in carriers) or len(set(carriers)) == 1 else None


def _scatter_nd(flow: Flow, node: ir.Node, inputs: Sequence[Rows | None]) -> Rows | None:
    data, index, updates = inputs
    count, chosen = flow.rank(node.inputs[1]), _components(flow, node.inputs[1])
    if data is None or index is None or updates is None or count is None or chosen is None:
        return None
    carriers = [rows for rows in (data, index, updates) if rows.axis is not None]
    place = updates.axis if updates.axis is not None else index.axis
    if place is None:
        # The same values are written into fixed places.
        return data
    if place >= count - 1:
        axis = chosen + place - (count - 1)
        return replace(updates, axis=axis) if index == SAME and data.axis in (None, axis) else None
    if not all(rows.alone for rows in carriers) or index.axis not in (None, place):
        return None
    unknown = False
    for component in range(chosen) if data.axis is None else (data.axis,):
        found = rows_of_index(flow, _value(node.inputs[1]), _component(component))
        if found is not None and found.axis == place and found.alone:
            return Rows(axis=component)
        unknown = unknown or found is None
    return None if unknown else moved_by(node)


def _by_index(
    flow: Flow, node: ir.Node, data: Rows, index: Rows | None, before: int, part: Callable[[Numbers], Numbers]
) -> Rows | None:
    """Apply rule 2: the numbers of rows are a part of an index, or in it if their axis holds more."""
    source, assumed = _value(node.inputs[0]), data.axis or 0
    if index is None:
        return None
    if not data.outermost:
        return moved_by(node)

    def numbers(probe: SizedValues, values: Numbers) -> Numbers | None:
        values, size = part(values), computed_shape(probe, source)[assumed]
        if values.size and not (values.min() >= 0 and values.max() < size):
            return None
        return values // (size // probe.batch)

    found = rows_of_index(flow, _value(node.inputs[1]), numbers)
    if found is None:
        return None
    if found.axis is None or (index.axis is not None and index.axis != found.axis):
        return moved_by(node)
    return replace(found, axis=found.axis + before)


def _shifted(index: Rows, axis: int) -> Rows:
    return index if index.axis is None else replace(index, axis=index.axis + axis)


def _components(flow: Flow, index: ir.Value | None) -> int | None:
    """Return the number of axes along which an index of a GatherND or ScatterND chooses."""
    rank = flow.rank(index)
    size = None if rank is None or index is None else flow.size(index, rank - 1)
    if isinstance(size, int):
        return size
    # If the shape is unknown, a Concat of single numbers tells.
    node = None if index is None else index.producer()
    return len(node.inputs) if node is not None and node.op_type == "Concat" else None


def _component(number: int) -> Callable[[SizedValues, Numbers], Numbers]:
    return lambda _, numbers: numbers[..., number]


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


# --- along the batch's axis: all of it as it is, or moved ---------------------------------------------------


def sliced(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return the position of the rows after a Slice."""
    data = node.inputs[0]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        found = numbers_of(node.inputs[3])
    else:
        count = flow.rank(node.inputs[1])
        starts = sizes_of(node.inputs[1], flow.size)
        found = list(range(len(starts))) if starts else [0] if count == 0 else None
    axes = None if found is None else [from_front(flow, axis, data) for axis in found]
    if axes is None or None in axes:
        return None
    if rows.axis not in axes:
        return rows
    place = axes.index(rows.axis)
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    bounds = [sizes_of(bound, flow.size) for bound in node.inputs[1:3]]
    step = [1] * len(axes) if steps is None else numbers_of(steps)
    if step is None or any(bound is None or place >= len(bound) for bound in bounds):
        return moved_by(node)
    start, end = (bound[place] for bound in bounds if bound is not None)
    whole = end == BATCH or (isinstance(end, int) and isinstance(flow.batch, int) and end >= flow.batch)
    far = (whole and rows.alone) or (isinstance(end, int) and end >= _FAR)
    return rows if start == 0 and far and step[place] == 1 else moved_by(node)


def split(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return the position of the rows after a Split, or one into a sequence."""
    axis = from_front(flow, node.attributes.get_int("axis", 0), node.inputs[0])
    if axis is None:
        return None
    if axis == rows.axis:
        return rows if node.op_type == "Split" and len(node.outputs) == 1 else moved_by(node)
    whole = node.op_type == "Split" or node.attributes.get_int("keepdims", True) or len(node.inputs) > 1
    return rows if whole or rows.axis is None else replace(rows, axis=rows.axis - (axis < rows.axis))


def compressed(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return the position of the rows after a Compress."""
    if "axis" not in node.attributes:
        return moved_by(node)
    axis = from_front(flow, node.attributes["axis"].as_int(), node.inputs[0])
    return None if axis is None else moved_by(node) if axis == rows.axis else rows


def reversed_(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return the position of the rows after a ReverseSequence."""
    batch, time = node.attributes.get_int("batch_axis", 1), node.attributes.get_int("time_axis", 0)
    lengths = flow.of(node.inputs[1])
    if time == rows.axis:
        return moved_by(node)
    return rows if lengths is not None and (lengths.axis is None or batch == rows.axis) else None


def padded(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return the position of the rows after a Pad."""
    pads = sizes_of(node.inputs[1], flow.size)
    rank = flow.rank(node.inputs[0])
    axes: list[int] | None = None if rank is None else list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = numbers_of(node.inputs[3])
    if pads is None or None in pads:
        # Exporters reverse the order of torch's pads with operators.
        pads = list(computed_vector(flow, _value(node.inputs[1])) or ()) or None
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return None
    places = [from_front(flow, axis, node.inputs[0]) for axis in axes]
    if None in places:
        return None
    ends = [pads[place + side] for side in (0, len(axes)) for place in _at(places, rows.axis)]
    if any(isinstance(end, int) and end for end in ends):
        return moved_by(node)
    return rows if all(end == 0 for end in ends) else None


def tiled(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return the position of the rows after a Tile."""
    repeats = sizes_of(node.inputs[1], flow.size)
    if repeats is None or rows.axis is None or rows.axis >= len(repeats):
        return None
    times = repeats[rows.axis]
    if not isinstance(times, int):
        return None
    return rows if times == 1 else Rows(axis=rows.axis, outermost=False, alone=False)


def resized(flow: Flow, node: ir.Node, rows: Rows) -> Rows | None:
    """Return the position of the rows after a Resize or Upsample."""
    data = _value(node.inputs[0])
    if rows.axis is None or flow.rank(data) is None:
        return None
    named = node.attributes.get("axes")
    axes = list(named.as_ints()) if named is not None else list(range(flow.rank(data) or 0))
    at = _at([from_front(flow, axis, data) for axis in axes], rows.axis)
    if not at:
        return rows
    # Inputs are X, roi, scales, sizes; those of an Upsample X and scales.
    given = next((value for value in reversed(node.inputs[1:]) if value is not None), None)
    if given is None:
        return None
    keeps = keeps_size(flow, given, place=at[0], data=data, axis=rows.axis)
    return None if keeps is None else rows if keeps else moved_by(node)


def _at(places: Sequence[int | None], axis: int | None) -> list[int]:
    return [number for number, place in enumerate(places) if place == axis]


PICKS: dict[str, Callable[[Flow, ir.Node, Sequence[Rows | None]], Rows | None]] = {
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "ScatterElements": _scatter_elements,
    "Scatter": _scatter_elements,
    "ScatterND": _scatter_nd,
}
ALONG: dict[str, Callable[[Flow, ir.Node, Rows], Rows | None]] = {
    "Slice": sliced,
    "Split": split,
    "SplitToSequence": split,
    "Compress": compressed,
    "ReverseSequence": reversed_,
    "Pad": padded,
    "Tile": tiled,
    "Resize": resized,
    "Upsample": resized,
}
