r"""Text of strangers (names of tensors, nodes and files) on its way to a terminal, a log or a page.

A name may hold anything: escape sequences that colour, move or rename a terminal, a line break with a faked
``Error:`` behind it, marks that turn the direction of writing, ``::error::`` that a CI service obeys. All of
it is written out (``\x1b``, ``\n``, ``\u202e``), so that a reader sees what is there. JSON is not shown: it
stays exact, with escapes of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

# A line of a terminal or a log. A name of a megabyte says no more than its beginning and its end.
MAX_LINE = 2000
# A cell of a table: all rows are as wide as the widest.
MAX_CELL = 300
# Problems, notes and warnings that are printed one below the other.
MAX_LISTED = 100
# Subjects of one and the same problem that are still listed one by one, and those named of more.
MAX_ALIKE, _NAMED = 8, 3
# What CI services take for a command: GitHub's at the beginning of a line and its older form anywhere
# (github.com/actions/runner ``ActionCommand.cs``), Azure's (``##vso[``).
_FIRST, _ANYWHERE = re.compile(r"^(\s*):(?=:)"), re.compile(r"#(?=#(?:\w+)?\[)")


def printable(text: object, most: int = MAX_LINE) -> str:
    r"""Return a text in which all that a terminal or XML would act on is written out: ``\x1b``, ``\n``.

    Args:
        text: What is to be shown.
        most: Number of characters that are left, about; what is longer is cut in the middle.
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
    """Return a text as one line of a terminal or a log: `printable`, and no command to a CI service."""
    line = printable(text, most)
    if "::" in line:
        line = _FIRST.sub(r"\1\\x3a", line)
    if "##" in line:
        line = _ANYWHERE.sub(r"\\x23", line)
    return line


def safe(text: object, most: int = MAX_LINE) -> str:
    """Return a text that is nothing but text in HTML, in a quoted attribute and in SVG."""
    return escape(printable(text, most), quote=True)


def shown_lines(lines: Iterable[object], most: int = MAX_LINE) -> list[str]:
    """Return lines of a report, each as `shown` returns it; their number is their maker's choice."""
    return [shown(line, most) for line in lines]


def limited(lines: Sequence[str], what: str = "", most: int = MAX_LISTED) -> list[str]:
    """Return the first lines of a list, and how many more there are.

    Args:
        lines: All of them.
        what: What they are, in the plural.
        most: How many are left.
    """
    left = len(lines) - most
    if left <= 0:
        return list(lines)
    return [*lines[:most], f"… and {left} more{f' {what}' if what else ''}"]


def together(problems: Sequence[str]) -> list[str]:
    """Return problems with those that many subjects share in one line, at the place of the first.

    Args:
        problems: Each ``subject  reason``, with two spaces, or any other text.
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
    """Return an error as it is printed: the message, some of its problems, the hint."""
    lines = [shown(message), *(f"  {shown(problem)}" for problem in limited(together(problems)))]
    return [*lines, f"hint: {shown(hint)}"] if hint else lines
