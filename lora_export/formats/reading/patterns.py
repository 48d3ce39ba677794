"""Regular expressions that an adapter's config brings along, matched as PEFT does, but for a limited time.

PEFT matches ``target_modules``, ``rank_pattern`` and the like with Python's ``re``, which some patterns keep
busy for ever: ``(a|aa)+$`` doubles its work with each letter. So:

1. ``re`` says whether a pattern is one, and a pattern that can't branch is matched by ``re``.
2. All others are matched by the package ``regex``, which has a time limit and the same syntax: what it reads
   in another way than ``re`` (``{e<=1}``, ``[[:alpha:]]``) is escaped first.
3. A pattern that repeats a group and refers to one is refused: what a group of an earlier round, or of one
   that was given up, holds in ``re`` it does not always hold in ``regex`` (``((a)|b(?(2)a|q))*``).
4. What ``regex`` writes out is counted before: an item with a least number of repeats is copied so many
   times (``a{60000}``), and what is inside one another multiplies (``(?:(?:a{9}){9}){9}``).
5. What `within` reads has one budget for all of its patterns: for the time of compiling and matching them,
   for their number and for that of matches.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

from lora_export.errors import AdapterError
from lora_export.formats.reading.pattern_sizes import COMMENT, set_end, surplus

# For all patterns of one reading together, in seconds of this thread; and what each match and each pattern is
# granted besides, of which the usual one takes a tenth, and a third; in total no
# more than so much: a reading's patterns take three seconds, and what is counted around them, at most.
LIMIT_S = 1.0
_GRANT_S, _COMPILE_GRANT_S, _MOST_GRANTED_S = 20e-6, 500e-6, 2.0
# A microsecond each, or more for a long text; and some kilobytes each.
_MOST_MATCHES, _LONG_TEXT = 5_000_000, 1000
_MOST_PATTERNS = 10_000
# ``re`` and ``regex`` together compile about 60 letters a millisecond.
_LONGEST = 50_000
# Letters that ``regex`` writes out besides (rule 5), in all patterns of a reading: 0.6 kB each.
_MOST_REPEATED = 100_000
# Without these, escaped ones apart, a pattern has one way to match; PEFT's prefix ``(.*\\.)?`` has one for
# each dot.
_BRANCHING = frozenset("*+?{|")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_REPEAT = re.compile(r"\{(?:\d+(?:,\d*)?|,\d*)\}")
_NAMED = re.compile(r"\\(?:N\{([^}]*)\}|.)", re.DOTALL)
_REFERENCE = re.compile(r"\\[1-9]|\(\?(?:\(|P=)")
# ``?`` is no repeat: PEFT puts ``(.*\.)?`` before each key.
_GROUP_REPEAT = re.compile(r"\)(?:[*+]|\{\d*,?\d*\})")
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")
_SHOWN = 80
_TOO_SLOW = "takes more than {}, with those before it, to match modules' paths"
# What silences warnings is the whole process's.
_QUIET = threading.Lock()
T = TypeVar("T")


@dataclass(kw_only=True)
class _Budget:
    """The budget that is left for a reading.

    Attributes:
        where: Name of the adapter and its file, for messages.
        left_s: Seconds.
        granted_s: Seconds that came on top.
        spent_s: Seconds that are spent.
        matches: Number of matches; a long text counts as several.
        repeated: Letters that patterns have when their repeats are written out, beyond those that they have.
        compiled: Patterns, ready to match.
        afforded: Patterns whose size is counted.
        remembered: The object's id → the object, and the result that was made from it.
    """

    where: str
    left_s: float = field(default_factory=lambda: LIMIT_S)
    granted_s: float = 0.0
    spent_s: float = 0.0
    matches: int = _MOST_MATCHES
    repeated: int = _MOST_REPEATED
    compiled: dict[str, tuple[bool, Any]] = field(default_factory=dict)
    remembered: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    afforded: set[str] = field(default_factory=set)

    @property
    def limit(self) -> str:
        """Limit of all patterns together, for messages."""
        return f"{round(LIMIT_S + self.granted_s, 1):g} s"

    def spend(self, seconds: float, grant_s: float) -> bool:
        """Take what something cost, less what it is granted; return whether anything is left."""
        if self.granted_s < _MOST_GRANTED_S:
            self.granted_s += grant_s
            self.left_s += grant_s
        self.spent_s += seconds
        self.left_s -= seconds
        return self.left_s > 0


_BUDGET: ContextVar[_Budget | None] = ContextVar("pattern_budget", default=None)


class _UnlimitedError(Exception):
    """A pattern that ``regex`` can't match as ``re`` does."""


@contextlib.contextmanager
def within(where: str) -> Iterator[None]:
    """Give all matches in a ``with`` block one time limit.

    Args:
        where: Origin of the patterns, for messages: an adapter and its file.
    """
    token = _BUDGET.set(_Budget(where=where))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def match(key: str, pattern: str, text: str) -> Any:
    """Return what ``re.match`` does.

    Args:
        key: The config's key, for messages.
        pattern: Regular expression from a config that somebody else wrote.
        text: Text to match.

    Raises:
        re.error: The pattern is not a regular expression.
        AdapterError: The match takes too long.
    """
    return _run("match", key, pattern, text)


def fullmatch(key: str, pattern: str, text: str) -> Any:
    """Return what ``re.fullmatch`` does; arguments and errors as of `match`."""
    return _run("fullmatch", key, pattern, text)


def remembered(owner: object, make: Callable[[], T]) -> T:
    """Return ``make()``, called once per object in each reading (`within`), in which it may not change."""
    budget = _BUDGET.get()
    if budget is None:
        return make()
    if id(owner) not in budget.remembered:
        budget.remembered[id(owner)] = owner, make()
    made: T = budget.remembered[id(owner)][1]
    return made


def check(key: str, pattern: str) -> None:
    """Raise `re.error` if a pattern is not a regular expression.

    Args:
        key: Of the config, for messages.
        pattern: A stranger's.

    Raises:
        re.error: The pattern is not a regular expression.
        AdapterError: All patterns together take too long to compile.
    """
    budget = _budget()
    _afford(budget, key, pattern)
    with _compiling(budget, key, pattern):
        _checked(pattern)


def _checked(pattern: str) -> re.Pattern[str]:
    """Return a pattern compiled by ``re``; raise `re.error` if it is none."""
    try:
        with _without_warnings():
            return re.compile(pattern)
    except (RecursionError, OverflowError) as error:
        raise re.error(str(error), pattern) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore what compilers say of sets such as ``[[a]``: it names our lines, and nothing to do."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _budget() -> _Budget:
    return _BUDGET.get() or _Budget(where="an adapter's config")


@contextlib.contextmanager
def _compiling(budget: _Budget, key: str, pattern: str) -> Iterator[None]:
    """Count the time of a ``with`` block."""
    started = time.thread_time()
    yield
    if not budget.spend(time.thread_time() - started, _COMPILE_GRANT_S):
        raise _refusal(budget, key, pattern, f"and those before it take more than {budget.limit} to compile")


def _afford(budget: _Budget, key: str, pattern: str) -> None:
    """Count what compiling a pattern costs that can't be stopped once it has begun."""
    if pattern in budget.afforded:
        return
    if len(pattern) > _LONGEST:
        raise _refusal(budget, key, pattern, f"has {len(pattern)} letters, more than {_LONGEST}")
    budget.afforded.add(pattern)
    budget.repeated -= surplus(pattern)
    if budget.repeated < 0:
        why = f"and those before it have more than {_MOST_REPEATED} letters once repeats are written out"
        raise _refusal(budget, key, pattern, why)


def _ready(budget: _Budget, key: str, pattern: str) -> tuple[bool, Any]:
    """Return what `_compiled` does, from this reading's patterns where it is there."""
    if found := budget.compiled.get(pattern):
        return found
    if len(budget.compiled) >= _MOST_PATTERNS:
        raise _refusal(budget, key, pattern, f"is one of more than {_MOST_PATTERNS}")
    _afford(budget, key, pattern)
    with _compiling(budget, key, pattern):
        try:
            made = budget.compiled[pattern] = _compiled(pattern)
        except _UnlimitedError as error:
            raise _refusal(budget, key, pattern, str(error)) from error
    return made


def _run(method: Literal["match", "fullmatch"], key: str, pattern: str, text: str) -> Any:
    budget = _budget()
    limited, compiled = _ready(budget, key, pattern)
    started = time.thread_time()
    _count(budget, key, pattern, text)
    # Among millions, what needs no limit takes its time as well.
    given = {"timeout": max(budget.left_s, _GRANT_S)} if limited else {}
    try:
        found = getattr(compiled, method)(text, **given)
    except TimeoutError:
        budget.left_s, found = 0.0, None
    if not budget.spend(time.thread_time() - started, _GRANT_S):
        raise _refusal(budget, key, pattern, _TOO_SLOW.format(budget.limit))
    return found


@contextlib.contextmanager
def timed(key: str, pattern: str) -> Iterator[None]:
    """Count the time of a ``with`` block, and in it that between matches: among millions, that is most of it.

    Args:
        key: The config's key, for messages.
        pattern: One of the patterns.

    Raises:
        AdapterError: The reading takes too long.
    """
    budget, started = _budget(), time.thread_time()
    before = budget.spent_s
    yield
    counted = budget.spent_s - before
    if not budget.spend(time.thread_time() - started - counted, 0):
        raise _refusal(budget, key, pattern, _TOO_SLOW.format(budget.limit))


def count(key: str, pattern: str, text: str, times: int) -> None:
    """Count looking patterns up as matching them.

    Args:
        key: The config's key, for messages.
        pattern: One of the patterns.
        text: Text that is looked up.
        times: Number of patterns.

    Raises:
        AdapterError: The reading has made too many matches.
    """
    _count(_budget(), key, pattern=pattern, text=text, times=times)


def _count(budget: _Budget, key: str, pattern: str, text: str, times: int = 1) -> None:
    budget.matches -= times * (1 + len(text) // _LONG_TEXT)
    if budget.matches < 0:
        why = f"and others are matched with modules' paths more than {_MOST_MATCHES} times"
        raise _refusal(budget, key, pattern, why)


def _refusal(budget: _Budget, key: str, pattern: str, why: str) -> AdapterError:
    shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}…"
    return AdapterError(
        f"{budget.where}: the regular expression {shown!r} of {key} {why}",
        f"write {key} without repeats inside of repeats, or with modules' names as they are",
    )


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> tuple[bool, Any]:
    """Return whether a pattern's matches need a limit, and the pattern compiled."""
    checked = _checked(pattern)
    if _BRANCHING.isdisjoint(_ESCAPED.sub("", pattern).removeprefix("(.*)?")):
        return False, checked
    if _VERBOSE.search(pattern):
        raise _UnlimitedError("has the flag x, which can't be matched in a limited time")
    import regex

    try:
        with _without_warnings():
            return True, regex.compile(_for_regex(pattern), regex.V0)
    except (regex.error, RecursionError, OverflowError) as error:
        raise _UnlimitedError(f"can't be matched in a limited time ({error})") from error


def _for_regex(pattern: str) -> str:
    """Return a pattern that ``regex`` reads as ``re`` reads the given one.

    Raises:
        _UnlimitedError: The pattern breaks rule 3.
    """
    # A character by its name has braces that are no repeat.
    pattern = _NAMED.sub(_character, pattern)
    made, at = [], 0
    refers = repeats = False
    while at < len(pattern):
        letter, token = pattern[at], pattern[at]
        refers |= _REFERENCE.match(pattern, at) is not None
        repeats |= _GROUP_REPEAT.match(pattern, at) is not None
        if letter == "\\":
            token = pattern[at : at + 2]
        elif letter == "[":
            end = set_end(pattern, at)
            made.append(_set_for_regex(pattern[at:end]))
            at = end
            continue
        elif comment := COMMENT.match(pattern, at):
            token = comment[0]
        elif letter == "{":
            repeat = _REPEAT.match(pattern, at)
            made.append(repeat[0] if repeat else "\\{")
            at = repeat.end() if repeat else at + 1
            continue
        made.append(token)
        at += len(token)
    if refers and repeats:
        raise _UnlimitedError("refers to a group and repeats one, which can't be matched in a limited time")
    return "".join(made)


def _character(found: re.Match[str]) -> str:
    """Return an escaped letter as it is, or the one that its name in braces stands for."""
    return re.escape(unicodedata.lookup(found[1])) if found[1] else found[0]


def _set_for_regex(text: str) -> str:
    """Escape what opens a set, or a class by name, inside of a set."""
    return text[0] + re.sub(r"\\.|\[", lambda found: found[0] if len(found[0]) > 1 else "\\[", text[1:])
