"""Check zip archives (``.npz``, torch's ``.pt``) before they are unpacked.

A few kilobytes of deflated zeros unpack to gigabytes, and entries may overlap. The archive's directory states
the unpacked sizes: they are compared with the file before anything is read.

Two readers of one file may also see two archives: one begins at the end of the file, the other at its start;
one distinguishes upper and lower case. `layout_problems` finds archives that allow that.
"""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lora_export.untrusted.shown import shown

# A reader may take ten times the file and some more: the entries themselves get less.
SMALL_BYTES, FACTOR = 32 << 20, 8
# The first bytes of a zip, and its last records (PKWARE's APPNOTE.TXT 4.3.7, 4.3.14 to 4.3.16): signature,
# size or disk numbers, entries, the directory's bytes and offset.
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
    """Return the reasons against unpacking an archive.

    Args:
        size: Size of the archive's file in bytes.
        entries: See `archive_entries`.
    """
    unpacked = sum(entry.file_size for entry in entries)
    problems = []
    if unpacked > too_much(size):
        problems.append(
            f"its {len(entries)} entries unpack to {unpacked} bytes, but the file has {size}; "
            f"at most {too_much(size)} are unpacked"
        )
    if len({entry.filename for entry in entries}) < len(entries):
        problems.append("it has several entries of one name")
    return problems


def layout_problems(file: IO[bytes], size: int, entries: Sequence[zipfile.ZipInfo]) -> list[str]:
    """Return the problems of an archive that two readers may read as two different ones.

    A file is one archive if it begins with an entry and ends with the directory and its last records, and if
    all entries lie in one folder and differ by more than upper and lower case.

    Args:
        file: The archive.
        size: Its size in bytes.
        entries: See `archive_entries`.
    """
    problems = []
    if not _is_one_archive(file, size, entries):
        problems.append("it has bytes before or after its zip archive")
    names = Counter(entry.filename.lower() for entry in entries)
    if several := [name for name, count in names.items() if count > 1]:
        problems.append(
            f"it has {names[several[0]]} entries '{shown(several[0], _NAME)}', upper and lower case "
            "taken as equal"
        )
    if cut := [entry for entry in entries if entry.filename != entry.orig_filename]:
        problems.append(f"the name of an entry has a part after its end: '{shown(cut[0].filename, _NAME)}'")
    folders = {entry.filename.partition("/")[0] for entry in entries}
    if len(folders) > 1 or not all("/" in entry.filename for entry in entries):
        listed = ", ".join(f"'{shown(folder, _NAME)}'" for folder in sorted(folders)[:_SHOWN])
        problems.append(f"its entries lie in several folders, or in none: {listed}")
    return problems


def _is_one_archive(file: IO[bytes], size: int, entries: Sequence[zipfile.ZipInfo]) -> bool:
    """Return whether a file is only entries, directory and last records, without other bytes at the ends."""
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


def _tail(file: IO[bytes], size: int, after: int, record: struct.Struct) -> bytes:
    """Return a record near the end of a file, before ``after`` bytes; zeros if the file is too short."""
    file.seek(max(size - after - record.size, 0))
    return file.read(record.size).ljust(record.size, b"\0")


def too_much(size: int) -> int:
    """Return the largest number of bytes of values that a file of this size may unpack to."""
    return FACTOR * size + SMALL_BYTES
