"""Measure the distance of two runs, added up feed by feed, so that no outputs have to be kept.

Everything is computed in float64. *Positions* are the vectors along an output's last axis: for logits one for
each token. Positions that are padding are left out, see `valid_positions`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_export.adapter import Array
from lora_export.parity.result import OutputMetrics

Doubles = NDArray[np.float64]
_TOP = 5


def group_of(output: str) -> str:
    """Return the name of an output's group: layers are ``*``, as in ``present.*.key``."""
    return re.sub(r"(?<![A-Za-z_])\d+", "*", output)


def is_logits(output: str) -> bool:
    """Return True if an output's last axis is a distribution before its softmax."""
    return output.rpartition(".")[2].endswith("logits")


def valid_positions(shape: tuple[int, ...], masks: Sequence[Array]) -> NDArray[np.bool_] | None:
    """Return True for each position of an output that is not padding, ``shape[:-1]``; None for all positions.

    A model's values at padded positions mean nothing, and implementations differ there.

    Args:
        shape: Shape of the output: ``(batch, sequence, …)``, or of a cache ``(batch, heads, total, dim)``.
        masks: Masks ``(batch, sequence)`` or ``(batch, total)``; the first with the output's length counts.
    """
    if len(shape) < 3:
        return None
    axis = 2 if len(shape) == 4 else 1
    for mask in masks:
        if mask.shape == (shape[0], shape[axis]):
            kept = mask.astype(bool)
            return np.broadcast_to(kept[:, None, :] if axis == 2 else kept, shape[:-1])
    return None


def _positions(values: Array, valid: NDArray[np.bool_] | None) -> Doubles:
    """Return the positions to compare as rows of a matrix."""
    rows = values[valid] if valid is not None else values.reshape(-1, values.shape[-1] if values.ndim else 1)
    return rows.astype(np.float64)


def _squares(rows: Doubles) -> Doubles:
    squares: Doubles = np.einsum("ij,ij->i", rows, rows)
    return squares


def _infinite(rows: Doubles) -> int:
    return int(rows.size - np.isfinite(rows).sum())


@dataclass(kw_only=True)
class Distance:
    """The distance of one run from the reference.

    Attributes:
        squared: ‖difference‖².
        worst_squared: Largest ‖difference‖² of a position.
        max_abs: Largest absolute difference.
        sum_abs: Sum of the absolute differences.
        along: (run − reference without the adapter) · (reference with − without it).
        drift: ‖(run − its own run without the adapter) − (reference with − without it)‖²: errors that both
            runs share cancel. If it can't run without the adapter, the reference's run without it is used.
        dot: run · reference.
        norm_squared: ‖run‖².
        kl: Sum over positions of KL(reference‖run).
        top1: Positions with the same largest logit.
        top5: Sum over positions of the share of the five largest logits that are the same.
        infinite: Number of values that are NaN or infinite.
        beyond: Largest |difference| / (atol + rtol · |reference|), if a tolerance was given.
    """

    squared: float = 0.0
    worst_squared: float = 0.0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    along: float = 0.0
    drift: float = 0.0
    dot: float = 0.0
    norm_squared: float = 0.0
    kl: float = 0.0
    top1: int = 0
    top5: float = 0.0
    infinite: int = 0
    beyond: float = 0.0


@dataclass(kw_only=True)
class Tally:
    """One output in one state, over all feeds so far.

    Attributes:
        logits: True if distributions are compared as well.
        tolerance: ``(rtol, atol)``, if the user gave one.
        values: Number of compared values.
        positions: Number of positions.
        expected_squared: ‖reference‖².
        moved_squared: ‖reference with − without the adapter‖².
        infinite: Number of the reference's values that are NaN or infinite.
        actual: The candidate's distance.
        own: PyTorch's distance in the candidate's dtype; None if it was not run.
        ties: PyTorch's distance with experts that are a tie in this dtype chosen the other way, over the
            feeds with such ties; None if there are none.
        moved: True if there was a run without the adapter to compare with.
    """

    logits: bool = False
    tolerance: tuple[float, float] | None = None
    values: int = 0
    positions: int = 0
    expected_squared: float = 0.0
    moved_squared: float = 0.0
    infinite: int = 0
    actual: Distance = field(default_factory=Distance)
    own: Distance | None = None
    ties: Distance | None = None
    moved: bool = False

    def add(
        self,
        expected: Array,
        actual: Array,
        own: Array | None,
        without: Array | None,
        actual_without: Array | None,
        masks: Sequence[Array] = (),
        tied: Array | None = None,
    ) -> None:
        """Add one feed.

        Args:
            expected: Values of the reference.
            actual: Values of the candidate, of the same shape.
            own: Values of PyTorch in the candidate's dtype.
            without: Values of the reference without the adapter.
            actual_without: Values of the candidate without the adapter, if it can run without it.
            masks: Masks of the feed, see `valid_positions`.
            tied: Values of PyTorch in the candidate's dtype with ties chosen the other way.
        """
        valid = valid_positions(expected.shape, masks)
        exact = _positions(expected, valid)
        base = None if without is None else _positions(without, valid)
        self.values += exact.size
        self.positions += len(exact)
        self.moved = self.moved or base is not None
        infinite = _infinite(exact) + (0 if base is None else _infinite(base))
        self.infinite += infinite
        if infinite:
            # Nothing can be measured against infinite values; those of the candidate are counted too.
            self.actual.infinite += _infinite(_positions(actual, valid))
            return
        self.expected_squared += float(_squares(exact).sum())
        if base is not None:
            self.moved_squared += float(_squares(exact - base).sum())
        own_base = None if actual_without is None else _positions(actual_without, valid)
        if own_base is not None and _infinite(own_base):
            own_base = None  # the base state reports it
        self._measure(self.actual, exact, found=_positions(actual, valid), base=base, found_base=own_base)
        if own is not None:
            self.own = self.own or Distance()
            self._measure(self.own, exact, found=_positions(own, valid), base=base, found_base=None)
        if tied is not None:
            self.ties = self.ties or Distance()
            self._measure(self.ties, exact, found=_positions(tied, valid), base=base, found_base=None)

    def _measure(
        self, into: Distance, exact: Doubles, found: Doubles, base: Doubles | None, found_base: Doubles | None
    ) -> None:
        infinite = _infinite(found)
        into.infinite += infinite
        if infinite or not exact.size:
            return
        difference = found - exact
        squares = _squares(difference)
        into.squared += float(squares.sum())
        into.worst_squared = max(into.worst_squared, float(squares.max()))
        into.max_abs = max(into.max_abs, float(np.abs(difference).max()))
        into.sum_abs += float(np.abs(difference).sum())
        if self.tolerance is not None:
            rtol, atol = self.tolerance
            with np.errstate(divide="ignore", invalid="ignore"):
                beyond = np.nan_to_num(np.abs(difference) / (atol + rtol * np.abs(exact)), nan=0.0)
            into.beyond = max(into.beyond, float(beyond.max()))
        into.dot += float(np.einsum("ij,ij->", found, exact))
        into.norm_squared += float(_squares(found).sum())
        if base is not None:
            # Against the candidate's own base, rounding that both runs share cancels.
            start = base if found_base is None else found_base
            into.along += float(np.einsum("ij,ij->", found - start, exact - base))
            into.drift += float(_squares(found - start - (exact - base)).sum())
        if self.logits:
            _add_logits(into, exact, found)

    @property
    def expected_norm(self) -> float:
        """Norm of the reference, ‖reference‖."""
        return math.sqrt(self.expected_squared)

    def relative(self, of: Distance) -> float:
        """Return ‖difference‖ / ‖reference‖, or ‖difference‖ if the reference is zero."""
        return math.sqrt(of.squared) / (self.expected_norm or 1.0)

    def worst(self, of: Distance) -> float:
        """Return the worst position's ‖difference‖ relative to the root mean square norm of the positions."""
        mean = math.sqrt(self.expected_squared / self.positions) if self.positions else 0.0
        return math.sqrt(of.worst_squared) / (mean or 1.0)

    @property
    def effect(self) -> float:
        """The adapter's effect, ‖with − without‖ / ‖with‖."""
        return math.sqrt(self.moved_squared) / (self.expected_norm or 1.0)

    def error_over_effect(self, of: Distance) -> float:
        """Return ‖difference‖ / ‖with − without‖, or Inf if the adapter has no effect."""
        return math.sqrt(of.squared / self.moved_squared) if self.moved_squared else math.inf

    def drift_over_effect(self, of: Distance) -> float:
        """Return the error of the adapter's contribution relative to the contribution in the reference."""
        return math.sqrt(of.drift / self.moved_squared) if self.moved_squared else math.inf

    def applied(self, of: Distance) -> float:
        """Return the applied share of the adapter's effect: 1 for all of it, 0 for none, 2 for twice."""
        return of.along / self.moved_squared if self.moved_squared else math.nan

    def metrics(self, state: str, output: str) -> OutputMetrics:
        """Return the figures of the candidate."""
        actual, each = self.actual, max(self.positions, 1)
        lost = bool(actual.infinite or self.infinite)
        length = math.sqrt(actual.norm_squared * self.expected_squared)

        def shown(value: float) -> float:
            return math.nan if lost else value

        has_effect = self.moved and self.moved_squared > 0
        return OutputMetrics(
            state=state,
            output=output,
            max_abs=shown(actual.max_abs),
            mean_abs=shown(actual.sum_abs / max(self.values, 1)),
            relative=shown(self.relative(actual)),
            worst_position=shown(self.worst(actual)),
            cosine=shown(actual.dot / length if length else 1.0),
            own_relative=None if self.own is None or self.own.infinite else self.relative(self.own),
            effect=self.effect if self.moved else None,
            error_over_effect=shown(self.error_over_effect(actual)) if has_effect else None,
            kl=shown(actual.kl / each) if self.logits else None,
            top1=shown(actual.top1 / each) if self.logits else None,
            top5=shown(actual.top5 / each) if self.logits else None,
            positions=self.positions,
            applied=shown(self.applied(actual)) if has_effect else None,
        )


def _add_logits(into: Distance, exact: Doubles, found: Doubles) -> None:
    expected, actual = _log_softmax(exact), _log_softmax(found)
    into.kl += float((np.exp(expected) * (expected - actual)).sum())
    into.top1 += int((exact.argmax(-1) == found.argmax(-1)).sum())
    count = min(_TOP, exact.shape[-1])
    tops = [np.argpartition(rows, -count, axis=-1)[:, -count:] for rows in (exact, found)]
    into.top5 += float((tops[0][:, :, None] == tops[1][:, None, :]).sum() / count)


def _log_softmax(rows: Doubles) -> Doubles:
    shifted = rows - rows.max(-1, keepdims=True)
    result: Doubles = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
