"""Open the weights of a Hugging Face folder: each tensor's file and offset, without torch.

Only headers are read, and checked by `lora_export.storage.safetensors` before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.base.checkpoint.own_code import code_notes
from lora_export.base.checkpoint.sentence_modules import transformer_folder
from lora_export.base.checkpoint.weight_files import find_weights, read_object
from lora_export.errors import CheckpointError
from lora_export.storage.inputs import note_inputs, refuse_changed_inputs
from lora_export.storage.safetensors import DTYPES, FileHeader, HeaderError, StoredTensor, read_file_header
from lora_export.storage.stream import read_into
from lora_export.untrusted.links import refuse_links
from lora_export.untrusted.places import exists, is_file, is_folder, listed

_OTHER_FORMATS = {
    "pytorch_model.bin": "PyTorch pickles",
    "pytorch_model.bin.index.json": "PyTorch pickles",
    "tf_model.h5": "TensorFlow weights",
    "flax_model.msgpack": "Flax weights",
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights of a folder.

    Attributes:
        folder: The folder.
        config: Its config.json; empty if there is none.
        shards: The safetensors files' headers, in the order of their names.
        tensors: Tensor name → tensor, over all shards.
        index: The index file of a sharded checkpoint, or None.
        notes: Notes on other sets of weights, and on code that is not run.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[FileHeader, ...]
    tensors: Mapping[str, StoredTensor]
    index: Path | None
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of a folder and check them.

        Raises:
            CheckpointError: The folder is missing, holds no safetensors, or a file breaks a rule; all
                problems are listed.
        """
        folder = Path(folder)
        if not is_folder(folder):
            raise no_folder(folder)
        note_inputs(model_files(folder))
        config = read_config(folder)
        found = find_weights(folder, is_diffusers=_diffusers_class(config) != "", config=config)
        if found is None:
            raise _no_safetensors(folder, _diffusers_class(config))
        refuse_links(
            folder, [folder / name for name in ("config.json", found.name, *found.files)], CheckpointError
        )
        index, problems = found.index, list[str]()
        shards = [
            shard for name in found.files if (shard := _read_shard(folder / name, problems)) is not None
        ]
        tensors = _joined(shards, problems)
        if index is not None and not problems:
            _check_index(index, tensors, problems)
        if problems:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged or incomplete", "download or save it again", problems
            )
        notes = (*found.notes, *code_notes(config))
        return cls(
            folder=folder, config=config, shards=tuple(shards), tensors=tensors, index=index, notes=notes
        )

    @property
    def diffusers_class(self) -> str:
        """Class of a diffusers model, which transformers doesn't know; empty for others."""
        return _diffusers_class(self.config)

    def read(self, name: str) -> Array:
        """Return a tensor's values as a read-only view of the mapped file.

        Raises:
            CheckpointError: The tensor doesn't exist, numpy has no dtype for it, or its file was cut short.
            InputChangedError: The file was replaced or written to since it was opened.
        """
        tensor = self._readable(name)
        dtype = DTYPES[tensor.code]
        if tensor.length == 0:
            return np.zeros(tensor.shape, dtype)
        try:
            raw = np.memmap(tensor.file, np.uint8, "r", offset=tensor.offset, shape=(tensor.length,))
        except (OSError, ValueError) as error:
            refuse_changed_inputs()
            raise CheckpointError(
                f"{tensor.file} can't be read where '{name}' lies, at bytes {tensor.offset} to "
                f"{tensor.end}: {getattr(error, 'strerror', None) or error}",
                "run it again when nobody writes the base",
            ) from error
        return raw.view(np.ndarray).view(dtype).reshape(tensor.shape)

    def read_blocks(self, name: str, size: int) -> Iterator[Array]:
        """Yield a tensor's values in their order, flat, ``size`` or fewer at a time, in one reused buffer.

        Raises:
            CheckpointError: As `read`.
            InputChangedError: The file was replaced or written to since it was opened.
        """
        tensor = self._readable(name)
        dtype = DTYPES[tensor.code]
        buffer = np.empty(min(size, tensor.length // dtype.itemsize), dtype)
        with tensor.file.open("rb") as file:
            for start in range(tensor.offset, tensor.end, max(1, buffer.nbytes)):
                values = buffer[: (tensor.end - start) // dtype.itemsize]
                try:
                    read_into(file.fileno(), tensor.file, values.view(np.uint8).data, start)
                except CheckpointError:
                    refuse_changed_inputs()
                    raise
                yield values

    def _readable(self, name: str) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.folder} has no tensor '{name}'", "see `lora-export inspect`")
        if tensor.code not in DTYPES:
            raise CheckpointError(
                f"tensor '{name}' has the dtype {tensor.code}", "only copying it is possible"
            )
        return tensor


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that define its model: weights, indexes and configs."""
    kinds = ("*.safetensors", "*.bin", "*config.json", "*.index*.json")
    return [path for kind in kinds for path in listed(folder, kind)]


def no_folder(path: Path) -> CheckpointError:
    """Return the error for a path that should be a checkpoint's folder and is not."""
    if path.suffix == ".onnx" and is_file(path):
        hint = "give the checkpoint folder that it was exported from"
        return CheckpointError(f"{path} is a graph already, not a folder of a checkpoint", hint)
    hint = "give a local folder with config.json and model.safetensors"
    if is_file(path):
        return CheckpointError(f"{path} is a file, not a folder of a checkpoint", hint)
    # An absolute path is not a name on a hub, and neither is one of three parts.
    if len(path.parts) == 2 and not path.is_absolute():
        hint = f"check the path; for a model on the Hub, first: hf download {path} --local-dir {path.name}"
    return CheckpointError(f"no folder at {path}", hint)


def _diffusers_class(config: Mapping[str, Any]) -> str:
    return "" if "model_type" in config else str(config.get("_class_name", ""))


def _no_safetensors(folder: Path, diffusers_class: str) -> CheckpointError:
    found = [f"{name}: {kind}" for name, kind in _OTHER_FORMATS.items() if exists(folder / name)]
    found += [f"{path.name}: GGUF" for path in listed(folder, "*.gguf")]
    if exists(folder / "adapter_config.json"):
        return CheckpointError(f"{folder} is an adapter, not a base model", "give it to --adapter")
    if exists(folder / "model_index.json"):
        return several_models(folder)
    if (transformer := transformer_folder(folder)) is not None:
        return CheckpointError(
            f"{folder} is a model of sentence-transformers whose transformer has a folder of its own",
            f"give {transformer} as the base, and put what is written in its place in a copy of {folder}",
        )
    if snapshots := [path for path in listed(folder / "snapshots") if is_folder(path)]:
        return CheckpointError(
            f"{folder} is a model's folder in the Hugging Face cache, above its snapshots",
            f"give the snapshot: {snapshots[-1]}" if len(snapshots) == 1 else "give one of its snapshots",
            [str(path) for path in snapshots[1:] and snapshots],
        )
    if diffusers_class:
        return CheckpointError(
            f"{folder} holds a model of diffusers ({diffusers_class}) without safetensors",
            "download its weights, or save it with diffusers' save_pretrained(DIR, safe_serialization=True)",
            [f"{path.name}: other weights" for path in listed(folder, "*.bin")],
        )
    return CheckpointError(
        f"{folder} holds no safetensors",
        "convert the base: transformers' from_pretrained(...), for a GGUF with gguf_file=..., then "
        "save_pretrained(DIR, safe_serialization=True)",
        found,
    )


def several_models(folder: Path) -> CheckpointError:
    """Return the error for a pipeline where one of its models is wanted."""
    below = filter(is_folder, listed(folder))
    parts = [path.name for path in below if listed(path, "*.safetensors") or listed(path, "config.json")]
    return CheckpointError(
        f"{folder} is a diffusers pipeline of several models, not one",
        f"give the folder of one of them: {', '.join(parts) or 'unet, transformer, text_encoder, …'}",
        [str(folder / part) for part in parts],
    )


def diffusers_class(folder: Path) -> str:
    """Return the class of the diffusers model in a folder, with or without its weights; "" for others.

    Raises:
        CheckpointError: The config can't be read.
    """
    return _diffusers_class(read_config(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json; an empty dict if it has none.

    Raises:
        CheckpointError: The file can't be read.
    """
    file = folder / "config.json"
    config = read_object(file) if exists(file) else {}
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(
            f"{file}: architectures is {names!r}, wanted a list of class names",
            "write the class that it was saved from, or download the file again",
        )
    return config


def _read_shard(path: Path, problems: list[str]) -> FileHeader | None:
    """Return a file's header, or None after adding to ``problems``."""
    try:
        return read_file_header(path)
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror or error}")
    except HeaderError as error:
        problems += [f"{path.name}: {problem}" for problem in error.problems]
    return None


def _joined(shards: list[FileHeader], problems: list[str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                problems.append(f"'{tensor.name}' is in both {first.file.name} and {shard.path.name}")
    return tensors


def _check_index(index: Path, tensors: Mapping[str, StoredTensor], problems: list[str]) -> None:
    for name, file in read_object(index)["weight_map"].items():
        if name not in tensors:
            problems.append(f"{index.name} puts '{name}' into {file}, which doesn't hold it")
        elif tensors[name].file.name != file:
            problems.append(f"{index.name} puts '{name}' into {file}; it is in {tensors[name].file.name}")
