"""Record which data files a graph was written with, in its metadata (`KEY`), and check their places.

A graph's weights lie in files beside it. If one of them is replaced by another model's with equal shapes
(half of an update copied, a base exported again under ``--share-base``), the graph loads silently and answers
as that model.

A tool that saves the graph again keeps the metadata but may lay out the weights differently: the entry holds
a hash of its layout, and does not apply to any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.errors import GraphError
from lora_export.storage.hashes import FileHash, hash_file
from lora_export.storage.inputs import refuse_changed_inputs
from lora_export.untrusted.documents import json_of
from lora_export.untrusted.fields import FieldError, from_plain
from lora_export.untrusted.links import RealPaths
from lora_export.untrusted.places import is_file

KEY = "lora_export.data"
_AGAIN = "copy the graph again from where it was made, or make it again"


@dataclass(frozen=True)
class DataIdentity:
    """The files that a graph was written with.

    Attributes:
        layout: SHA-256 of the name, file, offset and length of every weight.
        files: Identity of each file (`manifest.FileHash`), by its path from the graph's folder.
        blake3: Full hashes of those files that were read whole; empty in graphs of earlier versions.
        manifest: Name of the manifest that was written beside the graph: without it, only the graph would
            tell that files are missing. Empty if there was none.
    """

    layout: str
    files: Mapping[str, str]
    blake3: Mapping[str, str] = field(default_factory=dict)
    manifest: str = ""


def place_problem(path: Path, location: str, real_of: Callable[[Path], str] = os.path.realpath) -> str:
    """Return the reason why a graph may not have its data at a place, or "".

    The rule is ONNX Runtime's (``ValidateExternalDataPath``, ``tensorprotoutils.cc`` of 1.32): a relative
    path to a file that, with links followed, is in the graph's folder or below it. If the graph's file is a
    link itself, as in Hugging Face's cache, the folder that it leads to counts as well. ``..`` is refused.

    Args:
        path: The graph's file.
        location: Path of the data file from the graph's folder.
        real_of: Function that returns a real path; `RealPaths.of` for many files.
    """
    if "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
        return f"external data at {location!r} is outside the model's folder"
    found = real_of(path.parent / location)
    folders = {real_of(path.parent), os.path.dirname(real_of(path))}  # noqa: PTH120
    if any(os.path.commonpath([folder, found]) == folder for folder in folders):
        return ""
    return f"external data at {location!r} leads out of the model's folder, to {found}"


class DataTensor(ir.ExternalTensor):
    """A constant in a data file at an allowed place (`place_problem`).

    onnx_ir's own rule, which applies while a tensor has a base folder, differs from ONNX Runtime's: it reads
    neither Hugging Face's cache nor a file with two names (hard links).

    Args:
        tensor: Tensor as it is in the graph.
        path: The data file.
    """

    def __init__(self, tensor: ir.ExternalTensor, path: Path) -> None:
        super().__init__(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(tensor.name),
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        self._path = str(path)

    @property
    def path(self) -> str:
        """The data file, which ``location`` names from the graph's folder."""
        return self._path

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return the values, memory-mapped.

        Raises:
            GraphError: The file is gone, or shorter than it was when the graph was read.
            InputChangedError: The file was replaced or written to since.
        """
        with self._read():
            return super().numpy()

    def tobytes(self) -> bytes:
        """Return the bytes of the values; see `numpy`."""
        with self._read():
            return super().tobytes()

    @contextlib.contextmanager
    def _read(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            refuse_changed_inputs()
            raise GraphError(
                f"cannot read {self.name} in {self._path}: {getattr(error, 'strerror', None) or error}",
                "put the data files that belong to the graph into its folder again",
            ) from error


def layout_hash(tensors: Iterable[tuple[str, ir.ExternalTensor]]) -> str:
    """Return one hash of the layout of weights: name, file, offset and length of each, in any order."""
    lines = sorted(f"{name}\t{held.location}\t{held.offset or 0}\t{held.length}" for name, held in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def external_tensors(model: ir.Model) -> list[tuple[str, ir.ExternalTensor]]:
    """Return the constants of a model that are in other files, with their names."""
    graphs = [model.graph, *model.graph.subgraphs()]
    values = [value for graph in graphs for value in graph.initializers.values()]
    return [
        (str(value.name), value.const_value)
        for value in values
        if isinstance(value.const_value, ir.ExternalTensor)
    ]


def mark_data(model: ir.Model, files: Mapping[str, FileHash], manifest: str = "") -> dict[str, FileHash]:
    """Write the identity of a model's data files into its metadata, with the name of its manifest.

    Args:
        model: The model; its constants already refer to the files.
        files: Files by their path from the graph's folder, those that were read whole with full hashes.
        manifest: See `DataIdentity`.

    Returns:
        The files that a constant refers to.
    """
    tensors = external_tensors(model)
    used = {str(held.location) for _, held in tensors}
    known = {place: entry for place, entry in files.items() if place in used}
    model.metadata_props.pop(KEY, None)
    if known or manifest:
        identity = DataIdentity(
            layout_hash(tensors),
            {place: entry.sha256 for place, entry in known.items()},
            {place: entry.blake3 for place, entry in known.items() if entry.blake3},
            manifest,
        )
        model.metadata_props[KEY] = json.dumps(asdict(identity), sort_keys=True)
    return known


def read_identity(metadata: Mapping[str, str], path: Path) -> DataIdentity | None:
    """Return the identity of the files that a graph was written with, or None without the entry.

    Args:
        metadata: ``metadata_props`` of an ONNX file, or ONNX Runtime's ``custom_metadata_map``.
        path: The graph's file, for messages.

    Raises:
        GraphError: The entry is damaged.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    where = f"{path}: the metadata entry {KEY!r}"
    try:
        # A later version may have more fields.
        return from_plain(DataIdentity, json_of(text, where, GraphError, _AGAIN), known_only=False)
    except FieldError as error:
        raise GraphError(f"{where} is damaged", _AGAIN, error.problems) from error


def refuse_changed_data(metadata: Mapping[str, str], path: Path, layout: Callable[[], str]) -> None:
    """Raise `GraphError` if a graph's data files are not those that it was written with.

    Args:
        metadata: ``metadata_props`` of an ONNX file, or ONNX Runtime's ``custom_metadata_map``.
        path: The graph's file. A missing data file is not an error here, but of the graph's reader.
        layout: Function that returns `layout_hash` the graph; called only if a file differs.
    """
    identity = read_identity(metadata, path)
    if identity is None:
        return
    real_of = RealPaths().of
    outside = [problem for place in identity.files if (problem := place_problem(path, place, real_of))]
    if outside:
        raise GraphError(
            f"{path}: the metadata entry {KEY!r} names files that can't be the graph's",
            "copy the graph and its data into one folder, without links out of it; or make it again",
            outside,
        )
    named = Counter(map(os.path.normpath, identity.files))
    if twice := [f"{name}: named {count} times" for name, count in named.items() if count > 1]:
        raise GraphError(f"{path}: the metadata entry {KEY!r} names a file several times", _AGAIN, twice)
    changed = [
        f"{file}: sha256 {found}, but the graph was written with {sha256}"
        for place, sha256 in identity.files.items()
        if is_file(file := path.parent / place) and (found := hash_file(file).sha256) != sha256
    ]
    if changed and layout() == identity.layout:
        raise GraphError(
            f"{path}: the weights beside it have changed since it was made: it would answer as another model",
            "copy the .onnx and its data again from where they were made, or make them again; if the files "
            "are the base's (--share-base), make the graph again from the current base, and convert the "
            "adapters for it. If weights were changed on purpose: load it with onnx.load, remove "
            f"the entry {KEY!r} of metadata_props, and save it",
            changed,
        )
