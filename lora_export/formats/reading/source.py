"""Open an adapter's files for a format: weights, the config beside them, and the user's options."""

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
from lora_export.formats.reading.tensors import read_safetensors
from lora_export.formats.reading.weights_files import (
    CONFIG_NAME,
    EDGE_LLM_NAME,
    MLX_NAME,
    WEIGHT_NAMES,
    WeightsFiles,
    find_adapter_weights,
    is_mlx_name,
)
from lora_export.formats.reading.wrappers import MOST_WORDS, is_too_deep, unwrap
from lora_export.storage.hashes import sha256_of
from lora_export.storage.inputs import FileState, note_states, refuse_changed, same_inputs
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.links import refuse_links
from lora_export.untrusted.places import is_folder
from lora_export.untrusted.texts import is_utf8

__all__ = [
    "CONFIG_NAME",
    "EDGE_LLM_NAME",
    "FORMAT_OPTION",
    "WEIGHT_NAMES",
    "AdapterSource",
    "Format",
    "ReadOptions",
    "open_source",
]
# The option for the adapter's format; convert-adapter's --format is its output's.
FORMAT_OPTION = "--format (convert-adapter: --from-format)"
_MAX_LISTED = 40
# Characters of a name that is too long.
_SHOWN = 80
_TRIES = 3


@dataclass(frozen=True)
class ReadOptions:
    """The user's options for facts that a file doesn't state.

    Attributes:
        alpha: Numerator of the scaling.
        rank: Rank of one product.
        rslora: Divide alpha by √rank (True) or by rank (False); None to read it from the file.
        component: The part to read of a file for several models.
    """

    alpha: float | None = None
    rank: int | None = None
    rslora: bool | None = None
    component: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterSource:
    """An adapter file that has been opened.

    Attributes:
        path: Path that the user gave.
        file: The weights file; the first of several shards.
        name: The folder's or the file's name.
        tensors: Name → values.
        metadata: Metadata of a ``.safetensors`` file.
        settings: ``alpha``, ``rank``, ``scaling``, ``rslora``, ``enable_lora`` of a torch checkpoint; the
            versions of an ``.onnx_adapter``.
        mentions: Places and values of a torch checkpoint's numbers called alpha that may be LoRA's or not.
        config: ``adapter_config.json``, PEFT's or mlx-lm's, if one belongs to the file.
        sha256: Hash of the weights file, see `Adapter.sha256`.
        notes: Notes on what was ignored.
        states: States of the weights files when they were read.
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

    def __post_init__(self) -> None:
        """Refuse names that no output could say, or that would keep what compares them busy.

        Raises:
            AdapterError: The adapter's name is not UTF-8, or a tensor's has more than `MOST_WORDS` words.
        """
        if not is_utf8(self.name):
            raise AdapterError(f"the name of the adapter {self.path} is not UTF-8", "rename it")
        if deep := [name for name in self.tensors if is_too_deep(name)]:
            raise AdapterError(
                f"adapter '{self.name}' has {len(deep)} tensors with names of more than {MOST_WORDS} words "
                f"({self.file})",
                "save the adapter with the names of its modules",
                [f"{name[:_SHOWN]}…" for name in deep[:_MAX_LISTED]],
            )

    @property
    def peft_config(self) -> Mapping[str, Any] | None:
        """The config, if it is PEFT's."""
        return self.config if self.config is not None and "peft_type" in self.config else None

    @property
    def paths(self) -> Mapping[str, str]:
        """Tensor's name → the path that formats match: without wrappers and without the adapter's name."""
        return self._read_names[0]

    def entries(self) -> Iterator[tuple[str, str, Array]]:
        """Yield ``(name, path, values)`` of every tensor.

        Raises:
            AdapterError: As in `check_names`.
        """
        self.check_names()
        for name, path in self.paths.items():
            yield name, path, self.tensors[name]

    def check_names(self) -> None:
        """Refuse ambiguous names: all other problems would only follow from them.

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
        recognises: Function that returns whether a source is of this format.
        read: Function that makes the adapter; it raises `AdapterError` with all problems.
        certain: True if `recognises` leaves no doubt (it knows who wrote the file): no other is tried then.
    """

    expects: str
    recognises: Callable[[AdapterSource], bool]
    read: Callable[[AdapterSource, ReadOptions], Adapter]
    certain: bool = False


def open_source(path: Path, name: str | None = None) -> AdapterSource:
    """Find the weights files at ``path`` (a folder or a file), open them, and read the config beside them.

    Raises:
        AdapterError: There is nothing, no weights file or more than one, or one of the files is damaged.
        InputChangedError: A file of the adapter changed while it was read, each time that it was tried.
    """
    # A download or a copy renames one file after the other: it is done with all of them soon.
    for _ in range(_TRIES - 1):
        with contextlib.suppress(InputChangedError):
            return _open_once(path, name)
    return _open_once(path, name)


def _open_once(path: Path, name: str | None) -> AdapterSource:
    """Open all files of an adapter in one state of them."""
    # Looked for twice: all that is read has its state taken before the first of it is.
    states = tuple(map(FileState.of, find_adapter_weights(path).places))
    try:
        with same_inputs():  # what is noted in a try that fails is none
            source = _open_files(path, name, states)
    except AdapterError:  # of files that do not belong together, perhaps
        refuse_changed(states)
        raise
    refuse_changed(states)
    note_states(states)
    return source


def _open_files(path: Path, name: str | None, states: Sequence[FileState]) -> AdapterSource:
    found = find_adapter_weights(path)
    if (now := {place.absolute() for place in found.places}) != (then := {state.path for state in states}):
        raise InputChangedError(
            f"the files of the adapter at {path} have changed while being read",
            "run it again when nobody writes them",
            sorted(map(str, now ^ then)),
        )
    if is_folder(path):
        refuse_links(path, found.files, AdapterError)
    opened = [_open_file(path, file) for file in found.files]
    first = opened[0]
    file = first.file
    config = read_adapter_config(found.config, path) if found.config is not None else None
    notes = [*(note for one in opened for note in one.notes), *found.notes]
    if config is not None and is_mlx_name(file.name) and "peft_type" in config:
        notes.append(f"{found.config} was not used: it is PEFT's, but {file.name} is mlx-lm's")
        config = None
    own_name = (
        file.parent.resolve().name if file.name in (*WEIGHT_NAMES, EDGE_LLM_NAME, MLX_NAME) else file.stem
    )
    return AdapterSource(
        path=path,
        file=file,
        name=name or (path.resolve().name if is_folder(path) else own_name),
        tensors=first.tensors if len(opened) == 1 else _joined(found, opened),
        metadata=first.metadata,
        settings=first.settings,
        mentions=first.mentions,
        config=config,
        sha256=first.sha256 if len(opened) == 1 else _joined_sha256(opened),
        notes=tuple(notes),
        states=tuple(state for one in opened for state in one.states),
    )


def _open_file(path: Path, file: Path) -> AdapterSource:
    """Read one weights file; its contents and its hash are from the same state of the file."""
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
            notes = (f"ignored, bookkeeping of the training: {', '.join(checkpoint.ignored)}",)
    elif file.suffix == ORT_SUFFIX:
        tensors, versions = read_ort_file(file)
        settings = dict(versions)
    else:
        raise AdapterError(
            f"{file} is not an adapter file: its name ends in {file.suffix or 'nothing'!r}",
            f"give a PEFT folder, or a file ending in .safetensors, {', '.join(SUFFIXES)}, {ORT_SUFFIX}",
        )
    # The hash of all bytes, also for a converted file: values may change under an unchanged header.
    sha256 = sha256_of(file)
    refuse_changed([before])
    return AdapterSource(
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


def _joined(found: WeightsFiles, shards: list[AdapterSource]) -> dict[str, Array]:
    """Return the tensors of all shards.

    Raises:
        AdapterError: A name is in two shards, or the index disagrees with the shards.
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
            problems.append(f"{name}: in {where} by the index, found in {owner.get(name, 'no shard')}")
    if found.index is not None:
        problems += [f"{name}: in {owner[name]}, but not in the index" for name in owner.keys() - found.index]
    if problems:
        raise AdapterError(
            f"the shards in {shards[0].file.parent} don't fit together", "save or download the adapter again",
            problems,
        )  # fmt: skip
    return tensors


def _joined_sha256(shards: list[AdapterSource]) -> str:
    lines = "".join(f"{shard.file.name} {shard.sha256}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_adapter_config(path: Path, given: Path) -> dict[str, Any]:
    """Read an ``adapter_config.json``, PEFT's or mlx-lm's.

    Args:
        path: The file.
        given: The folder or weights file that the user named.

    Raises:
        AdapterError: The file is not JSON, not an object with ``peft_type`` or mlx-lm's keys, or a link out
            of the folder.
    """
    config = read_json(path, AdapterError, "save the adapter again", given=given)
    if isinstance(config, dict):
        if isinstance(config.get("peft_type"), str):
            return config
        if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
            return config
    raise AdapterError(
        f"{path} is JSON but not an adapter config: it has no 'peft_type' (nor mlx-lm's 'lora_parameters')",
        "give the folder that PEFT's save_pretrained or mlx_lm.lora wrote, not the base model's",
    )
