"""Compute ΔW's singular values from the factors alone: the share of the change in its first directions.

With ``left = Q_l R_l`` and ``right.T = Q_r R_r`` the singular values of ``left @ right`` are those of
``R_l @ R_r.T``, a ``(rank, rank)`` matrix: two thin QR decompositions and one small SVD, in float64. The full
``(out_dim, in_dim)`` matrix is never made, nor a whole factor in float64: R of some rows, with the next ones
below it, has the R of all (TSQR).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_export.adapter import Array, LoraModule

# Values of a factor that are widened at once.
_BLOCK_VALUES = 1 << 19


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Spectrum of one module's change, all experts together.

    For DoRA it is that of the low-rank part: the magnitude's share depends on the base.

    Attributes:
        singular_values: Descending, ``(min(rank, rows, cols) * experts,)``, float64.
    """

    singular_values: Array

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(np.linalg.norm(self.singular_values))

    @property
    def spectral_norm(self) -> float:
        """Largest singular value."""
        return float(self.singular_values[0]) if self.singular_values.size else 0.0

    def effective_rank(self, share: float = 0.9) -> int:
        """Return the least number of directions that hold ``share`` of the energy ‖ΔW‖²; 0 for no change."""
        cumulated = np.cumsum(self.singular_values**2)
        if not cumulated.size or cumulated[-1] == 0.0:
            return 0
        # Rounding may leave the last sum slightly below the total, but there are no more directions.
        wanted = share * cumulated[-1] * (1 - 1e-12)
        return min(int(np.searchsorted(cumulated, wanted)) + 1, cumulated.size)

    @property
    def entropy_rank(self) -> float:
        """Return exp of the entropy of the normalised singular values (Roy, Vetterli 2007)."""
        total = float(self.singular_values.sum())
        if total == 0.0:
            return 0.0
        shares = self.singular_values[self.singular_values > 0] / total
        return float(np.exp(-np.sum(shares * np.log(shares))))


def spectrum(module: LoraModule) -> Spectrum:
    """Return the spectrum of the change that ``module`` makes, scaling included.

    Args:
        module: Module with its factors; a grouped convolution counts as the dense matrix that it acts as.
    """
    found = [_singular_values(module, expert) for expert in range(module.experts)]
    return Spectrum(np.sort(np.concatenate(found))[::-1])


def _singular_values(module: LoraModule, expert: int) -> Array:
    left, right = module.stored_factors(expert)
    upper_right = _upper(right.T).T
    # Group g of a convolution's outputs depends only on group g of the ranks.
    rows, rank = len(left) // module.groups, len(right) // module.groups
    parts = [
        _upper(left[g * rows : (g + 1) * rows]) @ upper_right[g * rank : (g + 1) * rank]
        for g in range(module.groups)
    ]
    values: Array = np.linalg.svd(np.concatenate(parts) * module.scaling, compute_uv=False)
    return values


def _upper(factor: Array) -> Array:
    """Return R of the QR decomposition of a factor ``(rows, rank)``, in float64, a few rows at a time."""
    rank = factor.shape[1]
    step = max(_BLOCK_VALUES // max(rank, 1), 4 * rank)
    upper: Array = np.zeros((0, rank))
    for start in range(0, len(factor), step):
        rows = factor[start : start + step].astype(np.float64)
        found: Any = np.linalg.qr(np.concatenate([upper, rows]), mode="r")
        upper = found
    return upper
