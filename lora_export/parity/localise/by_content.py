"""Find weights that have lost their names: the constant that is nearest to a module's weight.

A merged weight is W0 plus a change, which may be wrong in a graph that fails. It is still nearer to its own
W0 than to any other, for which a cosine of 0 is expected.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lora_export.adapter import Array
from lora_export.graph.onnx_file import stored_matrix
from lora_export.sites import fit
from lora_export.sites.operand import Use
from lora_export.sites.target import ConstantPart, Site, Target

# Least mean cosine of the compared rows.
_LEAST = 0.5
_ROWS = 16


class Nearest:
    """Find weights by their values.

    Args:
        uses: All uses of constants.
        claimed: Ids of nodes that belong to other modules.
    """

    def __init__(self, uses: Sequence[Use], claimed: Collection[int]) -> None:
        self._uses = [use for use in uses if id(use.node) not in claimed and not use.quantised]

    def find(self, target: Target, base: Array | None) -> Site | None:
        """Return the site whose values are nearest to the base's, or None if none is near.

        Args:
            target: The module's weight, ``(out_dim, in_dim)``.
            base: Its values in the base.
        """
        if base is None or base.shape != target.shape:
            return None
        best, site = _LEAST, None
        for use in self._uses:
            if not fit.accepts(target, use):
                continue
            found = _compare(use, base.reshape(target.matrix))
            if found is not None and found[0] > best:
                best = found[0]
                placement = fit.placement_at(found[1], (0, target.matrix[0]), use.transposed)
                site = Site(
                    target=target, parts=(ConstantPart(use.root, (use,), (placement,)),), evidence="content"
                )
        return site


def _compare(use: Use, base: Array) -> tuple[float, int] | None:
    """Return the mean cosine of a few rows, and the row of the stored weight where the module begins."""
    assert use.root.const_value is not None
    stored = stored_matrix(use.root.const_value)
    view = stored.T if use.transposed else stored
    rows = len(base)
    if view.shape[1] != base.shape[1] or len(view) < rows:
        return None
    picks = np.unique(np.linspace(0, rows - 1, _ROWS).astype(int))
    offset = 0
    if len(view) > rows:
        window = np.asarray(view[picks[0] : len(view) - rows + picks[0] + 1], np.float32)
        offset = int(np.argmax(_cosines(window, base[picks[0]][None])))
    sample = np.asarray(view[offset + picks], np.float32)
    return float(_cosines(sample, np.asarray(base[picks], np.float32)).mean()), offset


def _cosines(left: Array, right: Array) -> Array:
    products = (left * right).sum(axis=1)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    found: Array = products / np.maximum(norms, 1e-30)
    return found
