r"""Escape strangers' text (names of tensors, nodes and files) for a terminal, a log or a page.

A name may hold anything: escape sequences that colour, move or rename a terminal, a line break and a faked
``Error:``, marks that change the direction of writing, ``::error::`` that a CI service obeys. All of these
are written out (``\x1b``, ``\n``, ``\u202e``), so that a reader sees them. JSON is not escaped here: it
stays exact, with escapes of its own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

# Limit of a line of a terminal or a log: the start and the end of a long name are enough.
MAX_LINE = 2000
# Limit of a cell of a table: all rows are as wide as the widest.
MAX_CELL = 300
# Limit of problems, notes and warnings in a list.
MAX_LISTED = 100
# Largest number of subjects of one problem that are listed one by one; of more, the first are named.
MAX_ALIKE, _NAMED = 8, 3
# Commands of CI services: GitHub's at the beginning of a line and its older form anywhere
# (github.com/actions/runner ``ActionCommand.cs``), Azure's (``##vso[``).
_FIRST, _ANYWHERE = re.compile(r"^(\s*):(?=:)"), re.compile(r"#(?=#(?:\w+)?\[)")


def printable(text: object, most: int = MAX_LINE) -> str:
    r"""Return a text in which characters that a terminal or XML would act on are escaped: ``\x1b``, ``\n``.

    Args:
        text: The text.
        most: Approximate limit of characters; a longer text is cut in the middle.
    """
    line = str(text)
    if len(line) > most:
        tail = most // 4
        line = f"{line[: most - tail]} … ({len(line)} characters) … {line[-tail:]}"
    if line.isprintable():
        return line
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line
    )


def shown(text: object, most: int = MAX_LINE) -> str:
    """Return a text as one line of a terminal or a log: `printable`, without commands to a CI service."""
    line = printable(text, most)
    if "::" in line:
        line = _FIRST.sub(r"\1\\x3a", line)
    if "##" in line:
        line = _ANYWHERE.sub(r"\\x23", line)
    return line


def safe(text: object, most: int = MAX_LINE) -> str:
    """Return a text that is only text in HTML, in a quoted attribute, in SVG, and in a log that prints it."""
    return escape(shown(text, most), quote=True)


def command(words: Iterable[object]) -> str:
    """Return words as a shell reads them; "" if a line would be cut, or characters of theirs be escaped.

    A part of a command is another one: cut between quotes, a name's own words would be run.

    Args:
        words: Its words; a path that begins with a dash, which would be read as an option, gets ``./``.
    """
    text = shlex.join(_word(word) for word in words)
    return text if len(text) <= MAX_LINE and shown(text) == text else ""


def _word(word: object) -> str:
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)


def shown_lines(lines: Iterable[object], most: int = MAX_LINE) -> list[str]:
    """Return lines of a report, each escaped by `shown`; the caller limits their number."""
    return [shown(line, most) for line in lines]


def limited(lines: Sequence[str], what: str = "", most: int = MAX_LISTED) -> list[str]:
    """Return the first lines of a list, and a line with the number of the others.

    Args:
        lines: All lines.
        what: Name of the entries, in the plural.
        most: Number of lines to keep.
    """
    left = len(lines) - most
    if left <= 0:
        return list(lines)
    return [*lines[:most], f"… and {left} more{f' {what}' if what else ''}"]


def together(problems: Sequence[str]) -> list[str]:
    """Return problems with a problem of many subjects in one line, at the place of the first.

    Args:
        problems: Texts ``subject  reason`` with two spaces, or any other text.
    """
    subjects: dict[str, list[str]] = {}
    for problem in problems:
        subject, parted, reason = problem.partition("  ")
        subjects.setdefault(reason.strip() if parted else problem, []).append(subject)
    lines: dict[str, None] = {}
    for problem in problems:
        subject, parted, reason = problem.partition("  ")
        alike = subjects[reason.strip()] if parted else [subject]
        if len(alike) > MAX_ALIKE:
            named = ", ".join(alike[:_NAMED])
            lines[f"{named} and {len(alike) - _NAMED} more  {reason.strip()}"] = None
        else:
            lines[problem] = None
    return list(lines)


def error_lines(message: str, problems: Sequence[str] = (), hint: str = "") -> list[str]:
    """Return the lines of an error: the message, the first of its problems, the hint."""
    lines = [shown(message), *(f"  {shown(problem)}" for problem in limited(together(problems)))]
    return [*lines, f"hint: {shown(hint)}"] if hint else lines
