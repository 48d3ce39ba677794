"""Compare weights that were found by name with the checkpoint's values, and find weights by their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_export.adapter import Array
from lora_export.graph.onnx_file import matrix_shape, release, shape_of, stored_matrix
from lora_export.plan import Refusal
from lora_export.sites import fit
from lora_export.sites.experts import unsettled
from lora_export.sites.operand import NORMS, SKIP_NORMS, Use
from lora_export.sites.target import ConstantPart, ExpertStack, Target, Wanted
from lora_export.sites.values import content
from lora_export.sites.values.code_values import CodesMatch, codes_of, compare_codes
from lora_export.sites.values.held import compare_vector
from lora_export.storage.patch import Placement

# Numbers that builders add to the weights of norms that compute x·(1 + w), Gemma's and Nemotron's.
NORM_SHIFT = 1.0
# Kinds whose rows are output channels: a factor on each can be followed (also through DoRA's norms).
_SCALABLE = ("conv", "linear")
# Relative error of float32 values after a tool's factor on them is divided out again.
_ROUNDED = 1e-5
# Least cosine of rows that a factor on each column may have turned.
_RELATED = 0.5


def check_content(
    target: Target, part: ConstantPart, wanted: Wanted, trusted: bool = False
) -> ConstantPart | Refusal:
    """Compare every value of a part with the checkpoint's weight.

    Args:
        target: The parameter.
        part: Part in which it was found.
        wanted: The checkpoint's values.
        trusted: True if the constant's name is an exporter's own, so that zeros of a vector are its own, too.

    Returns:
        The part, with the factors of rescaled rows; or a refusal of kind ``values`` with the difference.
    """
    if isinstance(wanted, ExpertStack):
        return _check_experts(target, part, wanted)
    if target.kind == "vector":
        return _check_whole(target, part, wanted, trusted)
    (placement,) = part.placements
    start, stop = placement.rows
    stored = canonical_rows(part, placement)
    match, rows = _best(stored, [matrix[start:stop] for matrix in orientations(target, wanted)])
    step = content.step(stored, rows) if match.worst > content.EXACT else 0.0
    if match.worst <= max(content.EXACT, step):
        return part
    scale = match.row_scale if match.scaled and target.kind in _SCALABLE else None
    if scale is not None and _explains(stored, rows, scale[:, None], step):
        return replace(part, placements=(replace(placement, row_scale=scale),))
    # Rows of another weight have other directions.
    columns = _column_factor(stored, rows, step) if match.cosine > _RELATED else ""
    return Refusal(
        "values",
        f"the weight {part.root.name!r} does not hold the checkpoint's values (relative difference "
        f"{match.difference:.2g}, least cosine {match.cosine:.3f}{columns})",
    )


def _explains(stored: Array, wanted: Array, factor: Array, step: float) -> bool:
    """Return True if ``wanted · factor``, one for each row or column, equals ``stored`` up to rounding."""
    factors, least = np.broadcast_to(factor, wanted.shape), content.least_of(stored)
    return all(
        bool((content.worst_values(one, other * times, least) <= max(_ROUNDED, step)).all())
        for one, other, times in content.blocks(stored, wanted, factors)
    )


def _column_factor(stored: Array, wanted: Array, step: float) -> str:
    """Return a text if the columns are multiples: a factor on the module's input, which can't be followed."""
    products = np.zeros(wanted.shape[1])
    squares = np.zeros(wanted.shape[1])
    for one, other in content.blocks(stored, wanted):
        products += np.einsum("ij,ij->j", one, other)
        squares += np.einsum("ij,ij->j", other, other)
    if not _explains(stored, wanted, (products / np.maximum(squares, 1e-300))[None, :], step):
        return ""
    return (
        "; its columns are the checkpoint's times a factor each: a tool folded what stands before the module "
        "into it"
    )


def _best(stored: Array, wanted: Sequence[Array]) -> tuple[content.Match, Array]:
    """Return the match and the values of the first orientation that agrees, or of the best one."""
    first, *others = wanted
    match = content.compare(stored, first)
    if others and not match.same:
        other = content.compare(stored, others[0])
        if other.difference < match.difference:
            return other, others[0]
    return match, first


def check_codes(target: Target, part: ConstantPart, wanted: Wanted) -> CodesMatch | None:
    """Compare every value that a quantised constant stands for with the checkpoint's.

    Returns:
        The match of a square matrix's better orientation; None if the codes can't be read, or are an
        expert's.
    """
    if isinstance(wanted, ExpertStack):
        return None
    (placement,) = part.placements
    if target.kind == "vector":
        return compare_vector(part.uses[0], placement.row, wanted[slice(*placement.rows)])
    held = codes_of(part.uses[0])
    if held is None:
        return None
    found = [
        compare_codes(held, placement, matrix[slice(*placement.rows)])
        for matrix in orientations(target, wanted)
    ]
    release(part.root)
    return max(found, key=lambda match: (match.within, match.cosine))


def canonical_rows(part: ConstantPart, placement: Placement) -> Array:
    """Return the stored rectangle of a placement, in canonical orientation."""
    assert part.root.const_value is not None
    return rectangle(stored_matrix(part.root.const_value), placement)


def rectangle(matrix: Array, placement: Placement) -> Array:
    """Return the rectangle of a placement in a stored matrix, in canonical orientation."""
    view = matrix.T if placement.transposed else matrix
    offset = placement.col if placement.transposed else placement.row
    start, stop = placement.rows
    return view[offset : offset + stop - start]


def orientations(target: Target, wanted: Array) -> list[Array]:
    """Return the checkpoint's matrix, and a square one also transposed, because it may be a Conv1D's.

    A whole copy lies as the checkpoint does: its forms are compared one by one (`sites.whole`).
    """
    matrix = wanted.reshape(target.matrix)
    square = target.kind == "linear" and wanted.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return [matrix, matrix.T] if square else [matrix]


def _check_whole(target: Target, part: ConstantPart, wanted: Array, trusted: bool) -> ConstantPart | Refusal:
    assert part.root.const_value is not None
    start, stop = part.placements[0].rows
    row = part.placements[0].row
    stored = np.asarray(part.root.const_value.numpy())[row : row + stop - start]
    wanted = wanted[start:stop]
    if wanted.shape != stored.shape:
        return Refusal("values", _differs(part))
    # As one row, so that a value near zero is compared with the whole vector.
    if _holds(stored[None], wanted[None]):
        if trusted or np.all(wanted):
            return part
        reason = (
            f"the vector {part.root.name!r} has zeros: what a folded norm or factor did to it can't be known"
        )
        return Refusal("values", reason)
    if _is_norm(target, part) and _holds(stored[None], wanted[None], NORM_SHIFT):
        return replace(part, placements=(replace(part.placements[0], shift=NORM_SHIFT),))
    return Refusal("values", _differs(part))


def _is_norm(target: Target, part: ConstantPart) -> bool:
    """Return True if a vector is only read as the weight of norms."""
    norms = NORMS | SKIP_NORMS
    return target.key.endswith(".weight") and all(use.node.op_type in norms for use in part.uses)


def _differs(part: ConstantPart) -> str:
    kind = (
        "vector" if part.root.const_value is not None and len(part.root.const_value.shape) == 1 else "weight"
    )
    return f"the {kind} {part.root.name!r} does not hold the checkpoint's values"


def _check_experts(target: Target, part: ConstantPart, wanted: ExpertStack) -> ConstantPart | Refusal:
    """Compare every matrix of a stack; for square ones the values tell the orientation.

    Args:
        target: Target with a stack of experts.
        part: Part with a constant of ``(experts, …, …)``, or of some rows of one expert.
        wanted: The checkpoint's values.
    """
    module = target.module
    if module is not None and (refusal := unsettled(module, None)):
        return replace(refusal, kind="values")
    assert part.root.const_value is not None
    stored = np.asarray(part.root.const_value.numpy())
    if stored.ndim == 2:
        return _check_expert(target, part, wanted)
    alike = {False, True}
    for expert in range(target.experts):
        held = wanted.matrix(expert)
        alike = {turned for turned in alike if _holds(stored[expert], held.T if turned else held)}
        release(part.root)
        if not alike:
            return Refusal("values", f"{_differs(part)} of expert {expert}")
    if len(alike) > 1:
        reason = f"the experts in {part.root.name!r} are symmetric, their orientation can't be known"
        return Refusal("values", f"ambiguous: {reason}")
    # Layouts that shapes don't settle are refused above, so square ones are as the module holds them.
    turned = wanted.matrix(0).shape != target.shape
    return replace(part, placements=fit.expert_placements(target, (True in alike) != turned))


def _check_expert(target: Target, part: ConstantPart, wanted: ExpertStack) -> ConstantPart | Refusal:
    """Compare some rows of one expert."""
    (placement,) = part.placements
    held = wanted.matrix(placement.expert)
    rows = (held if held.shape == target.shape else held.T)[slice(*placement.rows)]
    if _holds(canonical_rows(part, placement), rows):
        return part
    return Refusal("values", f"{_differs(part)} of expert {placement.expert}")


def _holds(stored: Array, wanted: Array, shift: float = 0.0) -> bool:
    """Return True if a matrix is the checkpoint's plus a number, up to rounding."""
    if stored.shape != wanted.shape:
        return False
    worst = content.compare(stored, wanted.astype(np.float32) + np.float32(shift) if shift else wanted).worst
    return worst <= content.EXACT or worst <= content.step(stored, wanted)


def unconfirmed(target: Target) -> Refusal | None:
    """Return the reason why names and shapes alone can't give experts a site; None if they can."""
    square = target.experts > 1 and target.shape[0] == target.shape[1]
    if not square:
        return None
    return Refusal(
        "unproven",
        f"the experts' matrices are square {(target.experts, *target.shape)}: whether they are stored "
        "transposed can't be known from their shape; give --checkpoint to compare the values",
    )


def search(target: Target, use: Use, wanted: Wanted, offsets: Sequence[int]) -> Iterator[ConstantPart]:
    """Yield the parts of a use's constant that hold the target's values: all, some rows, or some of them.

    Args:
        target: Target to look for.
        use: A use of a constant.
        wanted: The target's values in the checkpoint.
        offsets: Rows at which the values may begin in the constant, or the constant in them; not needed for
            stacks and vectors.
    """
    assert use.root.const_value is not None
    if target.experts > 1:
        placed = fit.place(target, use)
        if isinstance(placed, Refusal):
            return
        checked = check_content(target, ConstantPart(use.root, (use,), placed), wanted)
        if not isinstance(checked, Refusal):
            yield checked
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
        checked = check_content(target, ConstantPart(use.root, (use,), (placement,)), wanted)
        if not isinstance(checked, Refusal):
            yield checked


def tile(target: Target, parts: Sequence[ConstantPart]) -> bool:
    """Return True if the parts are the whole target: one of them, or rows that follow each other."""
    row = 0
    for part in parts:
        start, stop = part.placements[0].rows
        if start != row:
            return False
        row = stop
    return row == target.matrix[0]
