"""List the files that are read of a base, its checkpoint and the adapters; no output may be one of them.

The list is known before anything is read. `lora_export.storage.inputs` remembers the files that were in fact
read, and their state, to notice changes by others.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.sentence_modules import module_paths
from lora_export.errors import CheckpointError
from lora_export.formats.reading.weights_files import files_of
from lora_export.untrusted.places import is_file, is_folder, listed

if TYPE_CHECKING:
    from lora_export.graph.onnx_file import GraphFile

# A folder; None: the one that an adapter names as its base, if it is on this machine; False: none.
CheckpointChoice = str | os.PathLike[str] | Literal[False] | None
# Endings of files of a model's folder, in which graphs, their data and manifests may be outputs.
_SUFFIXES = {".bin", ".jinja", ".json", ".model", ".pt", ".pth", ".py", ".safetensors", ".tiktoken", ".txt"}
_MANIFEST = ".lora.json"
# Files in the folder above that tell which part of a model this is.
_ABOVE = ("model_index.json", "modules.json")


def files_read(base: Path, adapters: Collection[Adapter], checkpoint: CheckpointChoice = False) -> list[Path]:
    """Return the files that a verb reads, except a graph's data files, which `graph_files` returns.

    Args:
        base: A graph's file, or a model's folder.
        adapters: Adapters that are merged or exposed.
        checkpoint: Folder with the values to compare with.
    """
    folder = base if is_folder(base) else base.parent
    found = folder_files(base) if is_folder(base) else [base, base.with_suffix(_MANIFEST)]
    found += [place / name for place in (folder, folder.parent) for name in _ABOVE]
    folders = [Path(checkpoint)] if checkpoint else []
    if checkpoint is not False:
        folders += [named for adapter in adapters if holds_weights(named := Path(adapter.base_model or ""))]
    for place in folders:
        found += folder_files(place)
    for adapter in adapters:
        found += files_of(adapter.source)
        source = Path(adapter.source)
        found += _module_files(source if is_folder(source) else source.parent)
    return [path for path in dict.fromkeys(found) if is_file(path)]


def graph_files(graph: GraphFile) -> list[Path]:
    """Return a graph's file, its data files and its manifest."""
    manifest = graph.path.with_suffix(_MANIFEST)
    return [graph.path, *sorted(graph.data_files()), *([manifest] if is_file(manifest) else [])]


def folder_files(folder: Path) -> list[Path]:
    """Return the files that are read of a model's folder: weights, configs, tokenizers, code."""
    try:
        beside = [path for path in folder.iterdir() if path.suffix in _SUFFIXES and is_file(path)]
    except OSError:  # reported when it is opened
        return []
    own = [path for path in sorted(beside) if not path.name.endswith(_MANIFEST)]
    return [*own, *_module_files(folder)]


def holds_weights(folder: Path) -> bool:
    """Return True if a folder exists and has weights: a name on the hub looks like a path."""
    try:
        return is_folder(folder) and bool(listed(folder, "*.safetensors"))
    except OSError:  # a text that is too long to be a path, or a folder that may not be read
        return False


def _module_files(folder: Path) -> list[Path]:
    """Return the files of sentence-transformers' further modules."""
    try:
        places = module_paths(folder)
    except CheckpointError:  # reported when they are compared
        return []
    return [path for place in places for path in listed(folder / place) if is_file(path)]
