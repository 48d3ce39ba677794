"""Compare what is about to be written with what a disk has free."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_export.errors import OutputError


def refuse_small_disk(folder: Path, size: int, work: str) -> None:
    """Raise `OutputError` if a folder's disk has less free than is about to be written.

    Args:
        folder: Folder that is written into; it exists.
        size: In bytes.
        work: Subject of the message, which needs the space.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            f"{work} needs {as_decimal(size)} of disk, and {folder} has {as_decimal(free)} free (nothing was "
            "replaced)",
            "free some space, or write to another disk",
        )


def as_decimal(size: int) -> str:
    """Return a number of bytes as disks count them: ``1.2 GB``, ``340 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"
