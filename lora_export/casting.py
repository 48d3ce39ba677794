"""An adapter's factors in a graph's dtype: scaling folded in, rounded once, nothing lost in silence."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array, LoraModule
from lora_export.formats.tensors import value_problems

_EXPONENT = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of `ExposedModule.dtype`."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def wide_of(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """Return the dtype to compute in for results of ``dtype``."""
    return np.float64 if dtype == np.float64 else np.float32


class Caster:
    """Converts, and remembers.

    Attributes:
        problems: One line for each tensor with values that can't be used.
        converted: ``(dtype from, dtype to)`` → modules converted.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.converted: Counter[tuple[str, str]] = Counter()

    def factors(self, lora: LoraModule, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return A and B in the graph's layout and ``dtype``, scaling folded into B.

        Without scaling and conversion they are views of the adapter's own arrays.

        Returns:
            For a convolution ``(rank, in_dim, *kernel)`` and ``(out_dim, rank/groups, 1…)``, else
            ``(in_dim, rank)`` and ``(rank, out_dim)``.
        """
        a, b = lora.lora_a, lora.lora_b
        if lora.kind != "conv":
            a, b = a.T, b.T
        sources = [values.dtype for values in (a, b) if values.dtype != dtype]
        if sources:
            self.converted[sources[0].name, dtype.name] += 1
        return (
            self._cast(a, 1.0, dtype, f"{lora.path} lora_A"),
            self._cast(b, lora.scaling, dtype, f"{lora.path} lora_B"),
        )

    def vector(self, values: Array, dtype: np.dtype[Any], label: str, scaling: float = 1.0) -> Array:
        """Return a vector in ``dtype``."""
        return self._cast(values, scaling, dtype, label)

    def _cast(self, values: Array, scaling: float, dtype: np.dtype[Any], label: str) -> Array:
        made = values
        if scaling != 1.0 or values.dtype != dtype:
            wide = wide_of(dtype)
            with np.errstate(over="ignore"):
                made = np.ascontiguousarray(values).astype(wide)
                if scaling != 1.0:
                    made *= wide(scaling)
                made = made.astype(dtype, copy=False)
        if not _finite(made):
            self.problems += value_problems([(label, values)]) or [
                f"{label}: values up to {_largest(values) * scaling:.3g} are too large for {dtype.name}, "
                f"which ends at {float(ml_dtypes.finfo(dtype).max):.3g}"
            ]
        return np.ascontiguousarray(made)

    def notes(self) -> list[str]:
        """Return what was converted, in words."""
        return [
            f"converted from {source} to {target} ({count} module{'s' if count > 1 else ''})"
            for (source, target), count in sorted(self.converted.items())
        ]


def _largest(values: Array) -> float:
    return float(np.abs(values.astype(np.float64)).max())


def _finite(values: Array) -> bool:
    """Whether no value is NaN or infinite; empty arrays count as not finite, like `value_problems` says."""
    if not values.size:
        return False
    if values.dtype in _EXPONENT:
        # By the exponent's bits: widening would cost a copy.
        mask = _EXPONENT[values.dtype]
        bits = values.view(np.uint16)
        return not bool(((bits & mask) == mask).any())
    # One pass without a mask: a sum with NaN or infinity in it is never finite.
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())
