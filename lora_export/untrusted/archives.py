"""Zip archives (``.npz``, torch's ``.pt``) whose entries are not larger than the archive can hold.

A few kilobytes of deflated zeros unpack to gigabytes, and entries may lie on top of each other. What
unpacking takes is in the archive's directory: it is compared with the file before anything is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

# What a reader may take beside ten times the file: the entries themselves get less.
SMALL_BYTES, FACTOR = 32 << 20, 8


def archive_entries(path: Path) -> tuple[zipfile.ZipInfo, ...]:
    """Return the entries of a zip archive.

    Raises:
        OSError: It can't be read.
        zipfile.BadZipFile: It is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        return tuple(archive.infolist())


def archive_problems(path: Path, entries: Sequence[zipfile.ZipInfo]) -> list[str]:
    """Return what speaks against unpacking an archive.

    Args:
        path: The archive.
        entries: See `archive_entries`.
    """
    size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    problems = []
    if unpacked > too_much(size):
        problems.append(
            f"its {len(entries)} entries unpack to {unpacked} bytes, the file holds {size}; "
            f"{too_much(size)} is the most that is unpacked"
        )
    if len({entry.filename for entry in entries}) < len(entries):
        problems.append("it has several entries of one name")
    return problems


def too_much(size: int) -> int:
    """Return how many bytes of values a file of some size may stand for at most."""
    return FACTOR * size + SMALL_BYTES
