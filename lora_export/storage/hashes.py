"""What files are known by: the identity of one file, of several, and the hashes of all bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from lora_export.storage.commit.steps import sync_path
from lora_export.storage.sums.full import file_digest, full_hash
from lora_export.untrusted.fields import Count

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


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of all of a file."""
    return file_digest(path, "sha256")


def is_sampled(size_bytes: int) -> bool:
    """Whether the identity of a file of this size is over a sample of it."""
    return size_bytes > _WHOLE_BYTES


def hash_file(path: Path) -> FileHash:
    """Return a file's identity; above 64 MiB over a sample of it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
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
