"""Describe an adapter's change of a stored tensor: low-rank rectangles, whatever its layout.

A stored tensor is viewed as a matrix: its first axis is the rows, or its first two for stacked experts.
A `Placement` is the rectangle that holds (a part of) a module's canonical weight; a `Patch` is the change of
that rectangle. Merging then needs no knowledge of layers, exporters or file formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.adapter import Array, LoraModule


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """The place of rows of a canonical weight in a stored matrix.

    Attributes:
        rows: Range of canonical rows that this tensor holds (only some for a split weight).
        row: First stored row of the rectangle.
        col: First stored column.
        transposed: True if it is stored as ``(in_dim, out_dim)``.
        row_scale: Factor per canonical row in ``rows`` that an exporter folded in (batch norm).
        expert: Index among a parameter's stacked matrices.
        shift: Number that an exporter added to each value.
    """

    rows: tuple[int, int]
    row: int = 0
    col: int = 0
    transposed: bool = False
    row_scale: Array | None = None
    expert: int = 0
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """The change of the rectangle ``[row : row + height, col : col + width]`` of a stored matrix.

    The new values are ``W + left @ right``; with ``magnitude`` (DoRA) these are then scaled to the norm
    ``magnitude`` along ``magnitude_axis``. With ``values`` the rectangle is replaced.

    Attributes:
        label: Module path, for reports.
        left: ``(height, rank)``, scaling folded in.
        right: ``(rank, width)``.
        magnitude: One norm per stored row (``magnitude_axis`` 0) or per stored column (1).
        values: New values ``(height, width)`` instead of a sum.
    """

    label: str
    row: int
    col: int
    height: int
    width: int
    left: Array | None = None
    right: Array | None = None
    magnitude: Array | None = None
    magnitude_axis: int = 0
    values: Array | None = None


def patch_from(
    module: LoraModule, placement: Placement, weight: float = 1.0, dtype: type[np.floating] = np.float32
) -> Patch:
    """Return the change that ``module`` makes to its weight at ``placement``.

    Args:
        module: The trained factors.
        placement: The rectangle.
        weight: Factor on the delta, for blends of adapters.
        dtype: float32, or float64 if the base is float64.
    """
    left, right = module.factors(placement.expert, dtype)
    start, stop = placement.rows
    left = left[start:stop] * dtype(weight)
    magnitude, axis = module.magnitude, module.magnitude_axis
    if magnitude is not None:
        magnitude = magnitude.astype(dtype).reshape(-1)
        if axis == 0:
            magnitude = magnitude[start:stop]
    if placement.row_scale is not None:
        left = left * placement.row_scale.astype(dtype)[:, None]
        if magnitude is not None and axis == 0:
            # Row i holds s_i * W_i: its norm is |s_i| times the norm that the magnitude is for.
            magnitude = magnitude * np.abs(placement.row_scale.astype(dtype))
    if placement.transposed:
        left, right, axis = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T), 1 - axis
    return Patch(
        label=module.path if module.parameter == "weight" else f"{module.path}.{module.parameter}",
        row=placement.row,
        col=placement.col,
        height=left.shape[0],
        width=right.shape[1],
        left=left,
        right=right,
        magnitude=magnitude,
        magnitude_axis=axis,
    )


def replacement(label: str, values: Array, row: int = 0, col: int = 0) -> Patch:
    """Return the patch that puts the matrix ``values`` at ``(row, col)``."""
    matrix = values if values.ndim == 2 else values.reshape(values.shape[0], -1)
    return Patch(label=label, row=row, col=col, height=matrix.shape[0], width=matrix.shape[1], values=matrix)


def join(patches: Sequence[Patch]) -> list[Patch]:
    """Join low-rank patches of the same rectangle into one (a blend of adapters is one longer product)."""
    joined: dict[tuple[int, int, int, int], Patch] = {}
    rest: list[Patch] = []
    for patch in patches:
        key = (patch.row, patch.col, patch.height, patch.width)
        if patch.left is None or patch.right is None or patch.magnitude is not None:
            rest.append(patch)
        elif key not in joined:
            joined[key] = patch
        else:
            first = joined[key]
            assert first.left is not None
            assert first.right is not None
            joined[key] = replace(
                first,
                left=np.hstack([first.left, patch.left]),
                right=np.vstack([first.right, patch.right]),
            )
    return [*joined.values(), *rest]
