"""Check zip archives (``.npz``, torch's ``.pt``) before they are unpacked.

A few kilobytes of deflated zeros unpack to gigabytes, and entries may overlap. The archive's directory states
the unpacked sizes: they are compared with the file before anything is read.

Some tens of bytes make an entry, and `zipfile` makes an object of each: they are counted before it opens a
file.

Two readers of one file may also see two archives: one begins at the end of the file, the other at its start;
one distinguishes upper and lower case. `layout_problems` finds archives that allow that.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import IO

from lora_export.untrusted.shown import shown

# A reader may take ten times the file and some more: the entries themselves get less.
SMALL_BYTES, FACTOR = 32 << 20, 8
# The first bytes of a zip, and its last records (PKWARE's APPNOTE.TXT 4.3.7, 4.3.14 to 4.3.16): signature,
# size or disk numbers, entries, the directory's bytes and offset.
START = b"PK\x03\x04"
_END, _LOCATOR, _END_64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
_FULL_64 = 44
# More than any model has tensors, and as many as the first form of the format allows.
MAX_ENTRIES = 1 << 16
# An entry in the directory: signature, lengths of its name, extra field and comment; and the signatures of
# the last records.
_ENTRY = struct.Struct("<4s24x3H12x")
_DIRECTORY, _LAST, _LOCATOR_64, _LAST_64 = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
# The longest comment after the last record, and one byte, as zipfile looks for it.
_COMMENT = 1 << 16
_NAME, _SHOWN = 100, 4


class CrowdedError(zipfile.BadZipFile):
    """Error for an archive with more than `MAX_ENTRIES` entries."""


def open_archive(file: IO[bytes]) -> zipfile.ZipFile:
    """Open a zip archive that has no more than `MAX_ENTRIES` entries.

    Raises:
        OSError: The file can't be read.
        zipfile.BadZipFile: The archive is damaged; a `CrowdedError` if it has more entries.
    """
    if _has_many(file):
        raise CrowdedError(f"it has more than {MAX_ENTRIES} entries, the limit for an archive")
    return zipfile.ZipFile(file)


def archive_entries(file: IO[bytes]) -> tuple[zipfile.ZipInfo, ...]:
    """Return the entries of a zip archive.

    Raises:
        OSError: The file can't be read.
        zipfile.BadZipFile: The archive is damaged; a `CrowdedError` if it has more than `MAX_ENTRIES`
            entries.
    """
    with open_archive(file) as archive:
        return tuple(archive.infolist())


def _has_many(file: IO[bytes]) -> bool:
    """Return whether there are more than `MAX_ENTRIES` entries where `zipfile` would read the directory.

    It reads all bytes that the last record states, whatever number of entries that states.
    """
    size = file.seek(0, os.SEEK_END)
    start = max(size - _END.size - _COMMENT, 0)
    file.seek(start)
    last = file.read(_END.size + _COMMENT)
    # Without a comment the record is at the very end, else where its signature is last.
    at = len(last) - _END.size
    if at < 0 or last[at : at + len(_LAST)] != _LAST or last[-2:] != b"\0\0":
        at = last.rfind(_LAST)
    if at < 0 or at + _END.size > len(last):
        return False
    length, after = _END.unpack_from(last, at)[5], size - start - at
    if _LOCATOR.unpack(_tail(file, size, after, _LOCATOR))[0] == _LOCATOR_64:
        large = _END_64.unpack(_tail(file, size, after + _LOCATOR.size, _END_64))
        if large[0] == _LAST_64:
            length, after = large[8], after + _LOCATOR.size + _END_64.size
    place, end = size - after - length, size - after
    for _ in range(MAX_ENTRIES + 1):
        if not 0 <= place < end:
            return False
        file.seek(place)
        head = file.read(_ENTRY.size).ljust(_ENTRY.size, b"\0")
        signature, *lengths = _ENTRY.unpack(head)
        if signature != _DIRECTORY:
            return False
        place += _ENTRY.size + sum(lengths)
    return True


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
    # numpy and torch write neither bzip2 nor LZMA, which `zipfile` unpacks without a limit.
    odd = [
        entry for entry in entries if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    ]
    if odd:
        problems.append(
            f"its entry '{shown(odd[0].filename, _NAME)}' is packed by method {odd[0].compress_type}, wanted "
            "stored (0) or deflated (8)"
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
    if locator[0] == _LOCATOR_64:
        end -= _LOCATOR.size + _END_64.size
        large = _END_64.unpack(_tail(file, size, _END.size + _LOCATOR.size, _END_64))
        if large[:2] != (_LAST_64, _FULL_64) or locator[1:] != (0, end, 1):
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
