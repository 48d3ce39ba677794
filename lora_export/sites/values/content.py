"""Find and verify weights by their values, for graphs without names and with wrong ones.

The values to compare with come from the checkpoint that the graph was made from. Everything here works on
views of stored constants (memory-mapped if external). A few rows may prove that two matrices differ; only all
values prove that they are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array

# A value in another float type differs by rounding (bf16: 2⁻⁹ relative); another value by about 1.4.
SAME = 1e-2
# Below this value float16 has few values left, and converters to float16 raise smaller values to it.
_LEAST = 1e-7
# Smaller differences come from the arithmetic of the dtypes, so that no factor is looked for. Norms that only
# add 1e-5 to a variance of 1 change more.
EXACT = 1e-6
# Least cosine of two rows: with a folded batch norm, a row is the checkpoint's times a factor (cosine ±1).
COSINE = 0.999
# Float types to which weights may have been rounded on the way, and their relative rounding.
_COARSE: tuple[tuple[Any, float], ...] = ((ml_dtypes.bfloat16, 2**-8), (np.float16, 2**-11))
_PROBES = 8
# Number of values that are compared at a time.
_BLOCK = 1 << 20
# Rows and columns of a block of a transposed matrix that is read across its rows: few pages for a processor.
_TILE = 256
# The same where the columns lie apart: lines of memory whose distance is a power of two share a few places of
# a processor's cache, so that few columns are read at once.
_NARROW_TILE = 2048, 16


@dataclass(frozen=True, eq=False)
class Match:
    """Agreement of stored values with a checkpoint's.

    Attributes:
        cosine: Smallest absolute cosine of the compared rows.
        difference: ‖stored − wanted‖ / ‖wanted‖ over the compared rows.
        worst: Largest difference of one value, see `worst_values`.
        row_scale: Factor of each canonical row, if the rows are multiples of the checkpoint's.
    """

    cosine: float
    difference: float
    worst: float
    row_scale: Array | None = None

    @property
    def same(self) -> bool:
        """True if each stored value is the checkpoint's, up to rounding."""
        return self.worst <= SAME

    @property
    def scaled(self) -> bool:
        """True if the stored rows are the checkpoint's times a factor each, and not all factors are 1."""
        return self.difference > EXACT and self.cosine >= COSINE and self.row_scale is not None


def compare(stored: Array, wanted: Array) -> Match:
    """Compare every value of two matrices of the same shape, rows of the canonical weight.

    If they are not equal, a few evenly spaced rows come first: if their directions differ, it is another
    weight.

    Args:
        stored: The graph's values.
        wanted: The checkpoint's.
    """
    if _is_rounded(stored, wanted):
        return Match(1.0, 0.0, 0.0)
    picks = np.unique(np.linspace(0, len(wanted) - 1, 4 * _PROBES).astype(int))
    match = _compare_rows(stored[picks], wanted[picks])
    # Channels that a batch norm has set to zero have no direction.
    if match.cosine < COSINE and np.any(stored[picks]):
        return match
    return _compare_rows(stored, wanted)


def worst_values(stored: Array, wanted: Array, least: float = 0.0) -> Array:
    """Return each row's largest |stored − wanted| against |wanted| and the row's root mean square.

    Args:
        stored: Some rows.
        wanted: The same rows of the checkpoint, in float64.
        least: Difference that is allowed in any case.
    """
    size = np.abs(wanted)
    size += np.sqrt(np.mean(wanted**2, axis=1, keepdims=True))
    gaps = np.maximum(np.abs(stored - wanted) - least, 0)
    return np.asarray((gaps / np.maximum(size, 1e-300)).max(axis=1, initial=0.0))


def step(*values: Array) -> float:
    """Return the relative rounding of the coarsest float type that one of the matrices fits in."""
    return max((size for dtype, size in _COARSE if any(_fits(array, dtype) for array in values)), default=0.0)


def _fits(values: Array, dtype: Any) -> bool:
    """Return True if each value is one of a coarser float type."""
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(block.astype(dtype).astype(np.float32), block)
            for rows in _blocks(values)
            for block in (np.asarray(values[rows], np.float32),)
        )


def least_of(stored: Array) -> float:
    """Return the difference that is allowed for values of this dtype, however small they are."""
    return _LEAST if stored.dtype == np.float16 else 0.0


def _is_rounded(stored: Array, wanted: Array) -> bool:
    """Return True if the stored values are the checkpoint's to the last bit, in the graph's dtype."""
    if stored.strides[0] < stored.strides[1]:
        stored, wanted = stored.T, wanted.T
    # Integers are compared, because numpy compares float16 and moves bfloat16 value by value, which is many
    # times slower.
    bits, given = np.dtype(f"u{stored.dtype.itemsize}"), np.dtype(f"u{wanted.dtype.itemsize}")
    wanted_bits = wanted.view(given)
    height, width = _NARROW_TILE if wanted.strides[0] < wanted.strides[1] else (_TILE, _TILE)
    tiles = (
        (slice(row, row + height), slice(col, col + width))
        for row in range(0, wanted.shape[0], height)
        for col in range(0, wanted.shape[1], width)
    )
    with np.errstate(over="ignore"):
        for tile in tiles:
            rounded = np.ascontiguousarray(wanted_bits[tile]).view(wanted.dtype).astype(stored.dtype)
            if not (np.ascontiguousarray(stored[tile]).view(bits) == rounded.view(bits)).all():
                return False
    return True


def _blocks(matrix: Array) -> Iterator[slice]:
    """Yield slices of a few rows: a whole table of embeddings would take gigabytes in float64."""
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _compare_rows(stored: Array, wanted: Array) -> Match:
    squares, stored_squares, products, differences, worst = _row_sums(stored, wanted)
    norms, stored_norms = np.sqrt(squares), np.sqrt(stored_squares)
    # A row that is zero on both sides agrees; its factor is unknown and does not matter for the base.
    both_zero = (norms == 0) & (stored_norms == 0)
    # A stored row of zeros is the checkpoint's times 0, if other rows show a factor.
    agree = both_zero | ((stored_norms == 0) & bool(stored_norms.any()))
    cosines = np.where(agree, 1.0, np.abs(products) / np.maximum(norms * stored_norms, 1e-300))
    total = float(np.sqrt(squares.sum()))
    difference = float(np.sqrt(differences.sum())) / total if total else float(stored_norms.any())
    scale = None if both_zero.any() else products / np.maximum(squares, 1e-300)
    return Match(float(cosines.min(initial=1.0)), difference, float(worst.max(initial=0.0)), scale)


def blocks(*matrices: Array) -> Iterator[tuple[Array, ...]]:
    """Yield the same few rows of each matrix at a time, in float64."""
    return (tuple(_f64(matrix[rows]) for matrix in matrices) for rows in _blocks(matrices[0]))


def _row_sums(stored: Array, wanted: Array) -> tuple[Array, ...]:
    """Return each row's sums of wanted², stored², stored · wanted and (stored − wanted)², and its worst."""
    found, least = np.zeros((5, len(wanted))), least_of(stored)
    for rows in _blocks(wanted):
        one, other = _f64(wanted[rows]), _f64(stored[rows])
        gap = other - one
        for number, (left, right) in enumerate(((one, one), (other, other), (other, one), (gap, gap))):
            found[number, rows] = np.einsum("ij,ij->i", left, right)
        found[4, rows] = worst_values(other, one, least)
    return tuple(found)


def find_rows(stored: Array, wanted: Array) -> list[int]:
    """Return the rows of ``stored`` (canonical orientation) at which the rows of ``wanted`` may begin.

    Args:
        stored: ``(height, cols)``, at least as high as ``wanted``.
        wanted: ``(rows, cols)``.

    Returns:
        The offsets at which the first row of ``wanted`` that is not zero is found.
    """
    rows = len(wanted)
    whole = len(stored) == rows
    # For equal heights, take a row that a batch norm has not set to zero.
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
