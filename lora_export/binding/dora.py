"""Compute DoRA's factor m / ‖W0 + ΔW‖, one number for each output, from W0 as a graph stores it.

Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353, equation 5; the norm as PEFT takes it
(``tuners/lora/dora.py``): of a linear's row, of an embedding's column, of a convolution's filter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_export.adapter import Array, LoraModule
from lora_export.binding.base_weights import WeightOf, stored_blocks
from lora_export.graph.exposed import Member
from lora_export.plan import Refusal


def dora_problem(member: Member, weight_of: WeightOf | None) -> Refusal | None:
    """Return the reason why a module's factor can't be computed; None if it can."""
    if weight_of is None:
        return Refusal(
            "unproven",
            "DoRA's factor needs the base's weights, and only the graph's LoRA record is available",
            "convert the adapter with convert-adapter first",
        )
    if not member.stored:
        return Refusal(
            "quantised",
            "DoRA's factor needs W0, and the graph doesn't hold it as it is in PyTorch (it is quantised, or "
            "was rescaled)",
            "merge the adapter into the unquantised base",
        )
    return None


def dora_factor(lora: LoraModule, member: Member, weight_of: WeightOf, wide: type[np.floating[Any]]) -> Array:
    """Return the factor of each output, ``(out_dim,)``, in the dtype ``wide``.

    Args:
        lora: A module with a magnitude.
        member: The module of the base; ``stored`` lists where the canonical weight's rows are.
        weight_of: Name of an initializer → its values; may be memory-mapped.
        wide: float32 or float64; W0 + ΔW is computed in it, its squares are summed in float64.

    Raises:
        ValueError: Some rows of the weight are not stored.
    """
    assert lora.magnitude is not None
    rows, cols = lora.matrix_shape
    left, right = lora.factors(dtype=wide)
    by_row = lora.magnitude_axis == 0
    squares = np.zeros(rows if by_row else cols, np.float64)
    seen = 0
    for row, block in stored_blocks(member.stored, cols, weight_of):
        height = len(block)
        seen += height
        merged = left[row : row + height] @ right
        merged += block
        np.multiply(merged, merged, out=merged)
        if by_row:
            squares[row : row + height] = merged.sum(axis=1, dtype=np.float64)
        else:
            squares += merged.sum(axis=0, dtype=np.float64)
    if seen != rows:
        raise ValueError(f"the graph holds {seen} of the {rows} rows of W0")
    norm = np.sqrt(squares)
    magnitude = lora.magnitude.astype(np.float64)
    # A row of zeros with a magnitude of zero stays zero, whatever the factor.
    with np.errstate(divide="ignore"):
        factor = np.divide(magnitude, norm, out=np.zeros_like(norm), where=(norm != 0) | (magnitude != 0))
    return factor.astype(wide)
