"""Hold what a model is traced with, and tell a part's answer from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Relative difference of one way to add up in another order; 16 bits round each step.
_DIFFERENCE, _HALVES_DIFFERENCE = 1e-4, 0.05


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Inputs, outputs and sizes with which a model is traced.

    Attributes:
        inputs: Example inputs.
        shapes: Their dynamic dimensions.
        output_names: Of the graph.
        input_names: Of the graph; None: as the parameters of ``forward``.
        has_cache: True if a decoder's key-value cache is among them.
    """

    inputs: Mapping[str, Any]
    shapes: Mapping[str, Any]
    output_names: list[str] | None
    input_names: list[str] | None = None
    has_cache: bool = False


def difference_of(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Return the relative difference of a part from the whole model; None if rounding explains it."""
    exact = expected.double()
    gap = float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    return None if gap <= (_HALVES_DIFFERENCE if expected.dtype.itemsize == 2 else _DIFFERENCE) else gap
