"""What was written, as data: inputs by hash, the plan, what rounding cost, versions. JSON, read and written.

Nothing in a manifest depends on the clock, the machine or absolute paths: same inputs, same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from lora_export.adapter import Adapter
from lora_export.errors import GraphError
from lora_export.storage.commit.steps import sync_path
from lora_export.storage.sums.full import full_hash
from lora_export.storage.sums.seal import SEAL, sealed_json
from lora_export.untrusted.documents import json_of, open_regular, read_json
from lora_export.untrusted.fields import Count, FieldError, from_plain, seen

FORMAT = 1
_HINT = "give the OUT.lora.json of a merge"
# Larger files are known by a sample: hashing 2.5 GB takes longer than merging it.
_WHOLE_BYTES = 64 << 20
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True)
class FileHash:
    """A file's identity.

    Attributes:
        name: File name without folders.
        size_bytes: Its size.
        sha256: Of its content, or see ``sampled``.
        sampled: The hash is over the size and 256 evenly spaced blocks of 64 KiB instead of the whole.
        blake3: Of all of its content; empty where only its identity was asked for, and in files that earlier
            versions wrote.
    """

    name: str
    size_bytes: Count
    sha256: str
    sampled: bool = False
    blake3: str = ""


@dataclass(frozen=True)
class Manifest:
    """The record beside a written model, ``OUT.lora.json``.

    Attributes:
        mode: ``merge-onnx``, ``merge``, ``swap-onnx`` or ``bank-onnx``.
        base: The base model's files.
        adapters: For each adapter: name, format, sha256, weight in the blend, scaling by module; and where it
            is not the whole file `Adapter.part`.
        plan: `Plan.as_dict`.
        rounding: What rounding cost: total and by module.
        outputs: The files written, by what they are.
        versions: Packages that decide about the bytes written.
        exposed: The record of a graph with exposed LoRA, see `exposed.ExposedGraph`.
        files: All files that belong to what was written, but for the manifest itself, by their place from
            its folder.
    """

    mode: str
    base: list[FileHash]
    adapters: list[dict[str, Any]]
    plan: dict[str, Any]
    rounding: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    exposed: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileHash] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write the manifest, sealed."""
        path.write_bytes(sealed_json(self.to_json()))

    def to_json(self) -> str:
        """Return the manifest as indented JSON with sorted keys, without a seal."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `save` or `to_json` wrote.

        Raises:
            GraphError: It is no manifest, or one of another format.
        """
        return cls._from_data(json_of(text, "the manifest", GraphError, _HINT))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest's file.

        Raises:
            GraphError: It can't be read, or see `from_json`.
        """
        return cls._from_data(read_json(path, GraphError, _HINT))

    @classmethod
    def _from_data(cls, data: Any) -> Manifest:
        if isinstance(data, dict):
            data.pop(SEAL, None)
        if isinstance(data, dict) and "format" in data and data["format"] != FORMAT:
            said = seen(data["format"])
            raise GraphError(f"the manifest has format {said}, this version reads {FORMAT}", _HINT)
        try:
            return from_plain(cls, data)
        except FieldError as error:
            raise GraphError("not a lora-export manifest, or a damaged one", _HINT, error.problems) from error


def is_sampled(size_bytes: int) -> bool:
    """Whether the identity of a file of this size is over a sample of it."""
    return size_bytes > _WHOLE_BYTES


def hash_file(path: Path) -> FileHash:
    """Return a file's identity; above 64 MiB over a sample of it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open_regular(path) as file:
        if not is_sampled(size):
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            digest.update(str(size).encode())
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return FileHash(path.name, size, digest.hexdigest(), is_sampled(size))


def hash_written(path: Path, name: str) -> FileHash:
    """Return the identity and the full hash of a file that was written.

    A large file goes to the disk meanwhile: it has to before it gets its name, and both take as long.

    Args:
        path: Where it lies now.
        name: Its own name.

    Raises:
        OSError: It can't be read, or the disk does not take it.
    """
    with ThreadPoolExecutor(1) as beside:
        flushed = beside.submit(sync_path, path) if is_sampled(path.stat().st_size) else None
        entry = replace(hash_file(path), name=name, blake3=full_hash(path))
        if flushed is not None:
            flushed.result()
    return entry


def hash_content(name: str, content: bytes) -> FileHash:
    """Return the full hashes of a file that is still to be written."""
    sha256 = hashlib.sha256(content).hexdigest()
    return FileHash(name, len(content), sha256, blake3=blake3(content).hexdigest())


def hash_folder(folder: Path) -> dict[str, FileHash]:
    """Return the full hashes of a folder's files, those below it too, by their place in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    places = {path.relative_to(folder).as_posix(): path for path in files}
    return {place: hash_written(path, path.name) for place, path in places.items()}


def identity_of(hashes: Iterable[FileHash]) -> str:
    """Return one SHA-256 for a model of several files: of their hashes, whatever the files are called."""
    digest = hashlib.sha256()
    for entry in sorted(file.sha256 for file in hashes):
        digest.update(entry.encode())
    return digest.hexdigest()


def identity_of_graph(graph: Path, data: Path) -> str:
    """Return the identity of a graph and its own data file, which it may lack."""
    return identity_of(hash_file(file) for file in (graph, data) if file.is_file())


def adapter_entry(adapter: Adapter, weight: float) -> dict[str, Any]:
    """Return what a manifest says of an adapter."""
    rows = {path: len(rows.indices) for path, rows in adapter.token_rows.items()}
    return {
        "name": adapter.name,
        "format": adapter.format,
        "sha256": adapter.sha256,
        "weight": weight,
        "modules": {
            key: {"rank": module.rank, "alpha": module.alpha, "scaling": module.scaling}
            for key, module in adapter.modules.items()
        },
        "replaced": sorted(adapter.extras),
        **({"part": adapter.part} if adapter.part is not None else {}),
        **({"replaced_rows": rows} if rows else {}),
    }
