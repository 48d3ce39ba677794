"""Tell numbers that programs are written with from numbers that were computed from weights.

A graph is full of constants that a model's code has: epsilons, ``1/sqrt(head_dim)``, ``-65504``, the
factors of GELU. A number that was computed from weights has all the digits of its dtype; a few of a hundred
are taken for written ones by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from lora_export.adapter import Array

# Digits of a decimal that somebody wrote, and the largest denominator of a fraction.
_DIGITS, _DENOMINATOR = 5, 32
# Relative rounding of a float32.
_ROUNDING = 2.0**-22
# Larger numbers are limits and masks, smaller ones epsilons.
_LARGE = 1e4
# Powers are whole numbers up to here: of larger ones too many are near a whole number.
_WHOLE = 4096
_LOG = 10


# Largest relative deviation of a sequence's steps or ratios from equal ones by rounding, and the least number
# of values that have equal ones by no chance.
_STEPS, _TOLD = 1e-4, 4
# What models compute of a parameter's values, each by itself.
FUNCTIONS: tuple[Callable[[Array], Array], ...] = (
    lambda v: v,
    lambda v: 1 + v,
    lambda v: 1 - v,
    np.exp,
    lambda v: 1 / (1 + np.exp(-v)),
    np.tanh,
    np.log1p,
    lambda v: np.log1p(np.exp(v)),
    lambda v: 1 / v,
    lambda v: np.maximum(v, 0),
    np.square,
    lambda v: np.sqrt(np.abs(v)),
    np.abs,
    np.negative,
    lambda v: -np.exp(v),
    lambda v: np.exp(-v),
    # CLIP's limit of its scale.
    lambda v: np.minimum(np.exp(v), 100.0),
)


def is_written(value: float) -> bool:
    """Return whether a number, in float32 or coarser, is one that programs are written with.

    These are limits, powers of 2, decimals of a few digits, small fractions, square and fourth roots of whole
    numbers and one over them, small multiples of π and of ``sqrt(1/π)``, and logarithms of whole numbers.
    """
    size = abs(value)
    if not math.isfinite(size) or size == 0 or size >= _LARGE or size < 1 / _LARGE:
        return True
    if math.frexp(size)[0] == 1 / 2 or math.isclose(float(f"{size:.{_DIGITS}g}"), size, rel_tol=_ROUNDING):
        return True
    if any(map(_is_fraction, (size, size / math.pi, size * math.pi, size**2 * math.pi))):
        return True
    powers = (size**2, size**-2, size**4, size**-4)
    return any(map(_is_whole, powers)) or (size < _LOG and _is_whole(math.exp(size), 2 * _LARGE))


def _is_fraction(size: float) -> bool:
    near = Fraction(size).limit_denominator(_DENOMINATOR)
    return near < 2 * _DENOMINATOR and math.isclose(float(near), size, rel_tol=_ROUNDING)


def _is_whole(size: float, most: float = _WHOLE) -> bool:
    return 1 / 2 < size <= most and math.isclose(round(size), size, rel_tol=4 * _ROUNDING)


def are_steps(values: Array) -> bool:
    """Return whether neighbours in a vector have equal differences or ratios (positions, frequencies).

    Each value may be there several times, and the whole more than once (a sine's and a cosine's).
    """
    found = np.unique(values)
    for one in (values, found) if len(found) >= _TOLD else (values,):
        steps = np.diff(one)
        if np.ptp(steps) <= _STEPS * np.abs(steps).max():
            return True
        if one.all() and np.ptp(one[1:] / one[:-1]) <= _STEPS:
            return True
    return False
