"""Look at the tables of an ``.onnx_adapter`` before onnxruntime reads them.

The file is a FlatBuffer: tables point to names, shapes and values by offsets, and many of them may point to
the same bytes. So a file of 1 MB can claim any number of gigabytes, which onnxruntime's check of offsets lets
pass. Rules:

1. Names, shapes and values together are not larger than the file: no two tensors share their bytes.
2. There are no more tensors than the file has room for.
3. A tensor has at most `MOST_AXES` axes.
4. No name occurs twice (onnxruntime would take one of the two), and each is UTF-8.

The layout is onnxruntime's ``lora/adapter_format/adapter_schema.fbs``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from lora_export.untrusted.documents import open_regular
from lora_export.untrusted.shown import shown

MOST_AXES = 8
# Objects for one tensor take 1.7 kB here, in onnxruntime and in a report: all of them at most ten times the
# file, and 50 MB.
_OBJECT_BYTES, _SMALL_BYTES, _TIMES = 2000, 50_000_000, 10
# Fields of the tables, by their number.
_PARAMETERS = 3
_NAME, _SHAPE, _VALUES = 0, 1, 3
_AXIS_BYTES = 8
_LISTED = 20


class TablesError(ValueError):
    """Error for tables that break a rule of this module, or lead out of the file."""


def check_tables(path: Path) -> None:
    """Check the tables of a file.

    Raises:
        OSError: The file can't be read.
        TablesError: The tables break a rule.
    """
    with open_regular(path) as file:
        data = file.read(os.fstat(file.fileno()).st_size)
    try:
        _check(_Tables(data))
    except struct.error as error:
        raise TablesError("an offset leads out of the file") from error


class _Tables:
    """A FlatBuffer: places are counted in bytes from its beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def number(self, place: int, kind: str = "<I") -> int:
        """Return the number at a place; negative places are out of the file."""
        if place < 0:
            raise struct.error(place)
        return int(struct.unpack_from(kind, self._data, place)[0])

    def follow(self, place: int) -> int:
        """Return the place that an offset leads to."""
        return place + self.number(place)

    def field(self, table: int, which: int) -> int | None:
        """Return the place of a table's field that is an offset, followed; None if the table lacks it."""
        fields = table - self.number(table, "<i")
        slot = 4 + 2 * which
        if slot + 2 > self.number(fields, "<H"):
            return None
        offset = self.number(fields + slot, "<H")
        return self.follow(table + offset) if offset else None

    def text(self, place: int) -> bytes:
        """Return the text at a place, which begins with its length."""
        return self._data[place + 4 : place + 4 + self.number(place)]


def _check(tables: _Tables) -> None:
    listed = tables.field(tables.follow(0), _PARAMETERS)
    count = 0 if listed is None else tables.number(listed)
    if count * _OBJECT_BYTES > _SMALL_BYTES + _TIMES * tables.size:
        raise TablesError(f"it claims {count} tensors in {tables.size} bytes: more than it has room for")
    claimed, names, twice = 0, set[bytes](), dict[bytes, None]()
    for table in _places(tables, listed, count):
        name, shape, values = (tables.field(table, which) for which in (_NAME, _SHAPE, _VALUES))
        axes = 0 if shape is None else tables.number(shape)
        if axes > MOST_AXES:
            raise TablesError(f"a tensor has {axes} axes, at most {MOST_AXES} are read")
        claimed += axes * _AXIS_BYTES + (0 if values is None else tables.number(values))
        claimed += 0 if name is None else tables.number(name)
        # Before a name is copied, which may be as long as the file each time.
        if claimed > tables.size:
            raise TablesError(f"its tensors claim {claimed} bytes or more, the file has {tables.size}")
        if name is not None:
            text = tables.text(name)
            twice |= {text: None} if text in names else {}
            names.add(text)
    _check_names(names, list(twice))


def _places(tables: _Tables, listed: int | None, count: int) -> Iterator[int]:
    """Yield the place of each tensor's table."""
    if listed is not None:
        for i in range(count):
            yield tables.follow(listed + 4 + 4 * i)


def _check_names(names: set[bytes], twice: list[bytes]) -> None:
    if twice:
        few = ", ".join(f"'{shown(name.decode(errors='replace'))}'" for name in twice[:_LISTED])
        raise TablesError(f"names occur twice: {few}")
    for name in names:
        try:
            name.decode()
        except UnicodeDecodeError as error:
            few = shown(name.decode(errors="replace"))
            raise TablesError(f"the name '{few}' is not UTF-8") from error
