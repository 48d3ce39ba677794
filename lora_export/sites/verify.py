"""Hold what was found by name against the checkpoint's values, and find weights by their values alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_export.adapter import Array
from lora_export.graph import stored_matrix
from lora_export.patch import Placement
from lora_export.sites import content, fit
from lora_export.sites.experts import unsettled
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
        return _check_experts(target, part, wanted)
    if target.kind == "vector":
        return _check_whole(target, part, wanted)
    (placement,) = part.placements
    start, stop = placement.rows
    stored = canonical_rows(part, placement)
    # A batch norm may rescale some channels, and by little: then a sample of the rows does not tell.
    every = folded_into_conv(target, part) or bool(foreign_reader(target.path, part.uses))
    matches = [content.compare(stored, matrix[start:stop], every) for matrix in _orientations(target, wanted)]
    match = min(matches, key=lambda match: match.difference)
    if match.scaled and target.kind in _SCALABLE and (every or not match.same):
        return replace(part, placements=(replace(placement, row_scale=match.row_scale),))
    if match.same:
        return part
    return (
        f"the weight {part.root.name!r} does not hold the checkpoint's values "
        f"(relative difference {match.difference:.2g}, least cosine {match.cosine:.3f})"
    )


def canonical_rows(part: Part, placement: Placement) -> Array:
    """Return the stored rectangle of a placement, in canonical orientation."""
    assert part.root.const_value is not None
    matrix = stored_matrix(part.root.const_value)
    view = matrix.T if placement.transposed else matrix
    offset = placement.col if placement.transposed else placement.row
    start, stop = placement.rows
    return view[offset : offset + stop - start]


def _orientations(target: Target, wanted: Array) -> list[Array]:
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


def _check_experts(target: Target, part: Part, wanted: Array) -> Part | str:
    """Compare stacked experts; values tell which way round square ones lie.

    Args:
        target: Which they are.
        part: A constant of ``(experts, …, …)``.
        wanted: The checkpoint's first and last, ``(2, …, …)``: all experts at once may be gigabytes.
    """
    module = target.module
    if module is not None and (reason := unsettled(module, None)):
        return reason
    assert part.root.const_value is not None
    ends = np.asarray(part.root.const_value.numpy())[[0, -1]]
    matches = {
        transposed: content.compare(
            ends.reshape(-1, ends.shape[-1]), candidate.reshape(-1, ends.shape[-1]), every=False
        )
        for transposed, candidate in ((False, wanted), (True, wanted.swapaxes(-1, -2)))
        if candidate.shape == ends.shape
    }
    same = [transposed for transposed, match in matches.items() if match.same]
    if len(same) > 1:
        return f"ambiguous: the experts in {part.root.name!r} are symmetric, their orientation can't be known"
    if not same:
        return _differs(part)
    # Layouts that no shape settles are refused above: what is square lies as the module holds it.
    turned = wanted.shape[1:] != target.shape
    return replace(part, placements=fit.expert_placements(target, same[0] != turned))


def unconfirmed(target: Target) -> str:
    """Why experts can't be placed by their names and shapes alone, or an empty text."""
    square = target.experts > 1 and target.shape[0] == target.shape[1]
    if not square:
        return ""
    return (
        f"the experts' matrices are square {(target.experts, *target.shape)}: whether they are stored "
        "transposed can't be known from their shape; give --checkpoint to compare the values"
    )


def search(target: Target, use: Use, wanted: Array) -> Iterator[Part]:
    """Yield where a use's constant holds the target's values: all of it, some rows of it, or some of them."""
    assert use.root.const_value is not None
    if target.experts > 1:
        placed = fit.place(target, use)
        if isinstance(placed, str):
            return
        checked = check_content(target, Part(use.root, (use,), placed), wanted)
        if not isinstance(checked, str):
            yield checked
        return
    transposed = use.transposed and target.kind != "vector"
    stored = stored_matrix(use.root.const_value)
    view = stored.T if transposed else stored
    rows, cols = target.matrix
    if view.shape[1] != cols or (target.kind == "vector" and len(view) != rows):
        return
    seen: set[int] = set()
    for matrix in _orientations(target, wanted):
        fused = len(view) >= rows
        for offset in content.find_rows(view, matrix) if fused else content.find_rows(matrix, view):
            covered = (0, rows) if fused else (offset, offset + len(view))
            placement = fit.placement_at(offset if fused else 0, covered, transposed)
            checked = check_content(target, Part(use.root, (use,), (placement,)), wanted)
            if not isinstance(checked, str) and offset not in seen:
                seen.add(offset)
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
