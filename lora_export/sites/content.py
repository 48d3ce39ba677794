"""Find and verify weights by their values, for graphs whose names are gone and for names that lie.

The values to compare with come from the checkpoint that the graph was made of. Everything here works on
views of stored constants (memory-mapped where external) and reads a few rows of each unless it must search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_export.adapter import Array

# The same weight in another float type differs by rounding (bf16: 2⁻⁹ relative); another weight by about 1.4.
SAME = 1e-2
# Less than this is the arithmetic of the types in use: no factor is looked for. Norms that do nothing but
# add 1e-5 to a variance of 1 change more.
EXACT = 1e-6
# Directions: a row of a folded batch norm is the checkpoint's row times a factor, so its cosine is ±1.
COSINE = 0.999
_PROBES = 8
# Values that are compared at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Match:
    """How well stored values are a checkpoint's.

    Attributes:
        cosine: Smallest absolute cosine of the compared rows.
        difference: ‖stored − wanted‖ / ‖wanted‖ over the compared rows.
        row_scale: Factor per canonical row, where the rows are multiples of the checkpoint's.
    """

    cosine: float
    difference: float
    row_scale: Array | None = None

    @property
    def same(self) -> bool:
        """The stored values are the checkpoint's, up to rounding."""
        return self.difference <= SAME

    @property
    def scaled(self) -> bool:
        """The stored rows are the checkpoint's times a factor each, and not all factors are 1."""
        return self.difference > EXACT and self.cosine >= COSINE and self.row_scale is not None


def compare(stored: Array, wanted: Array, every: bool = False) -> Match:
    """Compare two matrices of the same shape, rows of the canonical weight.

    A few evenly spaced rows are enough to tell the same weight; all are read where rows were rescaled.

    Args:
        stored: The graph's values.
        wanted: The checkpoint's.
        every: Read all rows in any case.
    """
    if not every:
        picks = np.unique(np.linspace(0, len(wanted) - 1, 4 * _PROBES).astype(int))
        match = _compare_rows(stored[picks], wanted[picks])
        if match.same or match.cosine < COSINE:
            return match
    return Match(1.0, 0.0) if _is_rounded(stored, wanted) else _compare_rows(stored, wanted)


def _is_rounded(stored: Array, wanted: Array) -> bool:
    """Whether the stored values are the checkpoint's to the last bit, in the graph's dtype."""
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(stored[rows], wanted[rows].astype(stored.dtype)) for rows in _blocks(wanted)
        )


def _blocks(matrix: Array) -> Iterator[slice]:
    """Yield a few rows at a time: a whole table of embeddings would take gigabytes in float64."""
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _compare_rows(stored: Array, wanted: Array) -> Match:
    squares, stored_squares, products, differences = _row_sums(stored, wanted)
    norms, stored_norms = np.sqrt(squares), np.sqrt(stored_squares)
    # A row that is zero on both sides agrees; its factor can't be known and does not matter for the base.
    both_zero = (norms == 0) & (stored_norms == 0)
    # A stored row of zeros is the checkpoint's times 0, as long as other rows are there to show a factor.
    agree = both_zero | ((stored_norms == 0) & bool(stored_norms.any()))
    cosines = np.where(agree, 1.0, np.abs(products) / np.maximum(norms * stored_norms, 1e-300))
    total = float(np.sqrt(squares.sum()))
    difference = float(np.sqrt(differences.sum())) / total if total else float(stored_norms.any())
    scale = None if both_zero.any() else products / np.maximum(squares, 1e-300)
    return Match(float(cosines.min(initial=1.0)), difference, scale)


def _row_sums(stored: Array, wanted: Array) -> tuple[Array, Array, Array, Array]:
    """Return the sums of wanted², stored², stored · wanted and (stored − wanted)² of each row, in float64."""
    sums = np.zeros((4, len(wanted)))
    for rows in _blocks(wanted):
        one, other = _f64(wanted[rows]), _f64(stored[rows])
        gap = other - one
        for number, (left, right) in enumerate(((one, one), (other, other), (other, one), (gap, gap))):
            sums[number, rows] = np.einsum("ij,ij->i", left, right)
    return sums[0], sums[1], sums[2], sums[3]


def find_rows(stored: Array, wanted: Array) -> list[int]:
    """Return at which rows of ``stored`` (canonical orientation) the rows of ``wanted`` may begin.

    Args:
        stored: ``(height, cols)``, at least as high as ``wanted``.
        wanted: ``(rows, cols)``.

    Returns:
        The offsets at which the first row of ``wanted`` that is not zero is found.
    """
    rows = len(wanted)
    whole = len(stored) == rows
    # Of equal heights, a row that a batch norm has not set to zero.
    probe = next((i for i in range(rows) if np.any(wanted[i]) and (not whole or np.any(stored[i]))), None)
    if probe is None:
        return []
    vector = _f32(wanted[probe])
    stored32 = _f32(stored[probe : len(stored) - rows + probe + 1])
    norms = np.linalg.norm(stored32, axis=1) * np.linalg.norm(vector)
    cosines = np.abs(stored32 @ vector) / np.maximum(norms, 1e-30)
    return [int(offset) for offset in np.flatnonzero(cosines >= COSINE)]


def _f64(values: Array) -> Array:
    return np.array(values, dtype=np.float64, order="C")


def _f32(values: Array) -> Array:
    return np.asarray(values, dtype=np.float32)
