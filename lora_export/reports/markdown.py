"""Markdown for summaries of CI jobs and pull requests: what is put into it stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lora_export.untrusted.shown import MAX_CELL, printable, shown

# What begins a construct of GitHub's or GitLab's Markdown within a line: emphasis, code, links (bare ones
# too), HTML, cells, mentions, formulas.
_ACTING = re.compile(r"[\\`*_\[\]<>|~&@:$#]|(?<=www)\.")


def text(line: object) -> str:
    """Return a text that is nothing but text in Markdown."""
    return _ACTING.sub(r"\\\g<0>", printable(line))


def table(rows: Sequence[Sequence[object]], words: int) -> list[str]:
    """Return the lines of a table and an empty one; nothing where there are no rows but its heading.

    Args:
        rows: Cells, the heading first.
        words: How many columns, from the left, are words; the others are numbers.
    """
    if len(rows) < 2:
        return []
    head, *body = ["| " + " | ".join(text(shown(cell, MAX_CELL)) for cell in row) + " |" for row in rows]
    sides = ["---" if i < words else "---:" for i in range(len(rows[0]))]
    return [head, f"| {' | '.join(sides)} |", *body, ""]


def section(title: str, lines: Sequence[str]) -> list[str]:
    """Return lines below a heading; nothing where there are none."""
    return [f"## {text(title)}", "", *lines] if lines else []


def block(lines: Iterable[str]) -> list[str]:
    """Return lines as they would be printed, in a block of code, and an empty one."""
    kept = [printable(line) for line in lines]
    # A fence ends at one that is as long: it is made longer than any in the lines.
    fence = "`" * max([3, *(len(run) + 1 for line in kept for run in re.findall("`+", line))])
    return [fence + "text", *kept, fence, ""] if kept else []
