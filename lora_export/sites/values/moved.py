"""Find constants that are a checkpoint's parameters, moved: transposed, packed, picked rows, times a factor.

A constant with one axis may also be a function of each value of a parameter (1 + w, exp w), which keeps their
order; so does no answer of more than a few values by chance.

This explains a constant; it doesn't find sites. So one vector of it that is a parameter's row is enough: a
computed answer has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.onnx_file import release
from lora_export.sites.target import BaseWeights
from lora_export.sites.values.numbers import FUNCTIONS

# Least cosine of two vectors that are equal up to rounding to another float type or a factor.
_SAME = 0.9999
# Fewer values may be alike by chance.
_SHORTEST = 8
# Number of columns that are compared first.
_COLUMNS = 64
# Largest number of different values of a mask, or of a vector that tells nothing.
FEW = 4
# Largest number of vectors whose values a tool joins: an LSTM's biases, in two directions.
_JOINED = 4
# Largest number of values of a table of which all are compared with a constant's.
_SMALL = 1 << 20
# Number of values that are read at a time.
_BLOCK = 1 << 20
# Number of bytes of a mapped file that are read before they are released.
_MAPPED_BYTES = 64 << 20
_HALVES = {np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}


def moved_parameters(constants: Iterable[ir.Value], base: BaseWeights, changed: Set[str]) -> set[int]:
    """Return the identities of the constants that a parameter of the checkpoint explains.

    Args:
        constants: Constants of a graph.
        base: The checkpoint.
        changed: Parameters that an adapter changes: a vector is never another end of their ties.
    """
    left = {id(value): value for value in constants}
    vectors = {key: _vectors(value) for key, value in left.items()}
    single = {key for key, value in left.items() if has_one_axis(value)}
    found: set[int] = set()
    # What costs least goes first: most constants are whole parameters.
    for explain in (_with_first_row, _with_row, _with_order):
        if not left.keys() - found:
            break
        for name in base.shapes:
            told = found | single if name in changed else found
            found |= explain(base.values(name), {k: v for k, v in vectors.items() if k not in told})
    found |= _picked([value for key, value in left.items() if key not in found], base, changed)
    return found | _packed([value for key, value in left.items() if key not in found], base, changed)


def _packed(constants: Sequence[ir.Value], base: BaseWeights, changed: Set[str]) -> set[int]:
    """Return the constants that are vectors of the checkpoint: side by side (a pack's bias), or joined."""
    names = [n for n, shape in base.shapes.items() if math.prod(shape) == max(shape, default=0)]
    pieces = [
        np.asarray(base.values(n), np.float64).reshape(-1) for n in names if constants and n not in changed
    ]
    found: set[int] = set()
    for constant in constants:
        assert constant.const_value is not None
        if constant.const_value.size > _SMALL:
            continue
        values = np.asarray(constant.const_value.numpy()).reshape(-1)
        if values.dtype == np.float32 and _are_joined(values, pieces):
            found.add(id(constant))
        if not has_one_axis(constant):
            continue
        rounding = 1e-2 if values.dtype.itemsize == 2 else 1e-5
        rest = values.astype(np.float64)
        while len(rest) and (size := _piece(rest, pieces, rounding)):
            rest = rest[size:]
        if not len(rest):
            found.add(id(constant))
    return found


def _are_joined(values: Array, pieces: Sequence[Array]) -> bool:
    """Return True if a few vectors have all of the values: gates in another order (the bias of an LSTM)."""
    left = np.unique(values)
    if len(left) <= FEW:
        return False
    for _ in range(_JOINED):
        left = min((left[~np.isin(left, one.astype(np.float32))] for one in pieces), key=len, default=left)
    return not len(left)


def _piece(values: Array, pieces: Sequence[Array], rounding: float) -> int:
    """Return the length of the longest of some vectors that values begin with, or 0."""
    fitting = (one for one in pieces if len(one) <= len(values))
    return max((len(one) for one in fitting if np.allclose(values[: len(one)], one, rounding)), default=0)


def has_one_axis(value: ir.Value) -> bool:
    """Return True if all values of a constant lie along one axis."""
    assert value.const_value is not None
    return max(value.const_value.shape.numpy(), default=1) == value.const_value.size


def _vectors(value: ir.Value) -> list[Array]:
    """Return a constant's first vector along each of its axes, and its first kernel, of length 1."""
    assert value.const_value is not None
    values = np.asarray(value.const_value.numpy())
    firsts = [np.moveaxis(values, axis, -1)[(0,) * (values.ndim - 1)] for axis in range(values.ndim)]
    if values.ndim > 2:
        firsts.append(values[0].reshape(-1))
    made = [_unit(_copied(value, vector)) for vector in firsts]
    release(value)
    return [vector for vector in made if vector is not None]


def _unit(vector: Array) -> Array | None:
    # A mask's smallest float32 has a square that float32 can't hold.
    length = np.linalg.norm(vector.astype(np.float64))
    return vector / length if len(vector) >= _SHORTEST and length > 0 else None


def lines_of(value: ir.Value) -> list[Array]:
    """Return some vectors of a constant, of length 1: three along its last axis, the first along the others.

    One with a few different values only (a mask) is left out.
    """
    assert value.const_value is not None
    values = np.asarray(value.const_value.numpy())
    rows = values.reshape(-1, values.shape[-1])
    lines = [rows[at] for at in sorted({0, len(rows) // 2, len(rows) - 1})] if rows.size else []
    lines += [np.moveaxis(values, axis, -1)[(0,) * (values.ndim - 1)] for axis in range(values.ndim - 1)]
    made = [_unit(_copied(value, line)) for line in lines if line.size]
    release(value)
    return [line for line in made if line is not None and len(np.unique(line)) > FEW]


def first_as_row(rows: Array, vectors: Sequence[Array]) -> int | None:
    """Return the number of the first of vectors of length 1 that has the direction of a row, or None.

    A few columns are compared first, the same ones for all vectors.
    """
    width = rows.shape[1]
    columns = np.arange(0, width, max(1, width // _COLUMNS))
    heads = np.stack([vector[columns] for vector in vectors])
    sizes = np.linalg.norm(heads, axis=1)
    own = np.asarray(rows[:, columns], np.float32)
    lengths = np.linalg.norm(own, axis=1)
    alike = np.abs(own @ heads.T) >= _SAME * np.outer(lengths, sizes)
    for number, (vector, near, size) in enumerate(zip(vectors, alike.T, sizes, strict=True)):
        # Where a vector is zero at all of the columns, they say nothing of it.
        found = np.flatnonzero(near & (lengths > 0)) if size > 0 else np.arange(len(rows))
        if len(found) and _holds(rows[found], vector):
            return number
    return None


def same_order(values: Array, vector: Array) -> bool:
    """Return True if a vector rises, or falls, wherever a parameter's values do."""
    if values.size != vector.size or len(np.unique(values)) <= FEW:
        return False
    steps = np.diff(np.asarray(values, np.float32).reshape(-1)[np.argsort(vector, kind="stable")])
    # Values that rounding has made equal have no order.
    least = 1e-3 * float(np.abs(steps).sum())
    return bool((steps >= -least).all() or (steps <= least).all())


def _copied(value: ir.Value, line: Array) -> Array:
    """Return a line of a constant in float32, read in pieces: across rows each value is in another page."""
    step = max(1, _MAPPED_BYTES // max(1, *line.strides))
    pieces = []
    for start in range(0, len(line), step):
        pieces.append(line[start : start + step].astype(np.float32))
        release(value)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _with_first_row(values: Array, vectors: Mapping[int, list[Array]]) -> set[int]:
    """Return the identities of constants with a vector that is a parameter's first row or kernel."""
    return _with_row(values, vectors, slice(1))


def _with_row(values: Array, vectors: Mapping[int, list[Array]], rows: slice = slice(None)) -> set[int]:
    """Return the identities of constants with a vector that is one of some rows of a parameter.

    Args:
        values: Values of the parameter.
        vectors: Identity of a constant → its vectors.
        rows: The rows, or kernels, that are compared.
    """
    if not values.size or not values.ndim:
        return set()
    forms = [values.reshape(-1, values.shape[-1])[rows]]
    if values.ndim > 2:
        forms.append(values.reshape(len(values), -1)[rows])
        # A weight norm along the last axis keeps only directions across it (wav2vec2's positions).
        forms.append(values.reshape(len(values), -1).T[rows])
    return {
        key
        for key, mine in vectors.items()
        if any(len(vector) == form.shape[1] and _holds(form, vector) for vector in mine for form in forms)
    }


def _with_order(values: Array, vectors: Mapping[int, list[Array]]) -> set[int]:
    """Return the identities of constants that are one vector, in the order of a parameter's values."""
    return {key for key, mine in vectors.items() if len(mine) == 1 and same_order(values, mine[0])}


def _holds(rows: Array, vector: Array) -> bool:
    step = max(1, _BLOCK // len(vector))
    for start in range(0, len(rows), step):
        block = np.asarray(rows[start : start + step], np.float32)
        lengths = np.linalg.norm(block, axis=1)
        if (np.abs(block @ vector) >= _SAME * lengths)[lengths > 0].any():
            return True
    return False


def _picked(constants: Iterable[ir.Value], base: BaseWeights, changed: Set[str]) -> set[int]:
    """Return the constants that have only values of one small parameter: entries picked from a table.

    A 16-bit float has so few values that a subset is not evidence: it must be all of them.
    """
    left: dict[int, Array] = {}
    for value in constants:
        assert value.const_value is not None
        left[id(value)] = np.unique(np.asarray(value.const_value.numpy()))
        release(value)
    found: set[int] = set()
    for name, shape in base.shapes.items() if left else ():
        if math.prod(shape) > _SMALL or name in changed:
            continue
        values = base.values(name)
        entries = cache(partial(_entries, values))
        for key, mine in left.items():
            if len(mine) <= FEW and values.size <= FEW and _is_function(values, mine):
                found.add(key)
            if key in found or len(mine) > values.size:
                continue
            other = entries(mine.dtype)
            coarse = {mine.dtype, values.dtype} & _HALVES
            if np.array_equal(other, mine) if coarse else np.isin(mine, other).all():
                found.add(key)
    return found


def _is_function(values: Array, mine: Array) -> bool:
    """Return True if a few numbers are a function of a few of a checkpoint (CLIP's exp(logit_scale))."""
    with np.errstate(all="ignore"):
        exact = np.asarray(values, np.float64).reshape(-1)
        images = np.concatenate([function(exact) for function in FUNCTIONS])
        rounding = 1e-3 if mine.dtype in _HALVES else 1e-5
        near = np.isclose(np.asarray(mine, np.float64)[:, None], images[None], rtol=rounding)
    return bool(near.any(axis=1).all())


def _entries(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        return np.unique(values.astype(dtype))
