"""Hold what was found by name against the checkpoint's values, and find weights by their values alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_export.adapter import Array
from lora_export.graph import matrix_shape, shape_of, stored_matrix
from lora_export.patch import Placement
from lora_export.sites import content, fit
from lora_export.sites.readers import folded_into_conv, foreign_reader
from lora_export.sites.slot import Use
from lora_export.sites.target import Part, Target

# Kinds whose rows are output channels: a factor on each can be followed (also through DoRA's norms).
_SCALABLE = ("conv", "linear")


def check_content(target: Target, part: Part, wanted: Array) -> Part | str:
    """Compare a part with the checkpoint's weight.

    Returns:
        The part, with the factors of rescaled rows; or what differs.
    """
    if target.experts > 1:
        return part if holds_experts(target, part, wanted) else _differs(part)
    if target.kind == "vector":
        return _check_whole(target, part, wanted)
    (placement,) = part.placements
    start, stop = placement.rows
    stored = canonical_rows(part, placement)
    # A batch norm may rescale some channels, and by little: then a sample of the rows does not tell.
    every = folded_into_conv(target, part) or bool(foreign_reader(target.path, part.uses))
    match = _best(stored, [matrix[start:stop] for matrix in orientations(target, wanted)], every)
    if match.scaled and target.kind in _SCALABLE and (every or not match.same):
        return replace(part, placements=(replace(placement, row_scale=match.row_scale),))
    if match.same:
        return part
    return (
        f"the weight {part.root.name!r} does not hold the checkpoint's values "
        f"(relative difference {match.difference:.2g}, least cosine {match.cosine:.3f})"
    )


def _best(stored: Array, wanted: Sequence[Array], every: bool) -> content.Match:
    """Return how well values match; another orientation is asked where the first one does not agree."""
    first, *others = wanted
    match = content.compare(stored, first, every)
    if others and not match.same:
        return min(match, content.compare(stored, others[0], every), key=lambda match: match.difference)
    return match


def canonical_rows(part: Part, placement: Placement) -> Array:
    """Return the stored rectangle of a placement, in canonical orientation."""
    assert part.root.const_value is not None
    matrix = stored_matrix(part.root.const_value)
    view = matrix.T if placement.transposed else matrix
    offset = placement.col if placement.transposed else placement.row
    start, stop = placement.rows
    return view[offset : offset + stop - start]


def orientations(target: Target, wanted: Array) -> list[Array]:
    """Return the checkpoint's matrix; a square one also transposed: it may be a Conv1D's."""
    matrix = wanted.reshape(target.matrix)
    square = target.kind in ("linear", "any") and wanted.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return [matrix, matrix.T] if square else [matrix]


def _check_whole(target: Target, part: Part, wanted: Array) -> Part | str:
    assert part.root.const_value is not None
    start, stop = part.placements[0].rows
    row = part.placements[0].row
    stored = np.asarray(part.root.const_value.numpy())[row : row + stop - start]
    wanted = wanted[start:stop]
    if folded_into_conv(target, part) and not np.any(wanted):
        return f"the bias {part.root.name!r} was zero: what a folded batch norm made of it can't be known"
    if wanted.shape == stored.shape and content.compare(stored[:, None], wanted[:, None], every=True).same:
        return part
    return _differs(part)


def _differs(part: Part) -> str:
    return f"the weight {part.root.name!r} does not hold the checkpoint's values"


def holds_experts(target: Target, part: Part, wanted: Array) -> bool:
    """Whether the first and the last matrix of a stack are the checkpoint's, in either orientation.

    Args:
        target: The stack.
        part: A constant of ``(experts, …, …)``, or of some rows of one expert: those of the first and the
            last are compared.
        wanted: The checkpoint's first and last, ``(2, …, …)``: all experts at once may be gigabytes.
    """
    assert part.root.const_value is not None
    orientations = (wanted, wanted.swapaxes(-1, -2))
    stored = np.asarray(part.root.const_value.numpy())
    if stored.ndim == 2:
        (placement,) = part.placements
        end = {0: 0, target.experts - 1: 1}.get(placement.expert)
        rows = slice(*placement.rows)
        pairs = [
            (canonical_rows(part, placement), either[end][rows]) for either in orientations if end is not None
        ]
        return end is None or any(
            one.shape == other.shape and content.compare(one, other).same for one, other in pairs
        )
    ends = stored[[0, -1]]
    return any(
        candidate.shape == ends.shape
        and content.compare(
            ends.reshape(-1, ends.shape[-1]), candidate.reshape(-1, ends.shape[-1]), every=False
        ).same
        for candidate in orientations
    )


def search(target: Target, use: Use, wanted: Array, offsets: Sequence[int]) -> Iterator[Part]:
    """Yield where a use's constant holds the target's values: all of it, some rows of it, or some of them.

    Args:
        target: What to look for.
        use: A use of a constant.
        wanted: The target's values in the checkpoint.
        offsets: Where their rows may begin in the constant, or the constant's in them: of what is stacked or
            a vector, nothing needs to be known.
    """
    assert use.root.const_value is not None
    if target.experts > 1:
        placed = fit.place(target, use)
        if not isinstance(placed, str) and holds_experts(target, Part(use.root, (use,), placed), wanted):
            yield Part(use.root, (use,), placed)
        return
    transposed = use.transposed and target.kind != "vector"
    stored = matrix_shape(shape_of(use.root.const_value))
    height, width = stored[::-1] if transposed else stored
    rows, cols = target.matrix
    if width != cols or (target.kind == "vector" and height != rows):
        return
    fused = height >= rows
    for offset in (0,) if target.kind == "vector" else offsets:
        covered = (0, rows) if fused else (offset, offset + height)
        placement = fit.placement_at(offset if fused else 0, covered, transposed)
        checked = check_content(target, Part(use.root, (use,), (placement,)), wanted)
        if not isinstance(checked, str):
            yield checked


def tile(target: Target, parts: Sequence[Part]) -> bool:
    """Whether the parts are the whole target: one of them, or rows that follow each other."""
    row = 0
    for part in parts:
        start, stop = part.placements[0].rows
        if start != row:
            return False
        row = stop
    return row == target.matrix[0]
