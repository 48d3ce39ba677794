"""How large a base model is, from headers and file sizes: no weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import AdapterError, CheckpointError, GraphError
from lora_export.formats.tensors import read_header

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseSize:
    """Size of a base model.

    Attributes:
        path: What was measured.
        parameters: Stored values (tied weights once); None where the files don't tell without reading them.
        size_bytes: Of the weights.
    """

    path: str
    parameters: int | None
    size_bytes: int


def base_size(path: Path) -> BaseSize:
    """Measure a Hugging Face checkpoint folder or an ONNX file with its external data.

    Raises:
        CheckpointError: Nothing is there, or a folder without weights.
        GraphError: A damaged ONNX file.
    """
    if path.is_file() and path.suffix == ".onnx":
        return _onnx_size(path)
    if not path.is_dir():
        raise CheckpointError(
            f"there is no base model at {path}", "give a Hugging Face folder or an .onnx file"
        )
    shards = _shards(path)
    if shards:
        try:
            entries = [entry for shard in shards for entry in read_header(shard).entries.values()]
        except AdapterError as error:
            raise CheckpointError(error.message, error.hint, error.problems) from error
        return BaseSize(str(path), sum(e.parameters for e in entries), sum(e.stop - e.start for e in entries))
    pickles = sorted(path.glob("pytorch_model*.bin"))
    if pickles:
        return BaseSize(str(path), None, sum(file.stat().st_size for file in pickles))
    raise CheckpointError(
        f"{path} has no .safetensors or pytorch_model.bin", "give the folder of a Hugging Face model"
    )


def _shards(path: Path) -> list[Path]:
    index = path / _INDEX
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of shards", "download it again") from error
    return sorted(path / name for name in names)


def _onnx_size(path: Path) -> BaseSize:
    import onnx_ir as ir

    try:
        model = ir.load(path)
    # onnx_ir passes on whatever protobuf raised.
    except Exception as error:
        raise GraphError(f"{path} can't be read as ONNX: {error}", "export it again") from error
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    files = {path.parent / tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise GraphError(f"{path} points at external data that isn't there", "put it beside", missing)
    parameters = sum(math.prod(tensor.shape.numpy()) for tensor in tensors if tensor is not None)
    return BaseSize(str(path), parameters, sum(t.nbytes for t in tensors if t is not None))
