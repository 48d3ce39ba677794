"""What a format gets to read: one weights file, the config beside it, and what the user stated."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter, Array
from lora_export.errors import AdapterError, InputChangedError
from lora_export.formats.reading.adapter_name import strip_adapter_name
from lora_export.formats.reading.ort_file import SUFFIX as ORT_SUFFIX
from lora_export.formats.reading.ort_file import read_ort_file
from lora_export.formats.reading.pickles import SUFFIXES, read_checkpoint
from lora_export.formats.reading.tensors import file_sha256, read_safetensors
from lora_export.formats.reading.weights_files import (
    CONFIG_NAME,
    EDGE_LLM_NAME,
    MLX_NAME,
    WEIGHT_NAMES,
    WeightsFiles,
    find_weights,
    is_mlx_name,
)
from lora_export.formats.reading.wrappers import unwrap
from lora_export.storage.inputs import FileState, note_states, refuse_changed, same_inputs
from lora_export.untrusted.documents import read_json

__all__ = [
    "CONFIG_NAME",
    "EDGE_LLM_NAME",
    "FORMAT_OPTION",
    "WEIGHT_NAMES",
    "Format",
    "Options",
    "Source",
    "open_source",
]
# How commands call the choice of a format; convert-adapter's --format is that of its output.
FORMAT_OPTION = "--format (convert-adapter: --from-format)"
_MAX_LISTED = 40
_TRIES = 3


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
        file: The weights file; of several shards the first.
        name: The folder's or the file's name.
        tensors: Name → values.
        metadata: Of a ``.safetensors`` file.
        settings: Of a torch checkpoint: ``alpha``, ``rank``, ``scaling``, ``rslora``, ``enable_lora``; of an
            ``.onnx_adapter`` its versions.
        mentions: Of a torch checkpoint: numbers called alpha that may be LoRA's or not (where, value).
        config: ``adapter_config.json``, if there is one that belongs to the file: PEFT's, or mlx-lm's.
        sha256: Of the weights file, see `Adapter.sha256`.
        notes: What was left aside while opening it.
        states: Of the weights files, as they were read.
    """

    path: Path
    file: Path
    name: str
    tensors: Mapping[str, Array]
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    mentions: tuple[tuple[str, float], ...] = ()
    config: Mapping[str, Any] | None = None
    sha256: str = ""
    notes: tuple[str, ...] = ()
    states: tuple[FileState, ...] = ()

    @property
    def peft_config(self) -> Mapping[str, Any] | None:
        """The config, if it is PEFT's."""
        return self.config if self.config is not None and "peft_type" in self.config else None

    @property
    def paths(self) -> Mapping[str, str]:
        """Tensor's name → the same without wrappers and without the adapter's name; what formats match."""
        return self._read_names[0]

    def entries(self) -> Iterator[tuple[str, str, Array]]:
        """Yield ``(name, path, values)`` of every tensor.

        Raises:
            AdapterError: See `check_names`.
        """
        self.check_names()
        for name, path in self.paths.items():
            yield name, path, self.tensors[name]

    def check_names(self) -> None:
        """Raise if the names say nothing for sure: whatever else is wrong then would only follow from it.

        Raises:
            AdapterError: Two tensors have one path, or the file holds several models or several adapters.
        """
        if problems := self._read_names[1]:
            listed = problems if len(problems) <= _MAX_LISTED else [
                *problems[:_MAX_LISTED], f"… and {len(problems) - _MAX_LISTED} more"
            ]  # fmt: skip
            raise AdapterError(
                f"adapter '{self.name}': the names of its tensors are ambiguous ({self.file})",
                "save one adapter of one model, without the other names",
                listed,
            )

    @cached_property
    def _read_names(self) -> tuple[Mapping[str, str], list[str]]:
        unwrapped = unwrap(self.tensors)
        paths, problems = strip_adapter_name(unwrapped.paths)
        return paths, [*unwrapped.problems, *problems]


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
    """Find the weights files at ``path`` (a folder or a file), open them, and read the config beside them.

    Raises:
        AdapterError: Nothing is there, no weights file or more than one is, or one of the files is damaged.
        InputChangedError: A file of the adapter has changed while it was read, each time that it was tried.
    """
    # A download or a copy renames one file after the other: it is done with all of them soon.
    for _ in range(_TRIES - 1):
        with contextlib.suppress(InputChangedError):
            return _open_once(path, name)
    return _open_once(path, name)


def _open_once(path: Path, name: str | None) -> Source:
    """Open all files of an adapter in one state of them."""
    # Looked for twice: all that is read has its state taken before the first of it is.
    states = tuple(map(FileState.of, find_weights(path).places))
    try:
        with same_inputs():  # what is noted in a try that fails is none
            source = _open_files(path, name, states)
    except AdapterError:  # of files that do not belong together, perhaps
        refuse_changed(states)
        raise
    refuse_changed(states)
    note_states(states)
    return source


def _open_files(path: Path, name: str | None, states: Sequence[FileState]) -> Source:
    found = find_weights(path)
    if (now := {place.absolute() for place in found.places}) != (then := {state.path for state in states}):
        raise InputChangedError(
            f"the files of the adapter at {path} have changed while being read",
            "run it again when nobody writes them",
            sorted(map(str, now ^ then)),
        )
    opened = [_open_file(path, file) for file in found.files]
    first = opened[0]
    file = first.file
    config = read_config(found.config) if found.config is not None else None
    notes = [*(note for one in opened for note in one.notes), *found.notes]
    if config is not None and is_mlx_name(file.name) and "peft_type" in config:
        notes.append(f"{found.config} was not used: it is PEFT's, and {file.name} is mlx-lm's")
        config = None
    own_name = (
        file.parent.resolve().name if file.name in (*WEIGHT_NAMES, EDGE_LLM_NAME, MLX_NAME) else file.stem
    )
    return Source(
        path=path,
        file=file,
        name=name or (path.resolve().name if path.is_dir() else own_name),
        tensors=first.tensors if len(opened) == 1 else _joined(found, opened),
        metadata=first.metadata,
        settings=first.settings,
        mentions=first.mentions,
        config=config,
        sha256=first.sha256 if len(opened) == 1 else _joined_sha256(opened),
        notes=tuple(notes),
        states=tuple(state for one in opened for state in one.states),
    )


def _open_file(path: Path, file: Path) -> Source:
    """Read one weights file; what it holds and its hash are of one state of it."""
    before = FileState.of(file)
    metadata: dict[str, str] = {}
    settings: dict[str, Any] = {}
    mentions: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    if file.suffix == ".safetensors":
        tensors, metadata = read_safetensors(file)
    elif file.suffix in SUFFIXES:
        checkpoint = read_checkpoint(file)
        tensors, settings, mentions = checkpoint.tensors, checkpoint.settings, tuple(checkpoint.mentions)
        if checkpoint.ignored:
            notes = (f"left aside, the training's own: {', '.join(checkpoint.ignored)}",)
    elif file.suffix == ORT_SUFFIX:
        tensors, versions = read_ort_file(file)
        settings = dict(versions)
    else:
        raise AdapterError(
            f"{file} is no adapter: its name ends in {file.suffix or 'nothing'!r}",
            f"give a PEFT folder, or a file ending in .safetensors, {', '.join(SUFFIXES)}, {ORT_SUFFIX}",
        )
    # All bytes, also of a converted file: values may change under a header that stays as it is.
    sha256 = file_sha256(file)
    refuse_changed([before])
    return Source(
        path=path,
        file=file,
        name=file.stem,
        tensors=tensors,
        metadata=metadata,
        settings=settings,
        mentions=mentions,
        sha256=sha256,
        notes=notes,
        states=(before,),
    )


def _joined(found: WeightsFiles, shards: list[Source]) -> dict[str, Array]:
    """Return the tensors of all shards.

    Raises:
        AdapterError: A name is in two shards, or the index says otherwise.
    """
    tensors: dict[str, Array] = {}
    owner: dict[str, str] = {}
    problems = []
    for shard in shards:
        for name, values in shard.tensors.items():
            if name in owner:
                problems.append(f"{name}: in {owner[name]} and in {shard.file.name}")
            owner[name] = shard.file.name
            tensors[name] = values
    for name, where in (found.index or {}).items():
        if owner.get(name) != where:
            problems.append(f"{name}: the index names {where}, found in {owner.get(name, 'no shard')}")
    if found.index is not None:
        problems += [f"{name}: in {owner[name]}, but not in the index" for name in owner.keys() - found.index]
    if problems:
        raise AdapterError(
            f"the shards in {shards[0].file.parent} don't fit together", "save or download the adapter again",
            problems,
        )  # fmt: skip
    return tensors


def _joined_sha256(shards: list[Source]) -> str:
    lines = "".join(f"{shard.file.name} {shard.sha256}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """Read an ``adapter_config.json``, PEFT's or mlx-lm's.

    Raises:
        AdapterError: It is not JSON, or not an object with ``peft_type`` or mlx-lm's keys.
    """
    config = read_json(path, AdapterError, "save the adapter again")
    if isinstance(config, dict):
        if isinstance(config.get("peft_type"), str):
            return config
        if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
            return config
    raise AdapterError(
        f"{path} is JSON but no adapter config: it has no 'peft_type' (nor mlx-lm's 'lora_parameters')",
        "give the folder that PEFT's save_pretrained or mlx_lm.lora wrote, not the base model's",
    )
