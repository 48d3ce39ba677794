"""The weights of a Hugging Face folder: where each tensor lies in which safetensors file, without torch.

Only headers are read. Every rule of the format that a damaged or hand-made file can break is checked
before anything is written (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import CheckpointError

FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_OTHERS: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}
DTYPES = {**FLOATS, **_OTHERS}
# What the format's own reader refuses as well: a header beyond this is no header.
_MAX_HEADER_BYTES = 100_000_000
_OTHER_FORMATS = {
    "pytorch_model.bin": "PyTorch pickles",
    "pytorch_model.bin.index.json": "PyTorch pickles",
    "tf_model.h5": "TensorFlow weights",
    "flax_model.msgpack": "Flax weights",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the file.
        file: The file that holds it.
        code: The format's word for the dtype, such as ``BF16``.
        shape: Its shape.
        offset: Where it starts, in bytes from the start of the file.
        length: Its size in bytes.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: The file.
        size: Its size in bytes.
        data_start: Where the tensors start: behind the header.
        header: The header, in its own order.
        tensors: The tensors by their place in the file.
    """

    path: Path
    size: int
    data_start: int
    header: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's weights.

    Attributes:
        folder: The folder.
        config: Its config.json; empty where there is none.
        shards: The safetensors files, in the order of their names.
        tensors: Tensor name → where it is, over all shards.
        index: The index file of a sharded checkpoint, or None.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor]
    index: Path | None

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of a folder and check them.

        Raises:
            CheckpointError: The folder is missing, holds no safetensors, or a file breaks a rule; all
                problems are listed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"the base {folder} is not a folder",
                "give a local folder with config.json and model.safetensors; a model of the hub is "
                "fetched with: hf download NAME --local-dir DIR",
            )
        config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        index, names = _weight_files(folder)
        problems: list[str] = []
        shards = [shard for name in names if (shard := _read_shard(folder / name, problems)) is not None]
        tensors = _joined(shards, problems)
        if index is not None and not problems:
            _check_index(index, tensors, problems)
        if problems:
            raise CheckpointError(
                f"the base {folder} is damaged or incomplete", "download or save it again", problems
            )
        return cls(folder, config, tuple(shards), tensors, index)

    def read(self, name: str) -> Array:
        """Return a tensor's values as a read-only view of the mapped file.

        Raises:
            CheckpointError: There is no such tensor, or numpy has no dtype for it.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.folder} has no tensor '{name}'", "see `lora-export inspect`")
        if tensor.code not in DTYPES:
            raise CheckpointError(
                f"tensor '{name}' has the dtype {tensor.code}", "only copying it is possible"
            )
        dtype = DTYPES[tensor.code]
        if tensor.length == 0:
            return np.zeros(tensor.shape, dtype)
        raw = np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.length,))
        return raw.view(np.ndarray).view(dtype).reshape(tensor.shape)


def _weight_files(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the index, if any, and the names of the weight files."""
    single = folder / "model.safetensors"
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if single.exists() and not indexes:
        return None, [single.name]
    if len(indexes) > 1 or (single.exists() and indexes):
        names = [path.name for path in ([single] if single.exists() else []) + indexes]
        raise CheckpointError(f"{folder} holds several sets of weights", "keep one of them", names)
    if indexes:
        weight_map = _read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(
                f"{indexes[0]} has no 'weight_map' from tensor to file", "save the base again"
            )
        return indexes[0], sorted(set(weight_map.values()))
    others = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    if len(others) == 1:
        return None, others
    if others:
        raise CheckpointError(
            f"{folder} holds {len(others)} safetensors files and no index that says which belong together",
            "download model.safetensors.index.json as well, or save the base again",
            others,
        )
    raise _no_safetensors(folder)


def _no_safetensors(folder: Path) -> CheckpointError:
    found = [f"{name}: {kind}" for name, kind in _OTHER_FORMATS.items() if (folder / name).exists()]
    found += [f"{path.name}: GGUF" for path in sorted(folder.glob("*.gguf"))]
    if (folder / "adapter_config.json").exists():
        return CheckpointError(f"{folder} is an adapter, not a base model", "give it to --adapter")
    return CheckpointError(
        f"{folder} holds no safetensors",
        "convert the base: transformers' from_pretrained(...), for a GGUF with gguf_file=..., then "
        "save_pretrained(DIR, safe_serialization=True)",
        found,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object", "save it again")
    return value


def _read_shard(path: Path, problems: list[str]) -> Shard | None:
    """Return a file's layout, or None after adding to ``problems``."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                problems.append(
                    f"{path.name}: {size} bytes, header of {length}: truncated, or no safetensors"
                )
                return None
            raw = file.read(length)
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror or error}")
        return None
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        tensors = [
            _stored(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        ]
    except ValueError as error:
        problems.append(f"{path.name}: {error}")
        return None
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.length))
    problem = _layout_problem(tensors, 8 + length, size)
    if problem:
        problems.append(f"{path.name}: {problem}")
        return None
    return Shard(path, size, 8 + length, header, tuple(tensors))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"the header names {', '.join(twice)} twice")
    return dict(pairs)


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Return a header entry as a tensor; ValueError says which rule it breaks."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"the header's entry for '{name}' lacks dtype, shape or data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if len(numbers) != len(shape) + 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"'{name}' has the shape {shape} and data_offsets {offsets}: not counts")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[code].itemsize if code in DTYPES else end - begin
    if begin > end or end - begin != wanted:
        raise ValueError(f"'{name}' {code} {shape} needs {wanted} bytes, data_offsets give {end - begin}")
    return StoredTensor(name, path, code, tuple(shape), data_start + begin, end - begin)


def _layout_problem(tensors: list[StoredTensor], data_start: int, size: int) -> str:
    """Return what is wrong with the tensors' places, or nothing. The format knows no gaps."""
    expected = data_start
    for tensor in tensors:
        if tensor.offset < expected:
            return f"'{tensor.name}' overlaps the tensor before it"
        if tensor.offset > expected:
            return f"{tensor.offset - expected} bytes before '{tensor.name}' belong to no tensor"
        expected = tensor.offset + tensor.length
        if expected > size:
            return f"'{tensor.name}' ends at byte {expected}, the file at {size}: truncated"
    return "" if expected == size else f"{size - expected} bytes at the end belong to no tensor"


def _joined(shards: list[Shard], problems: list[str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                problems.append(f"'{tensor.name}' is in both {first.file.name} and {shard.path.name}")
    return tensors


def _check_index(index: Path, tensors: Mapping[str, StoredTensor], problems: list[str]) -> None:
    for name, file in _read_json(index)["weight_map"].items():
        if name not in tensors:
            problems.append(f"{index.name} puts '{name}' into {file}, which doesn't hold it")
        elif tensors[name].file.name != file:
            problems.append(f"{index.name} puts '{name}' into {file}; it is in {tensors[name].file.name}")
