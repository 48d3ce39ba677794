"""Quantise weights that are stored as eight-bit codes with a scale for each block: value = code · scale.

A block is the whole tensor, a row, a rectangle (DeepSeek-V3's 128 × 128, arXiv:2412.19437, 3.3), or any other
grid. Codes are float8 or int8. Changed blocks are quantised again by the rule that the tensor itself shows:

- the largest code of each block is the largest of the type: scale = max|value| / that code;
- the same with scales that are powers of two (``ue8m0``): the next power of two above it;
- otherwise the scale was chosen by another rule: it stays, unless a value no longer fits.

Unchanged blocks keep their codes and their scale, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array

# Largest code of each type, and the lower limit of a tensor's largest code if its scale was fitted to it:
# float8_e4m3fnuz ends at 240, and some tools leave room below the end.
_LARGEST: dict[np.dtype[Any], tuple[float, float]] = {
    np.dtype(ml_dtypes.float8_e4m3fn): (448.0, 240.0),
    np.dtype(ml_dtypes.float8_e5m2): (57344.0, 28672.0),
    np.dtype(np.int8): (127.0, 120.0),
}
# A fitted scale leaves the largest code within this share of the end (rounding of codes and scales).
_FULL = 0.9
_HALF = 0.45
_USUAL_BLOCK = 128


def grid_of(
    shape: Sequence[int], scales: Sequence[int], blocks: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Return how many elements along each axis share a scale, or None if the shapes are ambiguous.

    Args:
        shape: The weight's shape.
        scales: The shape of its scales.
        blocks: Sizes of blocks along the last axes, if a config states them.
    """
    if not scales or all(size == 1 for size in scales):
        return tuple(shape)
    if len(scales) == 1:
        scales = (*scales, *[1] * (len(shape) - 1))
    if len(scales) != len(shape):
        return None
    given: list[int] = [0] * (len(shape) - len(blocks)) + list(blocks)
    found = [_along(*axis) for axis in zip(shape, scales, given, strict=True)]
    return None if None in found else tuple(size for size in found if size is not None)


def _along(size: int, count: int, given: int) -> int | None:
    if count < 1:
        return None
    if count in (1, size):
        return size // count
    fitting = {block for block in (given or _USUAL_BLOCK,) if -(-size // block) == count}
    if not given and size % count == 0:
        fitting.add(size // count)
    return fitting.pop() if len(fitting) == 1 else None


def dequantise(codes: Array, scales: Array, grid: Sequence[int]) -> Array:
    """Return code · scale in float32, in the shape of ``codes``."""
    values: Array = codes.astype(np.float32)
    values *= _spread(scales.astype(np.float32), values.shape, grid)
    return values


def requantise(
    values: Array, before: Array, codes: Array, scales: Array, grid: Sequence[int]
) -> tuple[Array, Array]:
    """Return new codes and new scales, in the types and shapes of the old ones.

    Args:
        values: New values, float32, in the shape of ``codes``.
        before: Old values: ``dequantise(codes, scales, grid)``.
        codes: The old codes.
        scales: The old scales.
        grid: Elements that share a scale, along each axis.
    """
    old = scales.astype(np.float32).reshape(_counts(codes.shape, grid))
    changed = _reduced(np.logical_or, values != before, grid)
    largest = _reduced(np.maximum, np.abs(values), grid)
    fitted = _fitted(largest, _reduced(np.maximum, np.abs(codes.astype(np.float32)), grid), old, codes.dtype)
    new = np.where(changed, _storable(fitted, scales.dtype), old)
    end = _LARGEST[codes.dtype][0]
    spread = _spread(new, values.shape, grid)
    ratio = np.divide(values, spread, out=np.zeros_like(values), where=spread != 0)
    if codes.dtype == np.int8:
        ratio = np.rint(ratio)
    made = np.clip(ratio, -end, end).astype(codes.dtype)
    kept = ~_spread(changed, values.shape, grid)
    made[kept] = codes[kept]
    return made, new.astype(scales.dtype).reshape(scales.shape)


def _fitted(largest: Array, largest_codes: Array, old: Array, dtype: np.dtype[Any]) -> Array:
    """Return the scale of each block by the rule that the old ones show."""
    end, least = _LARGEST[dtype]
    used = largest_codes[largest_codes > 0]
    top = float(used.max()) if used.size else 0.0
    mantissas = np.frexp(old)[0]
    if used.size and bool((mantissas[largest_codes > 0] == 0.5).all()) and np.median(used) > _HALF * end:
        exact = np.maximum(largest / end, np.finfo(np.float32).tiny)
        return np.where(largest > 0, np.exp2(np.ceil(np.log2(exact))), old).astype(np.float32)
    if top >= least and float(used.min()) >= _FULL * top:
        return np.where(largest > 0, largest / np.float32(top), old).astype(np.float32)
    return np.maximum(old, largest / np.float32(end))


def _storable(scales: Array, dtype: np.dtype[Any]) -> Array:
    """Round scales to the type they are stored in."""
    return scales.astype(dtype).astype(np.float32)


def _counts(shape: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // block) for size, block in zip(shape, grid, strict=True))


def _spread(blocks: Array, shape: Sequence[int], grid: Sequence[int]) -> Array:
    """Return one value for each element, or an array that broadcasts to that."""
    spread = blocks.reshape(_counts(shape, grid))
    for axis, (size, block) in enumerate(zip(shape, grid, strict=True)):
        if block not in (1, size):
            spread = np.repeat(spread, block, axis=axis).take(range(size), axis=axis)
    return np.broadcast_to(spread, tuple(shape))


def _reduced(operation: Callable[..., Any], values: Array, grid: Sequence[int]) -> Array:
    """Return one value for each block."""
    for axis, block in enumerate(grid):
        starts = np.arange(0, values.shape[axis], block)
        values = operation.reduceat(values, starts, axis=axis)  # type: ignore[attr-defined]
    return values


def looks_scaled(codes: Array) -> bool:
    """Return whether float8 values are so close to the end of their type that they must be scaled codes."""
    largest = _LARGEST.get(codes.dtype)
    if largest is None or not codes.size:
        return False
    # By the bits without the sign: these types are ordered like integers.
    top = np.uint8(codes.view(np.uint8).reshape(-1).__and__(np.uint8(0x7F)).max())
    return float(np.array([top], np.uint8).view(codes.dtype)[0]) >= largest[1]
