"""How far a module's input and output in a graph are from PyTorch's, and whether that is more than rounding.

An output is off where

1. its distance from the reference is more than `FACTOR` times what PyTorch loses there in the candidate's
   dtype, or
2. a sizeable share of that distance lies along what the adapter adds there, y − W0·x: rounding has no
   direction, an adapter that is missing or there twice has.
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
# Less than this is no error in any graph of floats.
_FLOOR = 16 * STEP["float32"]
# Of the dtype's step, where PyTorch was not run in it.
_STEPS = 4.0
# Rule 2: share of what is added, and standard deviations from what chance makes of the channels.
_SHARE = 0.1
_DEVIATIONS = 5.0


@dataclass(frozen=True)
class Measured:
    """A module that was looked at.

    Attributes:
        row: Its figures.
        off: Its output is further off than rounding explains.
        off_in: So is what goes into it, as far as that is seen.
    """

    row: ModuleRow
    off: bool
    off_in: bool


@dataclass(frozen=True)
class Runs:
    """PyTorch's runs with the modules watched.

    Attributes:
        right: In high precision.
        without: The same without adapters.
        own: In the candidate's dtype; empty where it was not run.
        bare: W0·x + b for the x of ``right``, of modules that are such a product.
        dtype: The candidate's.
        masks: Which positions are not padding, see `valid_positions`.
    """

    right: Taken
    without: Taken
    own: Taken
    bare: Mapping[str, Array]
    dtype: str
    masks: Sequence[Array] = ()

    def measure(self, module: str, x: Array | None, y: Array, axis: int) -> Measured | None:
        """Compare a module of the graph; None where its value is not the size of what PyTorch computes.

        Args:
            module: Its path.
            x: What goes into it in the graph, if that can be seen.
            y: What comes out of it.
            axis: Along which its channels lie.
        """
        got = self._compared(self.right, module, 1, y, axis)
        if got is None:
            return None
        difference, wanted = got
        effect = _relative(wanted - self._values(self.without[module][1], y, axis), wanted)
        error_out, own_out, error_in, own_in = _relative(difference, wanted), math.nan, math.nan, math.nan
        if module in self.own:
            own_out = _relative(self._values(self.own[module][1], y, axis) - wanted, wanted)
        if x is not None and (entering := self._compared(self.right, module, 0, x, axis)) is not None:
            error_in = _relative(*entering)
            if module in self.own:
                own_in = _relative(self._values(self.own[module][0], x, axis) - entering[1], entering[1])
        row = ModuleRow(module, error_in, error_out, own_out, effect)
        off = self._is_off(error_out, own_out)
        if not off and module in self.bare:
            off = _along(difference, wanted - self._values(self.bare[module], y, axis))
        return Measured(row, off, not math.isnan(error_in) and self._is_off(error_in, own_in))

    def _compared(
        self, taken: Taken, module: str, side: int, got: Array, axis: int
    ) -> tuple[Doubles, Doubles] | None:
        """Return graph − PyTorch, and PyTorch's values; None where they don't have the same size."""
        right = _like(taken[module][side], got) if module in taken else None
        if right is None:
            return None
        wanted = self._rows(right, axis)
        return self._rows(got.reshape(right.shape), axis) - wanted, wanted

    def _values(self, values: Array, got: Array, axis: int) -> Doubles:
        found = _like(values, got)
        assert found is not None
        return self._rows(found, axis)

    def _rows(self, values: Array, axis: int) -> Doubles:
        """Return the positions that are no padding as rows, channels as columns."""
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
        """Rule 1; what is not finite is off even where PyTorch's own is not, for it should be named."""
        floor = _FLOOR if self.own else max(_FLOOR, _STEPS * STEP[self.dtype])
        noise = max(floor, own) if math.isfinite(own) else floor
        return not error <= FACTOR * noise


def _like(wanted: Array, got: Array) -> Array | None:
    """Return the reference's values that a graph's value stands for: of several calls the first one's."""
    if wanted.size == got.size:
        return wanted
    if got.ndim == 0 or wanted.size < got.size:
        return None
    alike = wanted.shape[1:] == got.shape[1:] and wanted.shape[0] % got.shape[0] == 0
    return wanted.reshape(-1)[: got.size].reshape(got.shape) if alike or wanted.ndim == 1 else None


def _relative(difference: Doubles, wanted: Doubles) -> float:
    """‖difference‖ / ‖wanted‖; infinite where the difference is not finite."""
    if not np.isfinite(difference).all():
        return math.inf
    norm, error = float(np.linalg.norm(wanted)), float(np.linalg.norm(difference))
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def _along(difference: Doubles, added: Doubles) -> bool:
    """Rule 2: channels whose error is along what the adapter adds, more of them than chance would make.

    By channels, because a weight's rounding error has one sign at all positions whose activations are alike.
    """
    squared = float(np.einsum("ij,ij->", added, added))
    if not (squared > 0 and np.isfinite(difference).all()):
        return False
    channels = np.einsum("ij,ij->j", difference, added)
    total, chance = abs(float(channels.sum())), float(np.linalg.norm(channels))
    return total > _SHARE * squared and total > _DEVIATIONS * chance
