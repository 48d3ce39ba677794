"""Compute the hashes that identify files: of one file, of several, of all bytes or of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from lora_export.storage.commit.steps import sync_path
from lora_export.storage.sums.full import file_digest, full_hash
from lora_export.untrusted.documents import open_regular
from lora_export.untrusted.fields import Count
from lora_export.untrusted.places import files_below, is_file

# Larger files are identified by a sample: hashing 2.5 GB takes longer than merging it.
_WHOLE_BYTES = 64 << 20
# The same of weights that others wrote, and that are left in their place.
_SHARED_BYTES = 1 << 30
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class FileHash:
    """A file's identity.

    Attributes:
        name: File name without folders.
        size_bytes: Size of the file.
        sha256: Hash of its content, or of a sample (see ``sampled``).
        sampled: True if the hash covers only the size and 256 evenly spaced blocks of 64 KiB.
        blake3: Hash of all of its content; empty if only its identity was needed, and in files of earlier
            versions.
    """

    name: str
    size_bytes: Count
    sha256: str
    sampled: bool = False
    blake3: str = ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a whole file."""
    return file_digest(path, "sha256")


def is_sampled(size_bytes: int) -> bool:
    """Return whether the identity of a file of this size covers only a sample of it."""
    return size_bytes > _WHOLE_BYTES


def hash_file(path: Path) -> FileHash:
    """Return a file's identity, which covers only a sample above 64 MiB."""
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
    return FileHash(name=path.name, size_bytes=size, sha256=digest.hexdigest(), sampled=is_sampled(size))


def hash_written(path: Path, name: str) -> FileHash:
    """Return the identity and the full hash of a file that was written.

    A large file is flushed to the disk at the same time: it must be before it gets its name, and both take
    equally long.

    Args:
        path: Current path of the file.
        name: The file's own name.

    Raises:
        OSError: The file can't be read, or can't be flushed to the disk.
    """
    with ThreadPoolExecutor(1) as beside:
        flushed = beside.submit(sync_path, path) if is_sampled(path.stat().st_size) else None
        entry = replace(hash_file(path), name=name, blake3=full_hash(path))
        if flushed is not None:
            flushed.result()
    return entry


def hash_shared(path: Path) -> FileHash:
    """Return the identity of weights that stay where they are, and their full hash up to 1 GiB.

    Larger ones are not copied in order not to read them: they are known by a sample.
    """
    entry = hash_file(path)
    return replace(entry, blake3=full_hash(path)) if entry.size_bytes <= _SHARED_BYTES else entry


def hash_content(name: str, content: bytes) -> FileHash:
    """Return the full hashes of a file that is still to be written."""
    sha256 = hashlib.sha256(content).hexdigest()
    return FileHash(name=name, size_bytes=len(content), sha256=sha256, blake3=blake3(content).hexdigest())


def hash_folder(folder: Path) -> dict[str, FileHash]:
    """Return the full hashes of a folder's files, those below it too, by their place in it."""
    files = files_below(folder)
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
    return identity_of(hash_file(file) for file in (graph, data) if is_file(file))
