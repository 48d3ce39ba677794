"""Walk a torch checkpoint's pickle without making its objects, to learn its claims before torch loads it.

A pickle can name one stored value a billion times (a tensor with stride 0), the same storage for a thousand
tensors, or more values than its storage has. It can call functions that ``weights_only`` allows, with a size
(``bytearray``, ``torch.Tensor``), to inflate strings (``_codecs.encode`` to hex, again and again) or to copy
one list a thousand times, and set attributes that hide an object's methods. Here nothing is called: each name
has a stand-in that takes what torch's and Python's own pickles give it, and nothing else. A name without one
is refused, whether ``weights_only`` would allow it or not.

Sources: https://github.com/pytorch/pytorch ``torch/_utils.py`` (``_rebuild_tensor_v2``,
``_rebuild_device_tensor_from_cpu_tensor``), ``torch/_tensor.py`` (``__reduce_ex__``),
``torch/_weights_only_unpickler.py``, ``torch/serialization.py`` (``persistent_load`` of both layouts).
"""

from __future__ import annotations

import math
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
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
# Functions that make tensors in which there is nothing to read: the kind that they make.
_OTHER_TENSORS = {
    "_rebuild_qtensor": "quantised by torch",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "without values (on the device 'meta')",
    "_rebuild_wrapper_subclass": "of a class of its own",
    "_rebuild_device_tensor_from_numpy": "of numpy",
}
# Bytes of a pickle for each entry of a list or dict that is copied: Python 2 wrote as many and more.
_COPY_SHARE = 8
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
    """Stand-in for a value that holds others at most: a set, a counter, a device."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        """Ignore an element of a set."""


class _Empty(_Inert):
    """Stand-in for a tensor from before torch 0.4, which a BUILD fills.

    Args:
        kind: Its type of values.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind


@dataclass(frozen=True, eq=False)
class _Made:
    """Stand-in for a tensor of so many values."""

    count: int


@dataclass(frozen=True, eq=False)
class _Bytes:
    """Stand-in for so many bytes."""

    count: int


@dataclass(frozen=True)
class _Name:
    """Stand-in for a type of tensors, of storages, or of values with their size in bytes."""

    name: str
    item_bytes: int = 0


# The pure Python unpickler: the C one allocates its memo by the largest number in a pickle.
class PickleWalker(pickle._Unpickler):
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
        self._copies_left = most // _COPY_SHARE
        self._known: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._ordered,
            "collections.Counter": self._hashed,
            "builtins.set": self._hashed,
            "builtins.bytearray": self._bytes,
            "_codecs.encode": self._bytes,
            "builtins.complex": _complex,
            "torch.device": _device,
            "torch.Size": self._shape,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": self._moved_tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._tensor._rebuild_from_type_v2": self._of_type,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or a function.

        Raises:
            Refused: A function of this name makes tensors that are never read.
            pickle.UnpicklingError: There is no stand-in.
        """
        # Names of Python 2, as torch translates them.
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        module = IMPORT_MAPPING.get(module, module)
        if known := self._known.get(f"{module}.{name}"):
            return known
        if module == "torch._utils" and name in _OTHER_TENSORS:
            raise Refused(f"it has a tensor that is {_OTHER_TENSORS[name]}: save plain tensors")
        if (module, name) == ("torch.nn.parameter", "Parameter"):
            return _Name(name)
        if module in ("torch", "torch.cuda", "torch.storage"):
            if name.endswith("Storage"):
                return _Name(name)
            kind = name.removesuffix("Tensor")
            if name == "Tensor" or (kind != name and kind in _ITEM_BYTES):
                return _Class(kind or "Float")
            if module == "torch" and (item_bytes := _dtype_bytes(name)):
                return _Name(name, item_bytes)
        raise pickle.UnpicklingError(f"it needs {seen(f'{module}.{name}')}")

    def persistent_load(self, pid: Any) -> Storage:
        """Return a tensor's storage, from ``("storage", type, key, location, count[, view])``."""
        if not isinstance(pid, tuple) or len(pid) < 5 or type(pid[1]) is not _Name:
            raise pickle.UnpicklingError(f"a storage is described by {seen(pid)}")
        _, kind, key, _, count = pid[:5]
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"a storage has the key {seen(key)}")
        if type(count) is not int or count < 0:
            raise Refused(f"a storage claims {seen(count)} values")
        item_bytes = _ITEM_BYTES.get(kind.name.removesuffix("Storage"), 8)
        return self.storages.setdefault(key, Storage(key, count, item_bytes))

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Made:
        return self._placed(storage, (offset, size, stride), getattr(storage, "item_bytes", 0))

    def _typed_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Made:
        """Make a tensor whose type of values is stated beside its storage, behind its hooks."""
        if len(more) < 3 or type(more[2]) is not _Name or not more[2].item_bytes:
            raise Refused("a tensor has no type of values")
        return self._placed(storage, (offset, size, stride), more[2].item_bytes)

    def _placed(self, storage: Any, place: tuple[Any, Any, Any], item_bytes: int) -> _Made:
        """Count the bytes of a tensor at a place (offset, size, stride) of a storage that holds it."""
        offset, size, stride = place
        if not isinstance(storage, Storage):
            raise Refused("a tensor has no storage")
        if not (_are_dims(size) and _are_dims(stride)):
            raise Refused(f"a tensor has the shape {_dims(size)} and strides {_dims(stride)}")
        if len(size) != len(stride) or type(offset) is not int or offset < 0:
            raise Refused(f"a tensor of shape {_dims(size)} has no place in its storage")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        held = storage.count * storage.item_bytes // item_bytes
        if last >= held:
            raise Refused(
                f"a tensor of shape {_dims(size)} and strides {_dims(stride)} needs {last + 1} values, but "
                f"its storage '{seen(storage.key)}' has {held}"
            )
        self.claimed += count * item_bytes
        return _Made(count)

    def _moved_tensor(self, data: Any, dtype: Any, *_: Any) -> _Made:
        """Make a tensor of a device without storages (XLA's) from one that torch converts when it loads."""
        if type(data) is not _Made or type(dtype) is not _Name or not dtype.item_bytes:
            raise Refused("a tensor of another device has no values or no type of values")
        self.claimed += data.count * dtype.item_bytes
        return data

    def _of_type(self, function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
        """Make a tensor with attributes."""
        if not isinstance(kind, (_Name, _Class)) or not isinstance(arguments, tuple):
            raise Refused(f"a tensor is made from {seen(arguments)}")
        if function not in self._known.values():
            raise Refused("a tensor is made by nothing that makes tensors")
        made = function(*arguments)
        if type(made) is not _Made:
            raise Refused("attributes of a tensor are given to something else")
        _check_attributes(state)
        return made

    def _ordered(self, pairs: Any = ()) -> _Dict:
        self._count_copies(pairs)
        return _Dict(pairs)

    def _hashed(self, items: Any = ()) -> _Inert:
        """Make a set or a counter."""
        self._count_copies(items)
        _check_keys(items)
        return _Inert()

    def _shape(self, dims: Any = ()) -> _Tuple:
        if not _are_dims(dims):
            raise Refused(f"it has a shape of {_dims(dims)}")
        return _Tuple(dims)

    def _bytes(self, text: Any = "", encoding: Any = "latin1") -> _Bytes:
        """Make bytes from a text, or from others; a pickle may name one text again and again."""
        if not isinstance(text, (str, _Bytes)) or encoding not in _ENCODINGS:
            raise Refused(f"it makes bytes of {seen(text)}, encoded as {seen(encoding)}")
        count = text.count if isinstance(text, _Bytes) else len(text)
        self.claimed += count
        return _Bytes(count)

    def _count_copies(self, values: Any) -> None:
        """Refuse to copy more values than a pickle of this size writes for this."""
        if not isinstance(values, (list, tuple, dict)):
            raise Refused(f"a set or a dict is made from {seen(values)}")
        self._copies_left -= len(values)
        if self._copies_left < 0:
            raise Refused(LARGE)

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
        """Fill an object, as only two kinds are: a tensor of old, and a dict with attributes."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        filled = self.stack[-1]  # type: ignore[attr-defined]
        if type(filled) is _Empty:
            # torch would enlarge the storage.
            if not isinstance(state, tuple) or len(state) != 4:
                raise Refused(f"a tensor is filled with {_dims(state)}")
            self._tensor(*state)
            if _ITEM_BYTES.get(filled.kind) != state[0].item_bytes:
                raise Refused("a tensor is filled with values of another type")
        elif type(filled) is _Dict:
            _check_attributes(state)
        else:
            raise Refused("it fills an object that is neither a dict nor a tensor")

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


class _Class:
    """Stand-in for a class of tensors, which is called to make an empty one.

    Args:
        kind: Its type of values.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, *arguments: Any) -> _Empty:
        """Make a tensor without values."""
        if arguments:
            raise Refused(f"it makes a tensor of {_dims(arguments)}")
        return _Empty(self._kind)


def _parameter(data: Any, needs_grad: Any = None, hooks: Any = None, state: Any = None) -> Any:
    if type(data) is not _Made:
        raise Refused("a parameter is made from something else than a tensor")
    _check_attributes(state)
    return data


def _device(kind: Any, index: Any = 0) -> _Inert:
    if not isinstance(kind, str) or type(index) is not int:
        raise Refused(f"a device is called {seen(kind)}")
    return _Inert()


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> _Inert:
    if type(real) not in (int, float) or type(imaginary) not in (int, float):
        raise Refused(f"a complex number is made from {seen(real)}")
    return _Inert()


def _dtype_bytes(name: str) -> int:
    """Return the size of a value of one of torch's types; 0 if there is none of this name."""
    import torch

    dtype = vars(torch).get(name)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 0


def _check_attributes(state: Any) -> None:
    """Refuse attributes that hide a method of the dict or the tensor that they are given to."""
    import torch

    if state is None:
        return
    if not isinstance(state, dict):
        raise Refused(f"attributes are {seen(state)}, wanted a dict")
    for name in state:
        if not isinstance(name, str) or hasattr(OrderedDict, name) or hasattr(torch.nn.Parameter, name):
            raise Refused(f"it sets an attribute {seen(name)}, which hides the object's own")


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
