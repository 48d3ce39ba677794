"""Compute ΔW's singular values from the factors alone: the share of the change in its first directions.

With ``left = Q_l R_l`` and ``right.T = Q_r R_r`` the singular values of ``left @ right`` are those of
``R_l @ R_r.T``, a ``(rank, rank)`` matrix: two thin QR decompositions and one small SVD, in float64. The full
``(out_dim, in_dim)`` matrix is never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_export.adapter import Array, LoraModule


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
    found = [_singular_values(left, right) for left, right in _products(module)]
    return Spectrum(np.sort(np.concatenate(found))[::-1])


def _products(module: LoraModule) -> list[tuple[Array, Array]]:
    if module.groups == 1:
        return [module.factors(expert, np.float64) for expert in range(module.experts)]
    # Group g of the outputs depends only on group g of the ranks: rows of blocks, each with its own A.
    left, right = module.factors(0, np.float64)
    rows, rank = left.shape[0] // module.groups, right.shape[0] // module.groups
    blocks = np.zeros((left.shape[0], right.shape[0]))
    for g in range(module.groups):
        block = slice(g * rows, (g + 1) * rows), slice(g * rank, (g + 1) * rank)
        blocks[block] = left[block[0]]
    return [(blocks, right)]


def _singular_values(left: Array, right: Array) -> Array:
    upper_left: Any = np.linalg.qr(left, mode="r")
    upper_right: Any = np.linalg.qr(right.T, mode="r")
    values: Array = np.linalg.svd(upper_left @ upper_right.T, compute_uv=False)
    return values
