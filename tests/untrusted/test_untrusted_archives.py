"""Zip archives of very many entries: they are counted before zipfile makes an object of each."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import AdapterError, BackendError
from lora_export.formats.reading.source import open_source
from lora_export.parity.feeds.array_files import _MOST_PROBLEMS, read_arrays
from lora_export.untrusted.archives import MAX_ENTRIES, CrowdedError, archive_entries


def crowded(count: int, *, is_64: bool, stated: int | None = None, comment: bytes = b"") -> bytes:
    """Return an archive with a number of entries of different names that share one array's bytes.

    Args:
        count: Number of entries in the directory.
        is_64: Write the last records of zip64, too.
        stated: The number that the last record states; by default the true one.
        comment: Comment after the last record.
    """
    file = io.BytesIO()
    np.save(file, np.zeros(0, np.float32))
    array = file.getvalue()
    sizes = (zlib.crc32(array), len(array), len(array))
    out = bytearray(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, *sizes, 5, 0) + b"00000" + array)
    start = len(out)
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, *sizes, 5, 0, 0, 0, 0, 0, 0)
    out += b"".join(entry + f"{number:05x}".encode() for number in range(count))
    length, stated, end = len(out) - start, count if stated is None else stated, len(out)
    if is_64:
        out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, stated, stated, length, start)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    few = min(stated, 0xFFFF)
    out += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, length, start, len(comment)) + comment
    return bytes(out)


FORMS = [
    {"is_64": True},
    {"is_64": False},
    {"is_64": True, "stated": 1},
    {"is_64": False, "stated": 1},
    {"is_64": True, "comment": b"a comment"},
    {"is_64": False, "comment": b"x" * 0xFFFF},
]


@pytest.mark.parametrize("form", FORMS)
def test_too_many_entries_are_counted_before_zipfile_opens_the_file(
    form: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, one_more = (crowded(MAX_ENTRIES + more, **form) for more in (0, 1))
    for content, count in ((allowed, MAX_ENTRIES), (one_more, MAX_ENTRIES + 1)):
        assert len(zipfile.ZipFile(io.BytesIO(content)).infolist()) == count
    assert len(archive_entries(io.BytesIO(allowed))) == MAX_ENTRIES
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_args: pytest.fail("it was opened"))
    with pytest.raises(CrowdedError, match=str(MAX_ENTRIES)):
        archive_entries(io.BytesIO(one_more))


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("form", FORMS)
def test_a_few_entries_are_what_zipfile_finds(form: dict[str, object], count: int) -> None:
    content = crowded(count, **form)
    wanted = [entry.filename for entry in zipfile.ZipFile(io.BytesIO(content)).infolist()]
    assert [entry.filename for entry in archive_entries(io.BytesIO(content))] == wanted


def test_readers_refuse_it_with_the_limit(tmp_path: Path) -> None:
    content = crowded(MAX_ENTRIES + 1, is_64=True)
    for ending in ("npz", "pt"):
        (tmp_path / f"many.{ending}").write_bytes(content)
    with pytest.raises(BackendError) as arrays:
        read_arrays(tmp_path / "many.npz")
    with pytest.raises(AdapterError) as adapter:
        open_source(tmp_path / "many.pt")
    for error in (arrays.value, adapter.value):
        assert str(MAX_ENTRIES) in f"{error.message} {error.problems}"
    old = tmp_path / "old.pt"
    old.write_bytes(b"\x80\x02N." + content)
    with pytest.raises(AdapterError) as adapter:
        open_source(old)
    assert str(MAX_ENTRIES) in f"{adapter.value.message} {adapter.value.problems}"


def test_of_many_damaged_arrays_some_are_named(tmp_path: Path) -> None:
    path, count = tmp_path / "damaged.npz", 50 * _MOST_PROBLEMS
    with zipfile.ZipFile(path, "w") as file:
        for number in range(count):
            file.writestr(f"a{number}.npy", b"no array")
    with pytest.raises(BackendError) as caught:
        read_arrays(path)
    assert 1 < len(caught.value.problems) <= _MOST_PROBLEMS + 1 < count
