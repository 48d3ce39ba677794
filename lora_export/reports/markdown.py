"""Write Markdown for summaries of CI jobs and pull requests; texts put into it stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lora_export.untrusted.shown import MAX_CELL, printable, shown, shown_lines

# Characters that begin a construct of GitHub's or GitLab's Markdown within a line: emphasis, code, links
# (bare ones too), HTML, cells, mentions, formulas.
_ACTING = re.compile(r"[\\`*_\[\]<>|~&@:$#]|(?<=www)\.")


def text(line: object) -> str:
    """Escape a text so that Markdown shows it unchanged."""
    return _ACTING.sub(r"\\\g<0>", printable(line))


def table(rows: Sequence[Sequence[object]], words: int) -> list[str]:
    """Return the lines of a table and an empty line; nothing if the heading is its only row.

    Args:
        rows: Cells, the heading first.
        words: Number of columns, from the left, that are words; the others are numbers.
    """
    if len(rows) < 2:
        return []
    head, *body = ["| " + " | ".join(text(shown(cell, MAX_CELL)) for cell in row) + " |" for row in rows]
    sides = ["---" if i < words else "---:" for i in range(len(rows[0]))]
    return [head, f"| {' | '.join(sides)} |", *body, ""]


def section(title: str, lines: Sequence[str]) -> list[str]:
    """Return lines below a heading; nothing if there are no lines."""
    return [f"## {text(title)}", "", *lines] if lines else []


def block(lines: Iterable[str]) -> list[str]:
    """Return lines as they would be printed, in a block of code, and an empty line."""
    kept = shown_lines(lines)
    # A fence ends at one of equal length, so it is longer than any in the lines.
    fence = "`" * max([3, *(len(run) + 1 for line in kept for run in re.findall("`+", line))])
    return [fence + "text", *kept, fence, ""] if kept else []
