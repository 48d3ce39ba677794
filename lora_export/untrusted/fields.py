"""Turn plain data (from JSON) into a dataclass, with every field checked against its annotation.

``Record(**data)`` checks only the names: a string for a number fails, if at all, far from the wrong file.
Known annotations are those of our records: dataclasses, ``tuple``, ``list``, ``Mapping``, ``Literal``,
unions, plain types, ``Any``; `Count` and `Size` for numbers with a lower bound. All problems are reported at
once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lora_export.untrusted.shown import shown

T = TypeVar("T")
_SEEN = 60
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


def from_plain(cls: type[T], data: object, known_only: bool = True) -> T:
    """Return a dataclass made from plain data.

    Args:
        cls: The dataclass.
        data: The data.
        known_only: Refuse fields that the dataclass does not have.

    Raises:
        FieldError: The data does not fit; all problems are listed.
    """
    checker = _Checker(known_only)
    made = checker.value(cls, data, "")
    if checker.problems:
        raise FieldError(checker.problems)
    assert isinstance(made, cls)
    return made


def check_plain(wanted: object, data: object, where: str = "") -> Any:
    """Return plain data as the type of an annotation; see `from_plain`."""
    checker = _Checker(known_only=True)
    made = checker.value(wanted, data, where)
    if checker.problems:
        raise FieldError(checker.problems)
    return made


class _Checker:
    """Turn values into the types of annotations, and collect all problems."""

    def __init__(self, known_only: bool) -> None:
        self.problems: list[str] = []
        self._known_only = known_only

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
        self.problems.append(f"{where or 'the record'}: {seen(data)}, wanted {wanted}")

    def _record(self, cls: Any, data: object, where: str) -> Any:
        if not isinstance(data, dict):
            self._complain(where, data, "an object")
            return None
        before, dot, annotations = len(self.problems), f"{where}." if where else "", _annotations(cls)
        known: dict[str, Field[Any]] = {field.name: field for field in fields(cls) if field.init}
        if self._known_only:
            self.problems += [f"{dot}{shown(key, _SEEN)}: is not known" for key in data if key not in known]
        values = {}
        for name, field in known.items():
            if name in data:
                values[name] = self.value(annotations[name], data[name], f"{dot}{name}")
            elif field.default is MISSING and field.default_factory is MISSING:
                self.problems.append(f"{dot}{name}: is missing")
        return cls(**values) if len(self.problems) == before else None

    def _bounded(self, inner: Any, bounds: tuple[Any, ...], data: object, where: str) -> Any:
        before = len(self.problems)
        made = self.value(inner, data, where)
        for bound in bounds if len(self.problems) == before else ():
            if isinstance(bound, AtLeast) and made < bound.value:
                self._complain(where, data, f"{bound.value} or more")
            if isinstance(bound, Axes) and not bound.least <= len(made) <= bound.most:
                self._complain(where, data, f"{bound.least} to {bound.most} entries")
        return made

    def _union(self, choices: tuple[Any, ...], data: object, where: str) -> Any:
        if data is None and NoneType in choices:
            return None
        left = [choice for choice in choices if choice is not NoneType]
        if len(left) == 1:
            return self.value(left[0], data, where)
        for choice in left:
            tried = _Checker(self._known_only)
            made = tried.value(choice, data, where)
            if not tried.problems:
                return made
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
        try:
            number = float(data)
        except OverflowError:
            number = math.inf
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
