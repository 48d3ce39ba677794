"""Count what compiling a regular expression costs beyond its letters, before it is compiled.

The package ``regex`` copies an item as often as it has to be there at least, and once more for the loop
behind: ``a{60000}`` is 60,000 items, ``a+`` two, and ``(?:(?:a+)+)+`` eight. Of groups inside one another
twenty fill a gigabyte. ``re`` copies nothing, but makes a table for each set of letters that are not ASCII.
"""

from __future__ import annotations

import re

REPEAT = re.compile(r"\{(?:(?P<least>\d*)(?P<open>,)(?P<most>\d*)|(?P<times>\d+))\}")
COMMENT = re.compile(r"\(\?#[^)]*\)")
_WIDE = re.compile(r"[^\x00-\x7f]|\\[uUN]")
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")
# A set of letters that are not ASCII costs some milliseconds, and a set whose case is ignored a part of one:
# as much as so many letters.
_WIDE_SET, _CASELESS_SET = 500, 20


def surplus(pattern: str) -> int:
    """Return how many letters a pattern has when its repeats are written out, beyond those that it has."""
    is_caseless = _IGNORES_CASE.search(pattern) is not None
    # Letters, and those beyond, of the groups that are open at a position, the innermost last.
    groups, item, further = [0], 0, 0
    at, is_repeated = 0, False
    while at < len(pattern):
        letter, start = pattern[at], at
        repeat = REPEAT.match(pattern, at) if letter == "{" else None
        at = repeat.end() if repeat else at + 1
        if letter in "*+?" or repeat:
            # Behind another repeat it says only how that is matched (``a+?``).
            more = 0 if is_repeated else item * _copies(letter, repeat)
            groups[-1] += more
            further, item, is_repeated = further + more, item + more, True
            continue
        is_repeated = False
        if comment := COMMENT.match(pattern, start):
            at, item = comment.end(), 0
        elif letter == "(":
            groups.append(0)
            continue
        elif letter == ")" and len(groups) > 1:
            item = groups.pop() + 1
        else:
            at = start + 2 if letter == "\\" else set_end(pattern, start) if letter == "[" else at
            item = at - start
            if letter == "[":
                further += _WIDE_SET * bool(_WIDE.search(pattern, start, at)) + _CASELESS_SET * is_caseless
        groups[-1] += item
    return further


def _copies(letter: str, repeat: re.Match[str] | None) -> int:
    """Return the copies of an item that a repeat of it needs beside it."""
    if repeat is None:
        return int(letter == "+")
    if repeat["times"]:
        return max(int(repeat["times"][:_DIGITS]) - 1, 0)
    return int(repeat["least"][:_DIGITS] or 0)


# More than any pattern may have; a longer number is no number for Python.
_DIGITS = 12


def set_end(pattern: str, start: int) -> int:
    """Return where a set of characters ends: behind its ``]``, of which a first one is a member."""
    at = start + 1 + (pattern[start + 1 : start + 2] == "^")
    first = at
    while at < len(pattern) and (pattern[at] != "]" or at == first):
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
