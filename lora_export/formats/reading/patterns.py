"""Regular expressions that an adapter's config brings along, matched as PEFT does, but for a limited time.

PEFT matches ``target_modules``, ``rank_pattern`` and the like with Python's ``re``, which some patterns keep
busy for ever: ``(a|aa)+$`` doubles its work with each letter. So:

1. ``re`` says whether a pattern is one, and a pattern that can't branch is matched by ``re``.
2. All others are matched by the package ``regex``, which has a time limit and the same syntax: what it reads
   in another way than ``re`` (``{e<=1}``, ``[[:alpha:]]``) is escaped first.
3. What `within` reads has one budget for all of its matches.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lora_export.errors import AdapterError

# For all matches of one reading together, in seconds of this thread; and what each match is granted besides,
# of which the usual one takes a tenth.
LIMIT_S = 1.0
_GRANT_S = 20e-6
# ``regex`` compiles about 150 letters a millisecond.
_LONGEST = 100_000
# Without these, escaped ones apart, a pattern has one way to match; PEFT's prefix ``(.*\\.)?`` has one for
# each dot.
_BRANCHING = frozenset("*+?{|")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_REPEAT = re.compile(r"\{(?:\d+(?:,\d*)?|,\d*)\}")
_COMMENT = re.compile(r"\(\?#[^)]*\)")
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")
_SHOWN = 80


@dataclass
class _Budget:
    """What is left of a reading's time.

    Attributes:
        where: What is read.
        left_s: Seconds.
    """

    where: str
    left_s: float = LIMIT_S


_BUDGET: ContextVar[_Budget | None] = ContextVar("pattern_budget", default=None)


class _UnlimitedError(Exception):
    """A pattern that ``regex`` can't match as ``re`` does."""


@contextlib.contextmanager
def within(where: str) -> Iterator[None]:
    """Give all matches in a ``with`` block one time limit.

    Args:
        where: What brings the patterns, for messages: an adapter and its file.
    """
    token = _BUDGET.set(_Budget(where))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def match(key: str, pattern: str, text: str) -> Any:
    """Return what ``re.match`` does.

    Args:
        key: Of the config, for messages.
        pattern: A stranger's.
        text: What to match.

    Raises:
        re.error: It is no regular expression.
        AdapterError: It takes too long.
    """
    return _run("match", key, pattern, text)


def fullmatch(key: str, pattern: str, text: str) -> Any:
    """Return what ``re.fullmatch`` does; arguments and errors as of `match`."""
    return _run("fullmatch", key, pattern, text)


def check(pattern: str) -> None:
    """Raise `re.error` for what is no regular expression."""
    try:
        re.compile(pattern)
    except (RecursionError, OverflowError) as error:
        raise re.error(str(error), pattern) from error


def _run(method: Literal["match", "fullmatch"], key: str, pattern: str, text: str) -> Any:
    budget = _BUDGET.get() or _Budget("an adapter's config")
    try:
        limited, compiled = _compiled(pattern)
    except _UnlimitedError as error:
        raise _refusal(budget, key, pattern, str(error)) from error
    if not limited:
        return getattr(compiled, method)(text)
    started = time.thread_time()
    try:
        found = getattr(compiled, method)(text, timeout=max(budget.left_s, _GRANT_S))
    except TimeoutError:
        budget.left_s = 0.0
        found = None
    budget.left_s += _GRANT_S - (time.thread_time() - started)
    if budget.left_s <= _GRANT_S:
        raise _refusal(budget, key, pattern, f"takes more than {LIMIT_S:g} s to match modules' paths")
    return found


def _refusal(budget: _Budget, key: str, pattern: str, why: str) -> AdapterError:
    shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}…"
    return AdapterError(
        f"{budget.where}: the regular expression {shown!r} of {key} {why}",
        f"write {key} without repeats inside of repeats, or as a list of modules' names",
    )


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> tuple[bool, Any]:
    """Return whether a pattern's matches need a limit, and the pattern compiled."""
    check(pattern)
    if _BRANCHING.isdisjoint(_ESCAPED.sub("", pattern).removeprefix("(.*)?")):
        return False, re.compile(pattern)
    if len(pattern) > _LONGEST:
        raise _UnlimitedError(f"has {len(pattern)} letters, more than {_LONGEST}")
    if _VERBOSE.search(pattern):
        raise _UnlimitedError("has the flag x, which can't be matched in a limited time")
    import regex

    try:
        return True, regex.compile(_for_regex(pattern), regex.V0)
    except (regex.error, RecursionError, OverflowError) as error:
        raise _UnlimitedError(f"can't be matched in a limited time ({error})") from error


def _for_regex(pattern: str) -> str:
    """Return a pattern that ``regex`` reads as ``re`` reads the given one."""
    made, at = [], 0
    while at < len(pattern):
        letter, token = pattern[at], pattern[at]
        if letter == "\\":
            token = pattern[at : at + 2]
        elif letter == "[":
            end = _set_end(pattern, at)
            made.append(_set_for_regex(pattern[at:end]))
            at = end
            continue
        elif comment := _COMMENT.match(pattern, at):
            token = comment[0]
        elif letter == "{":
            repeat = _REPEAT.match(pattern, at)
            made.append(repeat[0] if repeat else "\\{")
            at = repeat.end() if repeat else at + 1
            continue
        made.append(token)
        at += len(token)
    return "".join(made)


def _set_end(pattern: str, start: int) -> int:
    """Return where a set of characters ends: behind its ``]``, of which a first one is a member."""
    at = start + 1 + (pattern[start + 1] == "^")
    first = at
    while pattern[at] != "]" or at == first:
        at += 2 if pattern[at] == "\\" else 1
    return at + 1


def _set_for_regex(text: str) -> str:
    """Escape what opens a set, or a class by name, inside of a set."""
    return text[0] + re.sub(r"\\.|\[", lambda found: found[0] if len(found[0]) > 1 else "\\[", text[1:])
