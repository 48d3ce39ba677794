"""Turn plain data (from JSON) into a dataclass, with every field checked against its annotation.

``Record(**data)`` checks only the names: a string for a number fails, if at all, far from the wrong file.
Known annotations are those of our records: dataclasses, ``tuple``, ``list``, ``Mapping``, ``Literal``,
unions, plain types, ``Any``; `Count` and `Size` for numbers with a lower bound, `Number` for one that may be
NaN or infinite; `WholeMatch` for texts, `Keys` for mappings. All problems are reported at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    SupportsFloat,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from lora_export.untrusted.shown import shown

T = TypeVar("T")
_SEEN = 60
# Collected problems: a damaged file can break a rule once for every entry.
_MOST = 1000
# The largest size or number of bytes, here and in readers of our records.
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class AtLeast:
    """The lower bound of a number, in an annotation."""

    value: int


@dataclass(frozen=True)
class Axes:
    """Least and largest number of entries of a list, in an annotation."""

    least: int
    most: int


@dataclass(frozen=True)
class WholeMatch:
    """The pattern that the whole of a text matches, and what to call that, in an annotation."""

    pattern: str
    said: str


@dataclass(frozen=True)
class Keys:
    """The keys of a mapping and the annotations of their values, in an annotation.

    Attributes:
        required: Keys that are always there.
        optional: Keys that may be missing.
    """

    required: Mapping[str, Any]
    optional: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NonFinite:
    """A number may be one that JSON can't hold, written as a text, in an annotation."""


@dataclass(frozen=True)
class Later:
    """Files of older versions lack the field, in an annotation."""


_NON_FINITE = ("nan", "inf", "-inf")
Number = Annotated[float, NonFinite()]
Count = Annotated[int, AtLeast(0)]
Size = Annotated[int, AtLeast(1)]


class FieldError(ValueError):
    """Error for data that does not fit a record.

    Attributes:
        problems: A line for each field: its path, the value seen and the one wanted.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problems))


def from_plain(cls: type[T], data: object, known_only: bool = True, complete: bool = False) -> T:
    """Return a dataclass made from plain data.

    Args:
        cls: The dataclass.
        data: The data.
        known_only: Refuse fields that the dataclass does not have.
        complete: Refuse data without a field, also one that has a default, unless it is a `Later` one.

    Raises:
        FieldError: The data does not fit; all problems are listed.
    """
    made = _Checker(known_only, complete).checked(cls, data, "")
    assert isinstance(made, cls)
    return made


def check_plain(wanted: object, data: object, where: str = "") -> Any:
    """Return plain data as the type of an annotation; see `from_plain`."""
    return _Checker(known_only=True).checked(wanted, data, where)


class _EnoughError(Exception):
    """There are so many problems that further ones say nothing more."""


class _Checker:
    """Turn values into the types of annotations, and collect problems, up to `_MOST`."""

    def __init__(self, known_only: bool, complete: bool = False) -> None:
        self.problems: list[str] = []
        self._known_only, self._complete = known_only, complete

    def checked(self, wanted: Any, data: object, where: str) -> Any:
        """Return a value of an annotation's type; raise `FieldError` with all problems."""
        made = None
        with suppress(_EnoughError):
            made = self.value(wanted, data, where)
        if self.problems:
            raise FieldError(self.problems)
        return made

    def value(self, wanted: Any, data: object, where: str) -> Any:
        """Return a value of an annotation's type; after a problem, the result has no meaning."""
        origin, arguments = get_origin(wanted), get_args(wanted)
        if wanted is Any or wanted is object:
            return data
        if is_dataclass(wanted):
            return self._record(wanted, data, where)
        if origin is Annotated:
            return self._bounded(arguments[0], arguments[1:], data, where)
        if origin in (Union, UnionType):
            return self._union(arguments, data, where)
        if origin is Literal:
            # By type as well, because Python's 1 equals True.
            if not any(type(data) is type(word) and data == word for word in arguments):
                self._complain(where, data, f"one of {', '.join(map(str, arguments))}")
            return data
        if origin is tuple:
            return self._tuple(arguments, data, where)
        if origin is list:
            return list(self._items(arguments[0], data, where))
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(arguments[1], data, where)
        if wanted in _PLAIN:
            return self._plain(wanted, data, where)
        raise TypeError(f"no rule for the annotation {wanted}")

    def _complain(self, where: str, data: object, wanted: str) -> None:
        self._add(f"{where or 'the record'}: {seen(data)}, wanted {wanted}")

    def _add(self, *problems: str) -> None:
        self.problems += problems
        if len(self.problems) >= _MOST:
            raise _EnoughError

    def _record(self, cls: Any, data: object, where: str) -> Any:
        if not isinstance(data, dict):
            self._complain(where, data, "an object")
            return None
        before, dot, annotations = len(self.problems), f"{where}." if where else "", _annotations(cls)
        known: dict[str, Field[Any]] = {one.name: one for one in fields(cls) if one.init}
        if self._known_only:
            self._refuse_others(data, known, dot)
        values = {}
        for name, one in known.items():
            if name in data:
                values[name] = self.value(annotations[name], data[name], f"{dot}{name}")
            elif self._is_required(one, annotations[name]):
                self._add(f"{dot}{name}: is missing")
        return cls(**values) if len(self.problems) == before else None

    def _refuse_others(self, data: Mapping[str, Any], known: Mapping[str, Any], dot: str) -> None:
        for key in data:
            if key not in known:
                self._add(f"{dot}{shown(key, _SEEN)}: is not known")

    def _is_required(self, one: Field[Any], annotation: Any) -> bool:
        if one.default is MISSING and one.default_factory is MISSING:
            return True
        return self._complete and Later() not in get_args(annotation)[1:]

    def _bounded(self, inner: Any, bounds: tuple[Any, ...], data: object, where: str) -> Any:
        before = len(self.problems)
        if NonFinite() in bounds:
            return self._number(data, where)
        if keys := next((bound for bound in bounds if isinstance(bound, Keys)), None):
            return self._keyed(keys, data, where)
        made = self.value(inner, data, where)
        for bound in bounds if len(self.problems) == before else ():
            if isinstance(bound, AtLeast) and made < bound.value:
                self._complain(where, data, f"{bound.value} or more")
            if isinstance(bound, Axes) and not bound.least <= len(made) <= bound.most:
                self._complain(where, data, f"{bound.least} to {bound.most} entries")
            if isinstance(bound, WholeMatch) and not re.fullmatch(bound.pattern, made, re.DOTALL):
                self._complain(where, data, bound.said)
        return made

    def _number(self, data: object, where: str) -> float:
        if isinstance(data, str) and data in _NON_FINITE:
            return float(data)
        if type(data) not in (int, float):
            self._complain(where, data, f"a number, {', '.join(_NON_FINITE[:-1])} or {_NON_FINITE[-1]}")
            return math.nan
        return self._float(data, where)

    def _keyed(self, keys: Keys, data: object, where: str) -> dict[str, Any]:
        if not isinstance(data, dict):
            self._complain(where, data, "an object")
            return {}
        known, dot = {**keys.required, **keys.optional}, f"{where}." if where else ""
        self._refuse_others(data, known, dot)
        self._add(*(f"{dot}{key}: is missing" for key in keys.required if key not in data))
        return {key: self.value(known[key], data[key], f"{dot}{key}") for key in data if key in known}

    def _union(self, choices: tuple[Any, ...], data: object, where: str) -> Any:
        if data is None and NoneType in choices:
            return None
        left = [choice for choice in choices if choice is not NoneType]
        if len(left) == 1:
            return self.value(left[0], data, where)
        for choice in left:
            tried = _Checker(self._known_only, self._complete)
            with suppress(FieldError):
                return tried.checked(choice, data, where)
        self._complain(where, data, " or ".join(_PLAIN.get(choice, str(choice)) for choice in left))
        return None

    def _tuple(self, arguments: tuple[Any, ...], data: object, where: str) -> tuple[Any, ...]:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(self._items(arguments[0], data, where))
        if not isinstance(data, list | tuple) or len(data) != len(arguments):
            self._complain(where, data, f"a list of {len(arguments)}")
            return ()
        pairs = zip(arguments, data, strict=True)
        return tuple(self.value(wanted, one, f"{where}[{i}]") for i, (wanted, one) in enumerate(pairs))

    def _items(self, wanted: Any, data: object, where: str) -> Iterator[Any]:
        if not isinstance(data, list | tuple):
            self._complain(where, data, "a list")
            return
        for i, one in enumerate(data):
            yield self.value(wanted, one, f"{where}[{i}]")

    def _mapping(self, wanted: Any, data: object, where: str) -> dict[str, Any]:
        if not isinstance(data, dict):
            self._complain(where, data, "an object")
            return {}
        return {key: self.value(wanted, one, f"{where}['{shown(key, _SEEN)}']") for key, one in data.items()}

    def _plain(self, wanted: type, data: object, where: str) -> object:
        # By exact type, because Python's booleans are numbers as well.
        fits = type(data) is wanted or (wanted is float and type(data) is int)
        if not fits:
            self._complain(where, data, _PLAIN[wanted])
            return data
        if wanted is float:
            return self._float(data, where)
        if type(data) is int and not -_LARGEST <= data <= _LARGEST:
            self._complain(where, data, "an integer of 64 bits")
        return data

    def _float(self, data: Any, where: str) -> float:
        number = nearest_float(data)
        if not math.isfinite(number):
            self._complain(where, data, "a finite number")
        return number


_PLAIN: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    dict: "an object",
    list: "a list",
}


def nearest_float(number: SupportsFloat) -> float:
    """Return a number as a float: infinity for one that is larger than any, or smaller."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def seen(data: object) -> str:
    """Return a short text for a value."""
    if isinstance(data, dict | list | tuple):
        return f"an {'object' if isinstance(data, dict) else 'array'} of {len(data)}"
    if isinstance(data, set | frozenset | bytes | bytearray):
        return f"{'bytes' if isinstance(data, bytes | bytearray) else 'a set'}, {len(data)} of them"
    if isinstance(data, int) and data.bit_length() > 200:
        return f"a number of {data.bit_length()} bits"
    text = json.dumps(data[: _SEEN + 1] if isinstance(data, str) else data, default=repr, ensure_ascii=False)
    return shown(text if len(text) <= _SEEN else f"{text[: _SEEN - 1]}…")


@cache
def _annotations(cls: Callable[..., Any]) -> Mapping[str, Any]:
    return get_type_hints(cls, include_extras=True)
