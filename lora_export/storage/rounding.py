"""Measure the loss by rounding a merged weight to its stored type: how much of the adapter's change survived.

A bfloat16 weight has 8 significant bits. A trained change that is smaller than half a step of the stored
number is rounded away, and the merged model is then closer to the base than it should be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["sample", "exact", "off"]

# Above these the merge warns. Rounding to bfloat16 costs 0.17 % of ‖W‖ for any adapter (a step of 2**-8,
# evenly spread), so a quarter of ‖ΔW‖ is reached if the change is below 0.7 % of the weights. For float16
# that is below 0.08 %. How much a task suffers depends on the task: the noise is random and averages out over
# a layer's inputs, so these mean "measure it", not "broken".
WARN_RELATIVE = 0.25
WARN_LOST = 0.25


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The figures of one block and one patch; see `Rounding` for the meaning."""

    label: str
    measured: int
    error_squared: float
    delta_squared: float
    changed: int
    lost: int


@dataclass(kw_only=True)
class Rounding:
    """The loss of one module's change by rounding, with W the exact sum W0 + ΔW in float32 or float64.

    Attributes:
        label: Module path.
        elements: Number of weights in the module's rectangles.
        measured: Number of measured weights; less than ``elements`` if blocks were sampled.
        error_squared: ‖round(W) − W‖² over the measured weights.
        delta_squared: ‖ΔW‖² over the measured weights.
        changed: Number of measured weights with ΔW ≠ 0.
        lost: Number of changed weights that are equal to W0 after rounding.
        tensors: Names of the tensors that hold the module's weights.
    """

    label: str
    elements: int = 0
    measured: int = 0
    error_squared: float = 0.0
    delta_squared: float = 0.0
    changed: int = 0
    lost: int = 0
    tensors: list[str] = field(default_factory=list)

    @property
    def relative(self) -> float:
        """‖round(W) − W‖ / ‖ΔW‖; 0 if nothing changed."""
        return math.sqrt(self.error_squared / self.delta_squared) if self.delta_squared else 0.0

    @property
    def lost_share(self) -> float:
        """Share of the changed weights whose change was rounded away entirely."""
        return self.lost / self.changed if self.changed else 0.0

    @property
    def sampled_share(self) -> float:
        """Share of the weights that these figures were measured on."""
        return self.measured / self.elements if self.elements else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for a manifest, rounded to their meaningful digits."""
        return {
            "relative_error": float(f"{self.relative:.4g}"),
            "lost_share": float(f"{self.lost_share:.4g}"),
            "elements": self.elements,
            "sampled_share": float(f"{self.sampled_share:.4g}"),
        }


def collect(parts: Iterable[tuple[str, str, int]], samples: Iterable[Sample]) -> dict[str, Rounding]:
    """Add up blocks by module; the result does not depend on the order in which threads finished.

    Args:
        parts: ``(label, tensor name, number of weights)`` of every patch, in file order.
        samples: The measured blocks, in any order.
    """
    found: dict[str, Rounding] = {}
    for label, tensor, elements in parts:
        rounding = found.setdefault(label, Rounding(label=label))
        rounding.elements += elements
        if tensor not in rounding.tensors:
            rounding.tensors.append(tensor)
    squares: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in found}
    for sample in samples:
        rounding = found[sample.label]
        rounding.measured += sample.measured
        rounding.changed += sample.changed
        rounding.lost += sample.lost
        squares[sample.label][0].append(sample.error_squared)
        squares[sample.label][1].append(sample.delta_squared)
    for label, (errors, deltas) in squares.items():
        # fsum is exact, so the sum is the same in every order.
        found[label].error_squared, found[label].delta_squared = math.fsum(errors), math.fsum(deltas)
    return found


def update(total: dict[str, Rounding], more: dict[str, Rounding]) -> None:
    """Add the figures of another file to ``total``, module by module."""
    for label, rounding in more.items():
        known = total.setdefault(label, Rounding(label=label))
        known.elements += rounding.elements
        known.measured += rounding.measured
        known.error_squared += rounding.error_squared
        known.delta_squared += rounding.delta_squared
        known.changed += rounding.changed
        known.lost += rounding.lost
        known.tensors += rounding.tensors


def total_of(roundings: Iterable[Rounding]) -> Rounding:
    """Return the figures of all modules together, each sampled one extrapolated to all its weights."""
    total = Rounding(label="total")
    for rounding in roundings:
        scale = rounding.elements / rounding.measured if rounding.measured else 0.0
        total.elements += rounding.elements
        total.measured += rounding.measured
        total.error_squared += rounding.error_squared * scale
        total.delta_squared += rounding.delta_squared * scale
        total.changed += round(rounding.changed * scale)
        total.lost += round(rounding.lost * scale)
    return total


def rounding_dict(roundings: Mapping[str, Rounding]) -> dict[str, Any]:
    """Return the figures of the total and of each module as plain data."""
    return {
        "total": total_of(roundings.values()).as_dict(),
        "modules": {label: rounding.as_dict() for label, rounding in roundings.items()},
    }
