"""Convert an adapter's factors to a graph's dtype: fold in the scaling, round once, report each loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array, LoraModule
from lora_export.formats.reading.tensors import value_problems
from lora_export.storage.rounding import WARN_LOST, WARN_RELATIVE, Rounding

# More than rounding costs (0.2 % in bfloat16): values too small for the dtype.
_EXPLAINED = 0.01
# Number of tensors that a note names, those with the greatest loss.
_WORST = 3
# Values that are compared at a time.
_BLOCK = 1 << 18
_EXPONENT = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of `ExposedModule.dtype`."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def wide_of(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """Return the dtype to compute in for results of ``dtype``."""
    return np.float64 if dtype == np.float64 else np.float32


class Caster:
    """Converter to a graph's dtype that remembers problems, conversions and losses.

    Attributes:
        problems: One line for each tensor with values that can't be used.
        converted: ``(dtype from, dtype to)`` → modules converted.
        losses: Tensors that lost more than rounding explains, each as a change of a W0 of zeros.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.converted: Counter[tuple[str, str]] = Counter()
        self.losses: list[Rounding] = []

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

    def refuse_overflow(self, lora: LoraModule, a: Array) -> None:
        """Remember an A with which a usual activation's product x·A may be infinite.

        A bank multiplies each row of the batch by every slot's A, and what the row does not use by 0:
        infinity times 0 is NaN, in rows of other adapters and of none.

        Args:
            lora: The pair.
            a: Its A in the graph's dtype, as the bank holds it.
        """
        most = float(ml_dtypes.finfo(a.dtype).max) ** 0.5
        if a.size and (large := _largest(a)) > most:
            self.problems.append(
                f"{lora.path} lora_A: values up to {large:.3g}, in a bank of {a.dtype.name} at most "
                f"{most:.3g}: larger ones may overflow in rows of other adapters (divide lora_A by a number "
                "and multiply lora_B by it, or use swap-onnx)"
            )

    def _cast(self, values: Array, scaling: float, dtype: np.dtype[Any], label: str) -> Array:
        made = values
        if scaling != 1.0 or values.dtype != dtype:
            wide = wide_of(dtype)
            with np.errstate(over="ignore"):
                exact = np.ascontiguousarray(values).astype(wide)
                if scaling != 1.0:
                    exact *= wide(scaling)
                made = exact.astype(dtype, copy=False)
        if not _finite(made):
            self.problems += value_problems([(label, values)]) or [
                f"{label}: values up to {_largest(values) * scaling:.3g} are too large for {dtype.name}, "
                f"which ends at {float(ml_dtypes.finfo(dtype).max):.3g}"
            ]
        elif dtype in _EXPONENT and made is not values:
            self._measure(label, exact, made)
        return np.ascontiguousarray(made)

    def _measure(self, label: str, exact: Array, made: Array) -> None:
        """Remember a tensor with values that are too small for its dtype."""
        error_squared = delta_squared = 0.0
        count = lost = 0
        flat, rounded = exact.reshape(-1), made.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            # The squares of such values would be too small for float32 as well.
            wanted, got = (one[start : start + _BLOCK].astype(np.float64) for one in (flat, rounded))
            changed = wanted != 0
            error_squared += float(np.square(got - wanted).sum())
            delta_squared += float(np.square(wanted).sum())
            count += int(np.count_nonzero(changed))
            lost += int(np.count_nonzero(changed & (got == 0)))
        cost = Rounding(
            label=label,
            elements=flat.size,
            measured=flat.size,
            error_squared=error_squared,
            delta_squared=delta_squared,
            changed=count,
            lost=lost,
        )
        if cost.lost or cost.relative > _EXPLAINED:
            self.losses.append(cost)

    def notes(self) -> list[str]:
        """Return the conversions and their cost, in words."""
        converted = [
            f"converted from {source} to {target} ({count} module{'s' if count > 1 else ''})"
            for (source, target), count in sorted(self.converted.items())
        ]
        return converted + [_loss_text(self.losses)] * bool(self.losses)

    def warnings(self) -> list[str]:
        """Return the notes that a user should not miss."""
        much = any(cost.relative > WARN_RELATIVE or cost.lost_share > WARN_LOST for cost in self.losses)
        return [_loss_text(self.losses)] * much


def _loss_text(losses: Sequence[Rounding]) -> str:
    worst = sorted(losses, key=lambda cost: (-cost.relative, -cost.lost_share, cost.label))[:_WORST]
    listed = [
        f"{cost.label} (error {cost.relative:.2%}, {cost.lost_share:.2%} of its values became 0)"
        for cost in worst
    ]
    more = f" and {len(losses) - len(worst)} more" if len(losses) > len(worst) else ""
    return f"values too small for the graph's dtype: {', '.join(listed)}{more}"


def _largest(values: Array) -> float:
    return float(np.abs(values.astype(np.float64)).max())


def _finite(values: Array) -> bool:
    """Return True if no value is NaN or infinite; an empty array is not finite, as in `value_problems`."""
    if not values.size:
        return False
    if values.dtype in _EXPONENT:
        # Look at the exponent's bits, because widening would cost a copy.
        mask = _EXPONENT[values.dtype]
        bits = values.view(np.uint16)
        return not bool(((bits & mask) == mask).any())
    # A sum needs one pass and no mask, and is never finite if a value is NaN or infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())
