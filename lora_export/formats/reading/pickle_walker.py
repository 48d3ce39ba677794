"""A torch checkpoint's pickle, walked with nothing behind its names: what it claims, before torch makes it.

A pickle can name one stored value a billion times (a tensor with stride 0), the same storage for a thousand
tensors, more values than its storage has, or call what ``weights_only`` allows to be called with a size
(``bytearray``, ``torch.Tensor``) or to blow texts up (``_codecs.encode`` to hex, again and again). Here no
class is looked up and nothing is called. Whether the names are allowed at all is torch's question
(``torch._weights_only_unpickler``).

Source: https://github.com/pytorch/pytorch ``torch/_utils.py`` (``_rebuild_tensor_v2``),
``torch/serialization.py`` (``persistent_load`` of both layouts).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lora_export.untrusted.fields import seen

# Of tuples of shared tuples, thirty levels are 2³⁰ values to whoever walks them, and a hash does.
_TUPLE_VALUES, _KEY_VALUES = 1 << 20, 64
# A name may be shared as well, by a hundred thousand dictionaries.
_KEY_LETTERS = 4096
# torch has no tensor of more dimensions, nor of longer ones.
_MOST_DIMS, _LONGEST_DIM = 64, 1 << 63
_SHOWN_DIMS = 8
LARGE = "its pickle is larger than that of any checkpoint of this size"
_ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "QUInt8": 1, "QInt8": 1, "QInt32": 4, "Untyped": 1,
}  # fmt: skip
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
# Encodings that a pickle of protocol 2 writes bytes with.
_ENCODINGS = ("latin1", "latin-1", "utf-8", "ascii")


# What an opcode does where nothing else is said.
_AS_PICKLE: dict[int, Any] = dict(pickle._Unpickler.dispatch)


class Refused(Exception):
    """The pickle claims what it can't have."""


@dataclass(frozen=True)
class Storage:
    """Values that tensors lie in.

    Attributes:
        key: The pickle's name for it.
        count: Values.
        item_bytes: Size of each.
    """

    key: str
    count: int
    item_bytes: int


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how many values whoever walks it meets."""

    values: int

    def __new__(cls, items: Iterable[Any]) -> _Tuple:
        """Make one of a pickle's values."""
        made = super().__new__(cls, items)
        made.values = 1 + sum(item.values if isinstance(item, _Tuple) else 1 for item in made)
        if made.values > _TUPLE_VALUES:
            raise Refused(f"a tuple in it stands for more than {_TUPLE_VALUES} values")
        return made


class _Dict(dict[Any, Any]):
    """An ``OrderedDict`` with nothing behind it."""

    def __init__(self, pairs: Any = ()) -> None:
        if not isinstance(pairs, dict):
            _check_keys(pair[0] for pair in pairs)
        super().__init__(pairs)


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
class Walker(pickle._Unpickler):
    """Reads a pickle, and makes nothing of what it names.

    Args:
        file: At the pickle's beginning.
        most: Bytes that are read of it.

    Attributes:
        storages: What its tensors lie in, by key.
        claimed: Bytes of all its tensors together.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        super().__init__(_Limited(file, most), encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self.claimed = 0

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or a function."""
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
        if name in ("set", "frozenset", "Counter"):
            return _hashed
        if name.endswith("Tensor") or name == "bytearray":
            return _sized(name)
        return _Inert

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor lies in: ``("storage", type, key, location, count[, view])``."""
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError(f"a storage is described by {seen(pid)}")
        _, kind, key, _, count = pid[:5]
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"a storage has the key {seen(key)}")
        if type(count) is not int or count < 0:
            raise Refused(f"a storage is said to have {seen(count)} values")
        item_bytes = _ITEM_BYTES.get(kind.name.removesuffix("Storage"), 8)
        return self.storages.setdefault(key, Storage(key, count, item_bytes))

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Inert:
        if not isinstance(storage, Storage):
            raise Refused("a tensor lies in no storage")
        if not (_are_dims(size) and _are_dims(stride)):
            raise Refused(f"a tensor has the shape {_dims(size)} and strides {_dims(stride)}")
        if len(size) != len(stride) or type(offset) is not int or offset < 0:
            raise Refused(f"a tensor of shape {_dims(size)} has no place in its storage")
        count = math.prod(size)
        # Of an untyped storage the dtype is said elsewhere, and torch looks at the bounds.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        if last >= storage.count and storage.item_bytes > 1:
            raise Refused(
                f"a tensor of shape {_dims(size)} and strides {_dims(stride)} needs {last + 1} values, its "
                f"storage '{seen(storage.key)}' has {storage.count}"
            )
        self.claimed += count * storage.item_bytes
        return _Inert()

    def _made_tuple(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.stack.append(_Tuple(items))  # type: ignore[attr-defined]

    def _short_tuple(self, count: int) -> None:
        self.stack[-count:] = [_Tuple(self.stack[-count:])]  # type: ignore[attr-defined]

    def _as_pickle(self, opcode: bytes) -> None:
        _AS_PICKLE[opcode[0]](self)

    def _set_items(self, opcode: bytes, step: int) -> None:
        """Fill a dict or a set, whose keys are quick to look up."""
        _check_keys(self.stack[::step])  # type: ignore[attr-defined]
        self._as_pickle(opcode)

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        self._as_pickle(pickle.SETITEM)

    def _build(self) -> None:
        """Fill an object; a tensor is filled with its place in a storage, for which torch enlarges it."""
        state = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(state, tuple) and state and isinstance(state[0], Storage):
            self._tensor(*state)
        self._as_pickle(pickle.BUILD)

    dispatch: ClassVar[dict[int, Any]] = {
        **_AS_PICKLE,
        pickle.TUPLE[0]: _made_tuple,
        pickle.TUPLE1[0]: lambda self: self._short_tuple(1),
        pickle.TUPLE2[0]: lambda self: self._short_tuple(2),
        pickle.TUPLE3[0]: lambda self: self._short_tuple(3),
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: lambda self: self._set_items(pickle.SETITEMS, 2),
        pickle.ADDITEMS[0]: lambda self: self._set_items(pickle.ADDITEMS, 1),
        pickle.BUILD[0]: _build,
    }
    # What torch refuses by itself, but Python allocates by what the file says.
    dispatch.pop(pickle.BYTEARRAY8[0], None)
    dispatch.pop(pickle.FROZENSET[0], None)


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
            raise Refused(LARGE)
        return data


def _encode(text: Any, encoding: Any = "latin1") -> _Inert:
    if not isinstance(text, str) or encoding not in _ENCODINGS:
        raise Refused(f"it encodes a text as {seen(encoding)}")
    return _Inert()


def _sized(name: str) -> Callable[..., _Inert]:
    def made(*arguments: Any) -> _Inert:
        if any(type(one) is int or isinstance(one, tuple) for one in arguments):
            raise Refused(f"it makes a {name} of {_dims(arguments)}")
        return _Inert()

    return made


def _hashed(items: Any = ()) -> _Inert:
    """Make a set or a counter."""
    _check_keys(items)
    return _Inert()


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if isinstance(key, _Tuple) and key.values > _KEY_VALUES:
            raise Refused(f"a key in it is a tuple that stands for more than {_KEY_VALUES} values")
        if isinstance(key, str) and len(key) > _KEY_LETTERS:
            raise Refused(f"a key in it has {len(key)} letters, more than {_KEY_LETTERS}")


def _are_dims(dims: Any) -> bool:
    return (
        isinstance(dims, tuple)
        and len(dims) <= _MOST_DIMS
        and all(type(n) is int and 0 <= n < _LONGEST_DIM for n in dims)
    )


def _dims(dims: Any) -> str:
    """Return a shape, or what stands in its place, in a few characters."""
    if not isinstance(dims, tuple):
        return seen(dims)
    more = [f"… ({len(dims)})"] if len(dims) > _SHOWN_DIMS else []
    return f"[{', '.join([*map(seen, dims[:_SHOWN_DIMS]), *more])}]"
