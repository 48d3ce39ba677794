"""Does a target fit into a stored tensor, and where?"""

from __future__ import annotations

from lora_export.graph import matrix_shape, shape_of
from lora_export.patch import Placement
from lora_export.sites.slot import Use
from lora_export.sites.target import Target


def accepts(target: Target, use: Use) -> bool:
    """Whether a use is of the kind that the target's module makes."""
    assert use.root.const_value is not None
    rank, kind = len(use.root.const_value.shape), use.slot.kind
    if target.kind == "vector":
        return rank == 1 and kind in ("vector", "other")
    if target.kind == "parameter":
        return rank == (3 if target.experts > 1 else len(target.shape)) and kind != "vector"
    if target.kind == "any":
        return rank == len(target.shape) and kind in ("linear", "conv", "embedding", "other")
    return kind == target.kind


def stored_shape(target: Target, use: Use) -> tuple[int, int]:
    """Shape of the stored tensor as a matrix."""
    assert use.root.const_value is not None
    return matrix_shape(shape_of(use.root.const_value), stacked=target.experts > 1)


def place(target: Target, use: Use, part: tuple[int, int] | None = None) -> tuple[Placement, ...] | str:
    """Return where the target lies in the use's constant, or what does not fit.

    Args:
        target: The parameter.
        use: A use of the constant.
        part: ``(position, count)`` of the target inside a fused weight.
    """
    assert use.root.const_value is not None
    if target.kind == "parameter" and target.experts > 1:
        return _place_experts(target, shape_of(use.root.const_value))
    rows, cols = target.matrix
    shape = shape_of(use.root.const_value)
    if target.kind == "conv" and shape != target.shape:
        return f"the graph's weight is {shape}, the adapter's {target.shape}"
    stored = stored_shape(target, use)
    transposed = use.transposed and target.kind != "vector"
    height, width = (stored[1], stored[0]) if transposed else stored
    if width != cols or (height != rows and part is None):
        return f"the graph's weight is {(height, width)}, the adapter's {target.matrix}"
    offset = 0 if part is None else _fused_offset(height, rows, *part)
    if offset is None:
        return f"the graph's fused weight has {height} rows, which {rows} rows at {part} do not fit"
    return (placement_at(offset, (0, rows), transposed),)


def placement_at(offset: int, rows: tuple[int, int], transposed: bool) -> Placement:
    """Return the placement of canonical ``rows`` that start at ``offset`` along the stored output axis."""
    return Placement(rows, 0 if transposed else offset, offset if transposed else 0, transposed)


def _fused_offset(height: int, rows: int, position: int, count: int) -> int | None:
    """First row of a part: halves are equal; of q, k, v the last two are equal (grouped-query attention)."""
    if count == 2:
        return position * rows if height == 2 * rows else None
    if position == 0:
        return 0 if height > rows and (height - rows) % 2 == 0 else None
    queries = height - 2 * rows
    return (queries if position == 1 else queries + rows) if queries > 0 else None


def _place_experts(target: Target, shape: tuple[int, ...]) -> tuple[Placement, ...] | str:
    rows, cols = target.shape
    direct, swapped = (target.experts, rows, cols), (target.experts, cols, rows)
    if shape not in (direct, swapped):
        return f"the graph's weight is {shape}, the adapter's {direct} or {swapped}"
    if rows == cols:
        return f"the experts' matrices are square {shape}: whether they are stored transposed can't be known"
    transposed = shape != direct
    return tuple(
        Placement((0, rows), row=expert * shape[1], transposed=transposed, expert=expert)
        for expert in range(target.experts)
    )
