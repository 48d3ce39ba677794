"""Hashes over all bytes of a file: BLAKE3 where we write, which takes two cores as well as one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from lora_export.untrusted.documents import open_regular

_BLOCK_BYTES = 4 << 20
# A pool of threads is made for each hash: one for all is dead in a process that was forked afterwards, and
# whoever waits for it waits forever. For less than this it costs more than it saves.
_ALONE_BYTES = 8 << 20
_MOST_THREADS = 8


class Hasher(Protocol):
    """What takes bytes and has a digest."""

    def update(self, data: memoryview | bytes, /) -> object:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes, in hex."""


def full_hash(path: Path) -> str:
    """Return the BLAKE3 of all of a file."""
    return file_digest(path, "blake3")


def file_digest(path: Path, algorithm: str, hole: range = range(0)) -> str:
    """Return the digest of all of a file.

    Args:
        path: The file.
        algorithm: ``blake3`` or ``sha256``.
        hole: Bytes that count as the digit 0, whatever they are.
    """
    digest = _hasher(algorithm, path.stat().st_size)
    # Read, not mapped: mapped pages would count as this process's memory.
    for start, block in _blocks(path):
        first, last = max(hole.start, start), min(hole.stop, start + len(block))
        if first < last:
            block[first - start : last - start] = b"0" * (last - first)
        digest.update(block)
    return digest.hexdigest()


def _hasher(algorithm: str, size: int) -> Hasher:
    if algorithm == "sha256":
        return hashlib.sha256()
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS) if size > _ALONE_BYTES else 1
    return blake3(max_threads=threads)


def _blocks(path: Path) -> Iterator[tuple[int, memoryview]]:
    """Yield a file's blocks with their places, each in the same memory."""
    start = 0
    with open_regular(path) as file:
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            yield start, buffer[:count]
            start += count
