"""Write what strangers wrote as JSON again, in memory and length that suit it.

Indented, a list of short numbers 60 levels deep has fifty times its length, and json keeps a text for each
number until the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

# An indented text may be twice as long as one in a line, and so many letters longer.
_TIMES, _SMALL = 2, 1 << 20
_NESTED = (dict, list, tuple)
# Parts that are joined at once.
_TOGETHER = 4096


def json_text(
    value: Any,
    *,
    indent: int = 1,
    sort_keys: bool = False,
    ensure_ascii: bool = False,
    allow_nan: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Return plain data as JSON, indented unless that would make it many times as long.

    Args:
        value: The data.
        indent: Spaces for each level.
        sort_keys: Write keys in the order of their names.
        ensure_ascii: Write letters outside of ASCII as escapes.
        allow_nan: Write NaN and infinities as Python does; otherwise as the texts ``nan``, ``inf``, ``-inf``,
            since JSON has no such numbers.
        default: Function that turns other objects into plain data.
    """
    maker = partial(json.JSONEncoder, sort_keys=sort_keys, ensure_ascii=ensure_ascii, default=default)
    try:
        text = maker(allow_nan=allow_nan).encode(value)
    except ValueError:
        value = _finite(value)
        text = maker().encode(value)
    if _spaces(value, indent) <= (_TIMES - 1) * len(text) + _SMALL:
        return "".join(_joined(maker(indent=indent).iterencode(value)))
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _spaces(value: Any, indent: int) -> int:
    """Return the number of letters that indenting adds: a line's end and its spaces for each entry."""
    total, depth, level = 0, 0, [value] if isinstance(value, _NESTED) else []
    while level:
        depth += 1
        inner: list[Any] = []
        for outer in level:
            entries: Iterable[Any] = outer.values() if isinstance(outer, dict) else outer
            total += (len(outer) + 1) * (1 + indent * depth)
            inner += [entry for entry in entries if isinstance(entry, _NESTED)]
        level = inner
    return total


def _joined(parts: Iterator[str]) -> Iterator[str]:
    """Yield longer parts: each short one would take fifty bytes of its own."""
    few: list[str] = []
    for part in parts:
        few.append(part)
        if len(few) == _TOGETHER:
            yield "".join(few)
            few.clear()
    yield "".join(few)
