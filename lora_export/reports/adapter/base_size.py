"""Measure the size of a base model from headers and file sizes, without reading weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.errors import CheckpointError
from lora_export.untrusted.places import is_file, is_folder, listed


@dataclass(frozen=True)
class BaseSize:
    """Size of a base.

    Attributes:
        path: File or folder of the base.
        parameters: Number of stored values (tied weights once); None if only reading the weights would tell.
        size_bytes: Size of the weights in bytes.
    """

    path: str
    parameters: int | None
    size_bytes: int


def base_size(path: Path) -> BaseSize:
    """Measure a Hugging Face checkpoint folder or an ONNX file with its external data.

    Raises:
        CheckpointError: The path doesn't exist, or its folder is damaged or has no weights.
        GraphError: The ONNX file is damaged or lacks its external data.
    """
    if is_file(path):
        return _onnx_size(path)
    if not is_folder(path):
        raise CheckpointError(
            f"there is no base model at {path}", "give a Hugging Face folder or an .onnx file"
        )
    pickles = listed(path, "pytorch_model*.bin")
    if pickles and not listed(path, "*.safetensors*"):
        return BaseSize(str(path), None, sum(file.stat().st_size for file in pickles))
    tensors = Checkpoint.open(path).tensors.values()  # says what a folder without weights is
    return BaseSize(str(path), sum(math.prod(t.shape) for t in tensors), sum(t.length for t in tensors))


def _onnx_size(path: Path) -> BaseSize:
    from lora_export.graph.onnx_file import byte_size, load_graph, shape_of

    tensors = [value.const_value for value in load_graph(path).initializers()]
    sizes = [(math.prod(shape_of(t)), byte_size(t)) for t in tensors if t is not None]
    return BaseSize(str(path), sum(count for count, _ in sizes), sum(size for _, size in sizes))
