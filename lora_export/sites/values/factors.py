"""Explain the factor and the shift that a tool has folded into another layer, by the checkpoint's parameters.

A layer computes ``W·x + b``; behind it a tool may have folded ``f·(W·x + b) + d``, a number for each row. Of
models that no adapter changes there f and d are

1. a number that somebody wrote into the code, one that a few rows have each, or a sequence of equal steps;
2. a vector of the checkpoint: times a number, through a usual function, or in the same order (a function that
   is not known here keeps it); a shift may be a row of a table, and a factor may stand behind it;
3. the lengths of the weight's rows, divided out again and replaced by others (weight norm); or
4. a batch norm's: ``f = γ/√(σ² + ε)``, ``d = β − f·μ``.

Behind 3 and 4 there may be a number or a vector more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import prod

import numpy as np

from lora_export.adapter import Array
from lora_export.sites.target import BaseWeights
from lora_export.sites.values.moved import FEW, same_order
from lora_export.sites.values.numbers import FUNCTIONS, are_steps, is_written

# Number of values whose order is no chance, among as many vectors as a checkpoint has.
_ORDERED = 10
# Usual numbers that a batch norm adds to the variance; others are tried where nothing else is in the factor.
_EPSILONS = (1e-5, 1e-3, 1e-6)
# Names of the lengths that PyTorch's weight norms give to rows, the new one's and the old one's.
_LENGTHS = (".parametrizations.weight.original0", ".weight_g")
# Number of explanations of a factor with which a shift is looked for in all tables.
_TRIED = 4
# Relative rounding of a norm's factor in float32.
_ROUNDING = 1e-5
# Coarser values than float32 don't tell which number they were.
_EXACT = 1e-4
# Least number of times that a comparison's limit is the rounding of one value.
_TIMES = 8
# Number of values of a table that are compared at a time.
_BLOCK = 1 << 20
_SAME = 0.999


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerChange:
    """Difference of a layer's parameters from the checkpoint's: ``f·W`` and ``f·b + d``.

    Attributes:
        factor: ``f``, one value for each row of the weight that is not zero.
        shift: ``d``, of the same rows.
        bias: ``b``, of the same rows.
        lengths: Function that returns the lengths of the checkpoint's rows.
        size: Number of all rows.
        rows: The rows.
        rounding: Largest relative difference by rounding.
        scale: Size of the bias's terms, of which ``d`` is a difference.
    """

    factor: Array
    shift: Array
    bias: Array
    lengths: Callable[[], Array]
    size: int
    rows: Array
    rounding: float
    scale: float

    @property
    def is_none(self) -> bool:
        """True if the layer has the checkpoint's own parameters."""
        return bool(np.abs(self.factor - 1).max(initial=0) <= self.rounding) and not self.is_shifted

    @property
    def is_shifted(self) -> bool:
        """True if the bias has got more than the factor."""
        return bool(np.abs(self.shift).max(initial=0) > self.rounding * self.scale)


@dataclass(frozen=True, eq=False)
class _Norm:
    """Factor ``scale`` and shift ``bias − f·mean`` of a norm; of none: 1 and 0."""

    scale: Array
    bias: Array
    mean: Array


class Explainer:
    """A checkpoint's vectors, by which changes are explained.

    Args:
        base: The checkpoint.
        changed: Names of tensors that the adapter changes, which explain nothing.
    """

    def __init__(self, base: BaseWeights, changed: Set[str]) -> None:
        self._base, self._changed = base, changed
        self._vectors: dict[int, dict[str, Array]] = {}

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._base.shapes

    def _vectors_of(self, size: int) -> Mapping[str, Array]:
        """Return the vectors with as many values, by name."""
        if size not in self._vectors:
            names = [n for n, shape in self._shapes.items() if prod(shape) == max(shape, default=1) == size]
            self._vectors[size] = {
                name: np.asarray(self._base.values(name), np.float64).reshape(-1)
                for name in names
                if name not in self._changed
            }
        return self._vectors[size]

    def unexplained(self, change: LayerChange) -> Array | None:
        """Return the factor or the shift, whichever the checkpoint doesn't explain; None if it does."""
        left: list[Array] = []
        with np.errstate(all="ignore"):
            for norm in self._factors(change):
                rest = np.where(norm.scale == 0, 1, change.factor / norm.scale)
                moved = change.factor * norm.mean
                shift = change.shift - (rest * norm.bias - moved)
                scale = max(change.scale, float(np.abs(moved).max(initial=0)))
                if np.abs(shift).max(initial=0) <= change.rounding * scale:
                    return None
                left.append(shift)
            if not left:
                return change.factor
            return None if any(self._is_shift(one, change) for one in left[:_TRIED]) else change.shift

    def is_of_norm(self, values: Array) -> bool:
        """Return True if a vector is what a frozen batch norm multiplies with or adds (rule 4)."""
        size = values.size
        change = LayerChange(
            factor=np.asarray(values, np.float64).reshape(-1),
            shift=np.zeros(size),
            bias=np.zeros(size),
            lengths=lambda: np.ones(size),
            size=size,
            rows=np.arange(size),
            rounding=_ROUNDING,
            scale=1.0,
        )
        with np.errstate(all="ignore"):
            for norm in islice(self._norms(change), 1, None):
                moved = norm.scale * norm.mean
                limit = _ROUNDING * (np.abs(norm.bias) + np.abs(moved)).max()
                if np.abs(change.factor - (norm.bias - moved)).max() <= limit:
                    return True
                if np.abs(change.factor - norm.scale).max() <= _ROUNDING * np.abs(norm.scale).max():
                    return True
        return False

    def _factors(self, change: LayerChange) -> Iterator[_Norm]:
        """Yield the norms that explain the factor: none, and batch norms; the likeliest first."""
        none, *norms = self._norms(change)
        yield from self._with_number([none, *norms], change)
        if self._is_own(change.factor, change):
            yield none
        lengths = list(self._lengths(change))
        yield from self._with_number(lengths, change)
        for norm in (*norms, *lengths):
            if self._is_multiple(np.where(norm.scale == 0, 0, change.factor / norm.scale), change):
                yield norm

    def _with_number(self, norms: Sequence[_Norm], change: LayerChange) -> Iterator[_Norm]:
        """Yield the norms that are the factor, up to a number."""
        for norm in norms:
            # A norm of zero gives zeros, whatever it is multiplied with.
            told = (norm.scale != 0) | (change.factor != 0)
            if self._is_number((change.factor / norm.scale)[told], change):
                yield norm

    def _lengths(self, change: LayerChange) -> Iterator[_Norm]:
        """Apply rule 3: yield rows of length 1, and of the lengths that a weight norm gives them."""
        # The bias does not pass these norms.
        lengths, bias = change.lengths(), change.bias
        yield _Norm(1 / lengths, bias, bias)
        for name, vector in self._vectors_of(change.size).items():
            if name.endswith(_LENGTHS):
                yield _Norm(vector[change.rows] / lengths, bias, bias)

    def _norms(self, change: LayerChange) -> Iterator[_Norm]:
        """Yield no norm, then each batch norm with each epsilon."""
        zeros, ones = np.zeros(len(change.rows)), np.ones(len(change.rows))
        yield _Norm(ones, zeros, zeros)
        vectors = {name: vector[change.rows] for name, vector in self._vectors_of(change.size).items()}
        for name, variance in vectors.items():
            # A functional norm's have a prefix in their names.
            if not name.endswith("running_var"):
                continue
            module = name.removesuffix("running_var")
            mean = vectors.get(f"{module}running_mean", zeros)
            gamma, beta = vectors.get(f"{module}weight", ones), vectors.get(f"{module}bias", zeros)
            own = float(np.median((gamma / change.factor) ** 2 - variance))
            for epsilon in (own, *_EPSILONS) if own >= 0 else _EPSILONS:
                yield _Norm(gamma / np.sqrt(variance + epsilon), beta, mean)

    def _is_shift(self, shift: Array, change: LayerChange) -> bool:
        # The rounding is that of the terms, of which a small shift is the difference.
        terms = change.scale / (_TIMES * max(float(np.abs(shift).max()), 1e-300))
        change = replace(change, rounding=change.rounding * max(1.0, terms))
        before = np.where(change.factor == 0, 0, shift / change.factor)
        return any(
            self._is_number(one, change) or self._is_own(one, change) or self._is_row(one, change)
            for one in (shift, before)
        )

    def _is_number(self, values: Array, change: LayerChange) -> bool:
        """Apply rule 1: a few rows have other numbers if a tool has joined layers."""
        if not np.isfinite(values).all():
            return False
        near = np.round(values / max(np.abs(values).max(initial=0), 1e-300) / (4 * change.rounding))
        _, firsts = np.unique(near, return_index=True)
        if len(firsts) > FEW:
            return are_steps(values)
        numbers = [float(values[near == near[first]].mean()) for first in firsts]
        if change.rounding > _EXACT or all(map(_is_written, numbers)):
            return True
        singles = np.array([vector[0] for vector in self._vectors_of(1).values()])
        made = np.concatenate([one(singles) for one in FUNCTIONS])
        return all(bool((np.abs(made - x) <= change.rounding * abs(x)).any()) for x in numbers)

    def _is_multiple(self, values: Array, change: LayerChange) -> bool:
        """Return True if values are a vector's, times a number (rule 2)."""
        return _any_multiple(values, self._matrix(change), change.rounding)

    def _is_own(self, values: Array, change: LayerChange) -> bool:
        """Apply rule 2."""
        matrix = self._matrix(change)
        if any(_any_multiple(values, one(matrix), change.rounding) for one in FUNCTIONS):
            return True
        return any(len(np.unique(own)) >= _ORDERED and same_order(own, values) for own in matrix)

    def _matrix(self, change: LayerChange) -> Array:
        """Return all vectors of a change's size, one a row."""
        vectors = [vector[change.rows] for vector in self._vectors_of(change.size).values()]
        return np.stack(vectors) if vectors else np.zeros((0, len(change.rows)))

    def _is_row(self, values: Array, change: LayerChange) -> bool:
        """Return True if values are a row of a table, times a number."""
        for name, shape in self._shapes.items():
            if len(shape) < 2 or shape[-1] != change.size or name in self._changed:
                continue
            rows = self._base.values(name).reshape(-1, change.size)
            step = max(1, _BLOCK // change.size)
            for start in range(0, len(rows), step):
                block = np.asarray(rows[start : start + step], np.float32)[:, change.rows]
                lengths = np.linalg.norm(block, axis=1) * np.float32(np.linalg.norm(values))
                near = np.abs(block @ values.astype(np.float32)) >= _SAME * lengths
                if _any_multiple(values, block[near & (lengths > 0)].astype(np.float64), change.rounding):
                    return True
        return False


def _any_multiple(values: Array, matrix: Array, rounding: float) -> bool:
    """Return True if values are a row of a matrix, times a number."""
    squares, products = np.einsum("ij,ij->i", matrix, matrix), matrix @ values
    whole = float(values @ values)
    likely = np.isfinite(squares) & (squares > 0) & (products**2 >= _SAME * whole * squares)
    times = products[likely] / squares[likely]
    gaps = np.abs(values - times[:, None] * matrix[likely])
    return bool((gaps.max(axis=1, initial=0) <= rounding * np.abs(values).max(initial=0)).any())


def _is_written(number: float) -> bool:
    return is_written(number) or is_written(1 / number)
