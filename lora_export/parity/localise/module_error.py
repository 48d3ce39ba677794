"""Measure the error of a module's input and output in a graph, and decide whether it is more than rounding.

An output is off if

1. its distance from the reference is more than `FACTOR` times PyTorch's own error there in the candidate's
   dtype, or
2. a sizeable share of that distance lies along the adapter's contribution, y − W0·x: rounding has no
direction,
   but an adapter that is missing or applied twice has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_export.adapter import Array
from lora_export.parity.judge.limits import FACTOR, STEP
from lora_export.parity.judge.metrics import valid_positions
from lora_export.parity.result import ModuleRow

Doubles = NDArray[np.float64]
# Module → its input and output.
Taken = Mapping[str, tuple[Array, Array]]
# A smaller error is rounding in any graph of floats.
_FLOOR = 16 * STEP["float32"]
# Multiple of the dtype's step, if PyTorch was not run in that dtype.
_STEPS = 4.0
# Rule 2: least share of the contribution, and least number of standard deviations from chance.
_SHARE = 0.1
_DEVIATIONS = 5.0


@dataclass(frozen=True)
class Measured:
    """An examined module.

    Attributes:
        row: Figures of the module.
        off: True if its output is further off than rounding explains.
        off_in: True if its input is, as far as the graph shows it.
    """

    row: ModuleRow
    off: bool
    off_in: bool


@dataclass(frozen=True, kw_only=True)
class Runs:
    """PyTorch's runs, with inputs and outputs of the modules.

    Attributes:
        right: Run in high precision.
        without: Run in high precision without adapters.
        own: Run in the candidate's dtype; empty if there was none.
        bare: W0·x + b for the x of ``right``, for modules that are such a product.
        dtype: Type of the candidate.
        masks: Masks of the positions that are not padding, see `valid_positions`.
    """

    right: Taken
    without: Taken
    own: Taken
    bare: Mapping[str, Array]
    dtype: str
    masks: Sequence[Array] = ()

    def measure(self, module: str, x: Array | None, y: Array, axis: int) -> Measured | None:
        """Return the error of a module in the graph; None if its output's size differs from PyTorch's.

        Args:
            module: Path of the module.
            x: Its input in the graph, or None if the graph doesn't show it.
            y: Its output in the graph.
            axis: Axis of its channels.
        """
        compared = self._compared(self.right, module, side=1, actual=y, axis=axis)
        if compared is None:
            return None
        difference, expected = compared
        effect = _relative(expected - self._values(self.without[module][1], y, axis), expected)
        error_out, own_out, error_in, own_in = _relative(difference, expected), math.nan, math.nan, math.nan
        if module in self.own:
            own_out = _relative(self._values(self.own[module][1], y, axis) - expected, expected)
        if (
            x is not None
            and (entering := self._compared(self.right, module, side=0, actual=x, axis=axis)) is not None
        ):
            error_in = _relative(*entering)
            if module in self.own:
                own_in = _relative(self._values(self.own[module][0], x, axis) - entering[1], entering[1])
        row = ModuleRow(module=module, error_in=error_in, error_out=error_out, own_out=own_out, effect=effect)
        off = self._is_off(error_out, own_out)
        if not off and module in self.bare:
            off = _along(difference, expected - self._values(self.bare[module], y, axis))
        return Measured(row, off, not math.isnan(error_in) and self._is_off(error_in, own_in))

    def _compared(
        self, taken: Taken, module: str, side: int, actual: Array, axis: int
    ) -> tuple[Doubles, Doubles] | None:
        """Return graph − PyTorch, and PyTorch's values; None if their sizes differ."""
        reference = _like(taken[module][side], actual) if module in taken else None
        if reference is None:
            return None
        expected = self._rows(reference, axis)
        return self._rows(actual.reshape(reference.shape), axis) - expected, expected

    def _values(self, values: Array, actual: Array, axis: int) -> Doubles:
        found = _like(values, actual)
        assert found is not None
        return self._rows(found, axis)

    def _rows(self, values: Array, axis: int) -> Doubles:
        """Return the positions without padding as rows, with channels as columns."""
        valid = None
        if values.ndim == 2:
            # Batch and sequence are one axis.
            valid = next((m.reshape(-1).astype(bool) for m in self.masks if m.size == len(values)), None)
        elif axis == -1:
            valid = valid_positions(values.shape, self.masks)
        chosen = np.moveaxis(values, axis, -1) if valid is None and values.ndim > 1 else values
        chosen = chosen if valid is None else chosen[valid]
        return chosen.reshape(-1, chosen.shape[-1] if chosen.ndim else 1).astype(np.float64)

    def _is_off(self, error: float, own: float) -> bool:
        """Return True by rule 1; values that are not finite are off even if PyTorch's own are not finite."""
        floor = _FLOOR if self.own else max(_FLOOR, _STEPS * STEP[self.dtype])
        noise = max(floor, own) if math.isfinite(own) else floor
        return not error <= FACTOR * noise


def _like(expected: Array, actual: Array) -> Array | None:
    """Return the reference's values that match a graph's value: of several calls the first one's."""
    if expected.size == actual.size:
        return expected
    if actual.ndim == 0 or expected.size < actual.size:
        return None
    alike = expected.shape[1:] == actual.shape[1:] and expected.shape[0] % actual.shape[0] == 0
    return expected.reshape(-1)[: actual.size].reshape(actual.shape) if alike or expected.ndim == 1 else None


def _relative(difference: Doubles, expected: Doubles) -> float:
    """Return ‖difference‖ / ‖expected‖, or infinity if the difference is not finite."""
    if not np.isfinite(difference).all():
        return math.inf
    norm, error = float(np.linalg.norm(expected)), float(np.linalg.norm(difference))
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def _along(difference: Doubles, added: Doubles) -> bool:
    """Return True by rule 2: the error lies along the adapter's contribution, more than chance explains.

    Chance is estimated over channels, because a weight's rounding error has the same sign at all positions
    with similar activations.
    """
    squared = float(np.einsum("ij,ij->", added, added))
    if not (squared > 0 and np.isfinite(difference).all()):
        return False
    channels = np.einsum("ij,ij->j", difference, added)
    total, chance = abs(float(channels.sum())), float(np.linalg.norm(channels))
    return total > _SHARE * squared and total > _DEVIATIONS * chance
