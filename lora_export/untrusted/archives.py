"""Zip archives (``.npz``, torch's ``.pt``) whose entries are not larger than the archive can hold.

A few kilobytes of deflated zeros unpack to gigabytes, and entries may lie on top of each other. What
unpacking takes is in the archive's directory: it is compared with the file before anything is read.

Two readers of one file may also see two archives: one of them begins at the end of the file, the other at its
start; one tells capitals from small letters. `layout_problems` finds what leaves room for that.
"""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lora_export.untrusted.shown import shown

# What a reader may take beside ten times the file: the entries themselves get less.
SMALL_BYTES, FACTOR = 32 << 20, 8
# What a zip begins with, and its last records (PKWARE's APPNOTE.TXT 4.3.7, 4.3.14 to 4.3.16): signature, size
# or disk numbers, entries, the directory's bytes and offset.
START = b"PK\x03\x04"
_END, _LOCATOR, _END_64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
_FULL_64 = 44
_NAME, _SHOWN = 100, 4


def archive_entries(path: Path | IO[bytes]) -> tuple[zipfile.ZipInfo, ...]:
    """Return the entries of a zip archive.

    Raises:
        OSError: It can't be read.
        zipfile.BadZipFile: It is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        return tuple(archive.infolist())


def archive_problems(size: int, entries: Sequence[zipfile.ZipInfo]) -> list[str]:
    """Return what speaks against unpacking an archive.

    Args:
        size: Bytes of the archive's file.
        entries: See `archive_entries`.
    """
    unpacked = sum(entry.file_size for entry in entries)
    problems = []
    if unpacked > too_much(size):
        problems.append(
            f"its {len(entries)} entries unpack to {unpacked} bytes, the file holds {size}; "
            f"{too_much(size)} is the most that is unpacked"
        )
    if len({entry.filename for entry in entries}) < len(entries):
        problems.append("it has several entries of one name")
    return problems


def layout_problems(file: IO[bytes], size: int, entries: Sequence[zipfile.ZipInfo]) -> list[str]:
    """Return what two readers of an archive may read as two archives.

    A file is one archive where it begins with an entry and ends with the directory and its last records, and
    where all entries lie in one folder and differ by more than capitals.

    Args:
        file: The archive.
        size: Its bytes.
        entries: See `archive_entries`.
    """
    problems = []
    if not _is_one_archive(file, size, entries):
        problems.append("something lies before or behind its zip archive")
    names = Counter(entry.filename.lower() for entry in entries)
    if several := [name for name, count in names.items() if count > 1]:
        problems.append(
            f"it has {names[several[0]]} entries '{shown(several[0], _NAME)}', capitals and small letters "
            "taken as equal"
        )
    if cut := [entry for entry in entries if entry.filename != entry.orig_filename]:
        problems.append(f"the name of an entry has a part behind its end: '{shown(cut[0].filename, _NAME)}'")
    folders = {entry.filename.partition("/")[0] for entry in entries}
    if len(folders) > 1 or not all("/" in entry.filename for entry in entries):
        listed = ", ".join(f"'{shown(folder, _NAME)}'" for folder in sorted(folders)[:_SHOWN])
        problems.append(f"its entries lie in several folders, or in none: {listed}")
    return problems


def _is_one_archive(file: IO[bytes], size: int, entries: Sequence[zipfile.ZipInfo]) -> bool:
    """Return whether nothing is before the first entry, and nothing behind or between directory and last records."""
    _, disk, first_disk, here, count, length, offset, comment = _END.unpack(_tail(file, size, 0, _END))
    end = size - _END.size
    locator = _LOCATOR.unpack(_tail(file, size, _END.size, _LOCATOR))
    if locator[0] == b"PK\x06\x07":
        end -= _LOCATOR.size + _END_64.size
        large = _END_64.unpack(_tail(file, size, _END.size + _LOCATOR.size, _END_64))
        if large[:2] != (b"PK\x06\x06", _FULL_64) or locator[1:] != (0, end, 1):
            return False
        for small, most, full in zip(
            (here, count, length, offset), (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), large[6:], strict=True
        ):
            if small not in (full, most):
                return False
        here, count, length, offset = large[6:]
    return (
        (disk, first_disk, comment) == (0, 0, 0)
        and here == count == len(entries) > 0
        and offset + length == end
        and min(entry.header_offset for entry in entries) == 0
    )


def _tail(file: IO[bytes], size: int, behind: int, record: struct.Struct) -> bytes:
    """Return a record at the end of a file, with some bytes behind it; zeros where the file is too short."""
    file.seek(max(size - behind - record.size, 0))
    return file.read(record.size).ljust(record.size, b"\0")


def too_much(size: int) -> int:
    """Return how many bytes of values a file of some size may stand for at most."""
    return FACTOR * size + SMALL_BYTES
