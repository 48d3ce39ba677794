"""Walk a torch checkpoint's pickle without making its objects, to learn its claims before torch loads it.

A pickle can name one stored value a billion times (a tensor with stride 0), the same storage for a thousand
tensors, or more values than its storage has. It can call functions that ``weights_only`` allows, with a size
(``bytearray``, ``torch.Tensor``) or to inflate strings (``_codecs.encode`` to hex, again and again). Here no
class is looked up and nothing is called. torch itself decides which names are allowed
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

# Thirty levels of tuples of shared tuples are 2³⁰ values for code that walks them, as hashing does.
_TUPLE_VALUES, _KEY_VALUES = 1 << 20, 64
# A long key may be shared as well, by a hundred thousand dictionaries.
_KEY_LETTERS = 4096
# Limits of torch's tensors: number of dimensions, and size of one.
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


# What an opcode does unless the walker overrides it.
_AS_PICKLE: dict[int, Any] = dict(pickle._Unpickler.dispatch)


class Refused(Exception):
    """Error for a pickle whose claims can't be true."""


@dataclass(frozen=True)
class Storage:
    """Values that tensors lie in.

    Attributes:
        key: The pickle's name for it.
        count: Number of values.
        item_bytes: Size of each value in bytes.
    """

    key: str
    count: int
    item_bytes: int


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how many values a walk through it meets."""

    values: int

    def __new__(cls, items: Iterable[Any]) -> _Tuple:
        """Make a tuple from a pickle's values."""
        made = super().__new__(cls, items)
        made.values = 1 + sum(item.values if isinstance(item, _Tuple) else 1 for item in made)
        if made.values > _TUPLE_VALUES:
            raise Refused(f"a tuple in it stands for more than {_TUPLE_VALUES} values")
        return made


class _Dict(dict[Any, Any]):
    """Stand-in for ``OrderedDict``."""

    def __init__(self, pairs: Any = ()) -> None:
        if not isinstance(pairs, dict):
            _check_keys(pair[0] for pair in pairs)
        super().__init__(pairs)


class _Inert:
    """Stand-in for anything else that a pickle names, makes or fills."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore an element of a list."""

    def extend(self, values: Any) -> None:
        """Ignore elements of a list."""

    def add(self, value: Any) -> None:
        """Ignore an element of a set."""


@dataclass(frozen=True)
class _Name:
    """Name of a type of storage in a pickle."""

    name: str


# The pure Python unpickler: the C one allocates its memo by the largest number in a pickle.
class Walker(pickle._Unpickler):
    """Read a pickle without making the objects that it names.

    Args:
        file: File, at the pickle's beginning.
        most: Limit of bytes to read.

    Attributes:
        storages: Storages of its tensors, by key.
        claimed: Bytes of all its tensors together.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        super().__init__(_Limited(file, most), encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self.claimed = 0

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or a function."""
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
        """Return a tensor's storage, from ``("storage", type, key, location, count[, view])``."""
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError(f"a storage is described by {seen(pid)}")
        _, kind, key, _, count = pid[:5]
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"a storage has the key {seen(key)}")
        if type(count) is not int or count < 0:
            raise Refused(f"a storage claims {seen(count)} values")
        item_bytes = _ITEM_BYTES.get(kind.name.removesuffix("Storage"), 8)
        return self.storages.setdefault(key, Storage(key, count, item_bytes))

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Inert:
        if not isinstance(storage, Storage):
            raise Refused("a tensor has no storage")
        if not (_are_dims(size) and _are_dims(stride)):
            raise Refused(f"a tensor has the shape {_dims(size)} and strides {_dims(stride)}")
        if len(size) != len(stride) or type(offset) is not int or offset < 0:
            raise Refused(f"a tensor of shape {_dims(size)} has no place in its storage")
        count = math.prod(size)
        # The dtype of an untyped storage is stated elsewhere; torch checks these bounds.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        if last >= storage.count and storage.item_bytes > 1:
            raise Refused(
                f"a tensor of shape {_dims(size)} and strides {_dims(stride)} needs {last + 1} values, but "
                f"its storage '{seen(storage.key)}' has {storage.count}"
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
        """Fill a dict or a set, after checking that its keys are quick to hash."""
        _check_keys(self.stack[::step])  # type: ignore[attr-defined]
        self._as_pickle(opcode)

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        self._as_pickle(pickle.SETITEM)

    def _build(self) -> None:
        """Fill an object; for a tensor, check its place in a storage, since torch would enlarge it."""
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
    # Opcodes that torch refuses itself, but for which Python allocates as much as the file states.
    dispatch.pop(pickle.BYTEARRAY8[0], None)
    dispatch.pop(pickle.FROZENSET[0], None)


class _Limited:
    """A file from which only a limited number of bytes can be read."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._left = file, most

    def read(self, count: int) -> bytes:
        """Return up to ``count`` bytes."""
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
    """Return a shape, or the value in its place, as a short text."""
    if not isinstance(dims, tuple):
        return seen(dims)
    more = [f"… ({len(dims)})"] if len(dims) > _SHOWN_DIMS else []
    return f"[{', '.join([*map(seen, dims[:_SHOWN_DIMS]), *more])}]"
