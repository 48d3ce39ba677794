"""The canonical weight of a target, as the base checkpoint stores it: what content is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.checkpoint import Checkpoint
from lora_export.checkpoint_names import Names
from lora_export.errors import OutputError
from lora_export.graph import GraphFile, shape_of
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


def link_weights(graph: GraphFile, checkpoint: Checkpoint) -> set[Path]:
    """Let each constant that the checkpoint stores byte for byte refer to the ``.safetensors`` file instead.

    ONNX external data may lie at any offset of any file in the model's folder, also inside a checkpoint.

    Returns:
        The checkpoint files that are referred to.

    Raises:
        OutputError: No constant is stored there in this dtype and orientation.
    """
    files: set[Path] = set()
    for value in graph.initializers():
        tensor, stored = value.const_value, checkpoint.tensors.get(str(value.name))
        if tensor is None or stored is None or stored.shape != shape_of(tensor):
            continue
        values = checkpoint.read(stored.name)
        if values.dtype == tensor.dtype.numpy() and np.array_equal(values, tensor.numpy()):
            value.const_value = ir.ExternalTensor(
                stored.file.name,
                stored.offset,
                stored.length,
                tensor.dtype,
                shape=ir.Shape(stored.shape),
                name=str(value.name),
                base_dir=stored.file.parent,
            )
            files.add(stored.file)
    if not files:
        raise OutputError(
            f"no weight of the graph can stay in {checkpoint.folder}: a captured graph is float32",
            "save the checkpoint in float32, or leave out --share-base",
        )
    return files
