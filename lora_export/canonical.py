"""The canonical weight of a target, as the base checkpoint stores it: what content is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Adapter, Array
from lora_export.checkpoint import Checkpoint
from lora_export.checkpoint_names import Names, Part
from lora_export.errors import OutputError
from lora_export.graph import GraphFile, shape_of
from lora_export.sites.experts import is_turned, settle
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
        """Return a view in the target's canonical shape, or None; of stacked experts, the first and the last.

        None where the checkpoint doesn't store it (a tied head) or in another shape. Conv1D's ``(in_dim,
        out_dim)`` is returned transposed; a square one can't be told from Linear's by its shape, so that a
        comparison has to try both orientations. A module's own parameter is returned as the module holds it.
        """
        parts = self._names.find(target.key)
        if isinstance(parts, str) or not parts:
            return None
        if target.experts > 1:
            return self._end_experts(target, parts)
        if len(parts) != 1 or parts[0].piece != (0, 1) or parts[0].expert is not None:
            return None
        values = self._checkpoint.read(parts[0].tensor)
        values = values.T if parts[0].transposed else values
        if target.kind == "parameter" and values.ndim == 3 and len(values) == 1:
            values = values[0]
        if values.shape == target.shape:
            return values
        if target.kind in ("linear", "any") and values.ndim == 2 and values.shape == target.shape[::-1]:
            return values.T
        return None

    def settled(self, adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
        """Return the adapter with the layout of its experts as this base has it, and notes on that."""
        return settle(adapter, self._names.held)

    def _end_experts(self, target: Target, parts: Sequence[Part]) -> Array | None:
        """Return ``(2, …, …)``: the first and the last expert, put together where stored in pieces."""
        experts = target.experts
        if len(parts) == 1 and parts[0].expert is None:
            values = self._checkpoint.read(parts[0].tensor)
            if values.ndim != 3 or len(values) != experts:
                return None
            held = self._names.held(target.key)
            turned = parts[0].transposed or (held is not None and is_turned(values.shape, held.shape))
            return values[[0, -1]].swapaxes(-1, -2) if turned else values[[0, -1]]
        ends = []
        for expert in (0, experts - 1):
            mine = sorted((part for part in parts if part.expert == expert), key=lambda part: part.piece)
            if not mine or len(mine) != mine[0].piece[1]:
                return None
            ends.append(np.concatenate([self._checkpoint.read(part.tensor) for part in mine]))
        return np.stack(ends)


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
            f"no weight of the graph can stay in {checkpoint.folder}, whose dtype is another",
            "give --dtype as the checkpoint has it, or leave out --share-base",
        )
    return files
