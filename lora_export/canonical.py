"""The canonical weight of a target, as the base checkpoint stores it: what content is compared with."""

from __future__ import annotations

from lora_export.adapter import Array
from lora_export.checkpoint import Checkpoint
from lora_export.checkpoint_names import Names
from lora_export.sites.target import Target


class CheckpointWeights:
    """Looks up targets in a checkpoint; call it with a target.

    Args:
        checkpoint: The folder that the graph was exported from.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = Names(checkpoint)

    def __call__(self, target: Target) -> Array | None:
        """Return a view in the target's canonical shape, or None.

        None where the checkpoint doesn't store it (a tied head), stores it in pieces (experts one by one),
        or in another shape. Conv1D's ``(in_dim, out_dim)`` is returned transposed; a square one can't be
        told from Linear's by its shape, so that a comparison has to try both orientations.
        """
        parts = self._names.find(target.key)
        if isinstance(parts, str) or len(parts) != 1:
            return None
        (part,) = parts
        if part.expert is not None or part.piece != (0, 1):
            return None
        values = self._checkpoint.read(part.tensor)
        if target.experts > 1:
            return values if values.ndim == 3 else None
        if values.shape == target.shape:
            return values
        if target.kind in ("linear", "any") and values.ndim == 2 and values.shape == target.shape[::-1]:
            return values.T
        return None
