"""What a torch checkpoint's pickle claims, known before torch allocates anything for it.

A pickle can name one stored value a billion times (a tensor with stride 0), the same storage for a thousand
tensors, more values than its storage has, or call what ``weights_only`` allows to be called with a size
(``bytearray``, ``torch.Tensor``) or to blow texts up (``_codecs.encode`` to hex, again and again). Here the
pickle is walked with nothing behind its names: no class is looked up and nothing is called. Whether the names
are allowed at all is torch's question (``torch._weights_only_unpickler``).

Source of the two layouts: https://github.com/pytorch/pytorch ``torch/serialization.py`` (``_save``,
``_legacy_save``) and ``torch/_utils.py`` (``_rebuild_tensor_v2``).
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora_export.untrusted.archives import archive_entries, archive_problems, too_much
from lora_export.untrusted.fields import seen

# An opcode of one byte makes an object of sixty: beside its storages a checkpoint's pickle is small.
_SMALL_PICKLE, _PICKLE_SHARE = 1 << 20, 8
_ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "QUInt8": 1, "QInt8": 1, "QInt32": 4, "Untyped": 1,
}  # fmt: skip
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
# Encodings that a pickle of protocol 2 writes bytes with.
_ENCODINGS = ("latin1", "latin-1", "utf-8", "ascii")


class _Refused(Exception):
    """The pickle claims what it can't have."""


@dataclass(frozen=True)
class _Storage:
    key: str
    count: int
    item_bytes: int


class _Dict(dict[Any, Any]):
    """An ``OrderedDict`` with nothing behind it."""


class _Inert:
    """Anything else that a pickle names, makes or fills."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an element of a list."""

    def extend(self, values: Any) -> None:
        """Take elements of a list."""

    def add(self, value: Any) -> None:
        """Take an element of a set."""


@dataclass(frozen=True)
class _Name:
    """A name of a pickle; storages are called by it."""

    name: str


# The pure Python one: the C one allocates its memo by the largest number that a pickle says.
class _Walker(pickle._Unpickler):
    def __init__(self, file: IO[bytes], most: int) -> None:
        super().__init__(_Limited(file, most), encoding="latin1")
        self.storages: dict[str, _Storage] = {}
        self.claimed = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if name in _REBUILD and module == "torch._utils":
            return self._tensor
        if name.startswith("_rebuild_parameter"):
            return lambda data, *_: data
        if name == "_rebuild_from_type_v2":
            return lambda function, _, arguments, *__: function(*arguments)
        if name.endswith("Storage"):
            return _Name(name)
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if name.endswith("Tensor") or name in ("bytearray", "Counter"):
            return _sized(name)
        return _Inert

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a tensor lies in: ``("storage", type, key, location, count[, view])``."""
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError(f"a storage is described by {seen(repr(pid))}")
        _, kind, key, _, count = pid[:5]
        if type(count) is not int or count < 0:
            raise _Refused(f"a storage is said to have {seen(count)} values")
        item_bytes = _ITEM_BYTES.get(kind.name.removesuffix("Storage"), 8)
        return self.storages.setdefault(str(key), _Storage(str(key), count, item_bytes))

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Inert:
        if not isinstance(storage, _Storage):
            raise _Refused("a tensor lies in no storage")
        entries = [size, stride]
        if not all(isinstance(e, tuple) and all(type(n) is int and n >= 0 for n in e) for e in entries):
            raise _Refused(f"a tensor has the shape {seen(repr(size))} and strides {seen(repr(stride))}")
        if len(size) != len(stride) or type(offset) is not int or offset < 0:
            raise _Refused(f"a tensor of shape {seen(repr(size))} has no place in its storage")
        count = math.prod(size)
        # Of an untyped storage the dtype is said elsewhere, and torch looks at the bounds.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        if last >= storage.count and storage.item_bytes > 1:
            raise _Refused(
                f"a tensor of shape {list(size)} and strides {list(stride)} needs {last + 1} values, its "
                f"storage '{seen(storage.key)}' has {storage.count}"
            )
        self.claimed += count * storage.item_bytes
        return _Inert()

    # What torch refuses by itself, but Python allocates by what the file says.
    dispatch = {**pickle._Unpickler.dispatch}  # noqa: RUF012
    dispatch.pop(pickle.BYTEARRAY8[0], None)


class _Limited:
    """A file of which no more than so many bytes are read."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._left = file, most

    def read(self, count: int) -> bytes:
        """Return bytes."""
        return self._taken(self._file.read(max(min(count, self._left + 1), 0)))

    def readline(self) -> bytes:
        """Return a line."""
        return self._taken(self._file.readline(self._left + 1))

    def readinto(self, into: Any) -> int:
        """Fill a buffer."""
        read = self.read(len(into))
        into[: len(read)] = read
        return len(read)

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise _Refused("its pickle is larger than that of any checkpoint of this size")
        return data


def _encode(text: Any, encoding: Any = "latin1") -> _Inert:
    if not isinstance(text, str) or encoding not in _ENCODINGS:
        raise _Refused(f"it encodes a text as {seen(encoding)}")
    return _Inert()


def _sized(name: str) -> Callable[..., _Inert]:
    def made(*arguments: Any) -> _Inert:
        if any(type(one) is int or isinstance(one, tuple) for one in arguments):
            raise _Refused(f"it makes a {name} of {seen(repr(arguments))}")
        return _Inert()

    return made


def claim_problems(path: Path) -> list[str]:
    """Return what a checkpoint claims and can't have.

    Args:
        path: A file that `torch.load` is to read.

    Raises:
        OSError: It can't be read.
        Exception: It is damaged: whatever the zip's or the pickle's reader met.
    """
    size = path.stat().st_size
    most = max(_SMALL_PICKLE, size // _PICKLE_SHARE)
    try:
        if zipfile.is_zipfile(path):
            entries = archive_entries(path)
            if problems := archive_problems(path, entries):
                return problems
            walker = _walk_archive(path, entries, most)
        else:
            walker = _walk_legacy(path, most)
    except _Refused as error:
        return [str(error)]
    stored = sum(storage.count * storage.item_bytes for storage in walker.storages.values())
    if stored > size + _SMALL_PICKLE:
        return [f"its storages are said to hold {stored} bytes, the file holds {size}"]
    if walker.claimed > too_much(size):
        return [
            f"its tensors are said to hold {walker.claimed} bytes, the file holds {size}: values are "
            "repeated (torch.Tensor.expand); save .contiguous() tensors"
        ]
    return []


def _walk_archive(path: Path, entries: tuple[zipfile.ZipInfo, ...], most: int) -> _Walker:
    found = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
        raise _Refused(f"it has {len(found)} entries data.pkl, wanted one")
    with zipfile.ZipFile(path) as archive, archive.open(found[0]) as file:
        walker = _Walker(file, most)
        walker.load()
    return walker


def _walk_legacy(path: Path, most: int) -> _Walker:
    """Walk a file of before torch 1.6: magic number, version, the machine, the object, its storages' keys."""
    storages: dict[str, _Storage] = {}
    claimed = 0
    with path.open("rb") as file:
        for _ in range(5):
            walker = _Walker(file, most)
            walker.load()
            storages |= walker.storages
            claimed += walker.claimed
    walker.storages, walker.claimed = storages, claimed
    return walker
