"""What a format gets to read: one weights file, the config beside it, and what the user stated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter, Array
from lora_export.errors import AdapterError
from lora_export.formats.ort_file import SUFFIX as ORT_SUFFIX
from lora_export.formats.ort_file import read_ort_file
from lora_export.formats.pickles import SUFFIXES, read_checkpoint
from lora_export.formats.provenance import is_converted
from lora_export.formats.tensors import file_sha256, header_sha256, read_safetensors

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# TensorRT-Edge-LLM's folder of one adapter, in the layout of its engines' inputs.
EDGE_LLM_NAME = "processed_adapter_model.safetensors"
_DIFFUSERS_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class Options:
    """What the user states where the file is silent.

    Attributes:
        alpha: Numerator of the scaling.
        rank: Rank of one product.
        rslora: Divide by √rank.
        component: Read only this part of a file that serves several models.
    """

    alpha: float | None = None
    rank: int | None = None
    rslora: bool | None = None
    component: str | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """An adapter file that has been opened.

    Attributes:
        path: What the user gave.
        file: The weights file.
        name: The folder's or the file's name.
        tensors: Name → values.
        metadata: Of a ``.safetensors`` file.
        settings: Of a torch checkpoint: ``alpha``, ``rank``, ``scaling``, ``rslora``, ``enable_lora``; of an
            ``.onnx_adapter`` its versions.
        config: ``adapter_config.json``, if there is one.
        sha256: Of the weights file, see `Adapter.sha256`.
        notes: What was left aside while opening it.
    """

    path: Path
    file: Path
    name: str
    tensors: Mapping[str, Array]
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    sha256: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A file format of adapters: an entry of `lora_export.formats.FORMATS`.

    Attributes:
        expects: The tensor names that it reads, for the error that lists the formats.
        recognises: Whether a source is of this format.
        read: Make the adapter; raises `AdapterError` with every problem found.
        certain: What `recognises` looks at leaves no doubt (who wrote the file): nobody else is asked.
    """

    expects: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source, Options], Adapter]
    certain: bool = False


def open_source(path: Path, name: str | None = None) -> Source:
    """Find the weights file at ``path`` (a folder or a file), open it, and read the config beside it.

    Raises:
        AdapterError: Nothing is there, no weights file or more than one is, or one of the files is damaged.
    """
    file = _weights_file(path)
    metadata: dict[str, str] = {}
    settings: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if file.suffix == ".safetensors":
        tensors, metadata = read_safetensors(file)
    elif file.suffix in SUFFIXES:
        checkpoint = read_checkpoint(file)
        tensors, settings = checkpoint.tensors, checkpoint.settings
        if checkpoint.ignored:
            notes = (f"left aside, training bookkeeping: {', '.join(checkpoint.ignored)}",)
    elif file.suffix == ORT_SUFFIX:
        tensors, versions = read_ort_file(file)
        settings = dict(versions)
    else:
        raise AdapterError(
            f"{file} is no adapter: its name ends in {file.suffix or 'nothing'!r}",
            f"give a PEFT folder, or a file ending in .safetensors, {', '.join(SUFFIXES)}, {ORT_SUFFIX}",
        )
    config_file = file.parent / CONFIG_NAME
    own_name = file.parent.resolve().name if file.name in (*WEIGHT_NAMES, EDGE_LLM_NAME) else file.stem
    return Source(
        path=path,
        file=file,
        name=name or (path.resolve().name if path.is_dir() else own_name),
        tensors=tensors,
        metadata=metadata,
        settings=settings,
        config=read_config(config_file) if config_file.is_file() else None,
        # A converted file's header names the adapter it was made of: a session that loads it need not wait.
        sha256=header_sha256(file) if is_converted(metadata) else file_sha256(file),
        notes=notes,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read an ``adapter_config.json``.

    Raises:
        AdapterError: It is not JSON, or not an object with ``peft_type``.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON: {error}", "save the adapter again") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(
            f"{path} is JSON but no adapter config: it has no 'peft_type'",
            "give the folder that PEFT's save_pretrained wrote, not the base model's",
        )
    return config


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        hint = "check the path"
        if path.parts and len(path.parts) == 2 and not path.is_absolute():
            hint = (
                f"check the path; for a model on the Hub, first: hf download {path} --local-dir {path.name}"
            )
        raise AdapterError(f"there is no adapter at {path}", hint)
    if not path.is_dir():
        raise AdapterError(f"{path} is neither a file nor a folder", "give a PEFT folder or a weights file")
    for name in (*WEIGHT_NAMES, *_DIFFUSERS_NAMES, EDGE_LLM_NAME):
        if (path / name).is_file():
            return path / name
    if (path / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{path} has {CONFIG_NAME} but no {' or '.join(WEIGHT_NAMES)}", "save or download the weights too"
        )
    return _only_candidate(path)


def _only_candidate(path: Path) -> Path:
    nested = sorted(child.parent.name for child in path.glob(f"*/{CONFIG_NAME}"))
    if nested:
        raise AdapterError(
            f"{path} holds adapters in its subfolders, none itself",
            "give one of these",
            [str(path / child) for child in nested],
        )
    if (path / "config.json").is_file():
        raise AdapterError(
            f"{path} is a model, not an adapter: it has config.json and no {CONFIG_NAME}",
            "give the adapter's folder; the base model goes behind --base",
        )
    found = sorted(
        child for child in path.iterdir() if child.suffix in (".safetensors", *SUFFIXES, ORT_SUFFIX)
    )
    if len(found) == 1:
        return found[0]
    raise AdapterError(
        f"{path} holds {len(found)} weights files and no {CONFIG_NAME}",
        "give one of the files" if found else "give the folder that PEFT's save_pretrained wrote",
        [child.name for child in found],
    )
