"""Write a `ParityReport` as text: the checks, the failures with their limits, where the error begins."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from lora_export.parity.result import Localisation, ModuleRow, ParityReport, Verdict
from lora_export.parity.sentence import sentence
from lora_export.plan import align
from lora_export.reports.parity.words import (
    by_state,
    facts,
    generated_rows,
    logit_rows,
    mark,
    number,
    plural,
    relation,
    share_of_limit,
    verdict_line,
)
from lora_export.untrusted.shown import shown, shown_lines

WIDTH = 110
# Number of modules shown on each side of the one where the error begins; a report in a file has all.
_AROUND = 6
# No line is cut in a file.
_LONGEST_LINE = 1 << 30
# On a terminal the reason of a passed check is cut at the line's end, but keeps this many characters; that of
# a failure is never cut.
_WHY = 24


def check_lines(report: ParityReport, cut: bool = False) -> list[str]:
    """Return the lines that a user reads after a check: first a plain sentence, last the number of checks.

    Args:
        report: Result of the check.
        cut: Cut the reasons of passed checks, so that only names that a user chose (modules, outputs, paths)
            make a line longer than ``WIDTH``. Only for a terminal: in a job's log the rest would be lost.
    """
    first = sentence(report)
    text = [*(_wrapped(first) if cut else [first]), "", *head_lines(report)]
    for state, verdicts in by_state(report.verdicts).items():
        text += ["", *_state_lines(state, verdicts, cut)]
    for title, table in (
        ("logits", logit_rows(report.metrics)),
        ("generated tokens", generated_rows(report.generated)),
    ):
        text += _section(title, align(table) if len(table) > 1 else [])
    if report.localisation is not None:
        text += _section("where the error begins", localisation_lines(report.localisation))
    notes = note_lines(report)
    return [*text, *([""] if notes else []), *notes, "", verdict_line(report)]


def report_text(report: ParityReport) -> str:
    """Return the lines for a file."""
    # A line that was wrapped may begin with what stood in the middle of a name.
    return "\n".join(shown_lines(check_lines(report), _LONGEST_LINE)) + "\n"


def head_lines(report: ParityReport) -> list[str]:
    """Return the lines that name reference, candidate, adapters and feeds."""
    rows = facts(report)
    width = max(len(label) for label, _ in rows) + 2
    return [line for label, value in rows for line in _wrapped(label.ljust(width) + value, hang=width)]


def note_lines(report: ParityReport) -> list[str]:
    """Return the notes, wrapped."""
    return [line for note in report.notes for line in _wrapped(f"note: {shown(note)}", hang=6)]


def localisation_lines(found: Localisation) -> list[str]:
    """Return the table of modules; those far from the beginning of the error are only counted."""
    state = shown(found.state)
    text: list[str] = []
    if found.module:
        text.append(f"{shown(found.module)} (run with: {state})")
    elif found.rows:
        text.append(f"no module's error jumps (run with: {state})")
    if rows := _shown_rows(found):
        heading = ("", "module", "error in", "error out", "PyTorch", "effect")
        text += align([heading, *(_module_cells(row, found) for row in rows)])
        text.append("(>>: the error begins here; PyTorch: its own error there in the candidate's dtype)")
    if left := len(found.rows) - len(rows):
        text.append(f"… and {left} more with --report FILE.json")
    if found.of:
        text.append(f"looked at {found.looked_at} of {plural(found.of, 'module')}")
    return text + (_wrapped(shown(found.note), indent=2) if found.note else [])


def _module_cells(row: ModuleRow, found: Localisation) -> tuple[str, ...]:
    sign = ">>" if row.module == found.module else ">" if row.jumped else ""
    numbers = (row.error_in, row.error_out, row.own_out, row.effect)
    return sign, shown(row.module), *map(number, numbers)


def _shown_rows(found: Localisation) -> list[ModuleRow]:
    """Return the rows near the module where the error begins, or the first rows, and others that jumped."""
    begins = next((i for i, row in enumerate(found.rows) if row.module == found.module), _AROUND)
    near = range(begins - _AROUND, begins + _AROUND + 1)
    jumped = [i for i, row in enumerate(found.rows) if row.jumped and i not in near][:_AROUND]
    return [row for i, row in enumerate(found.rows) if i in near or i in jumped]


def _state_lines(state: str, verdicts: Sequence[Verdict], cut: bool) -> list[str]:
    """Return a row for each kind of check that passed, then each failure with its reason."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.passed:
            groups.setdefault((mark(verdict), verdict.name), []).append(verdict)
    text = [shown(state)]
    if groups:
        text += _passed_lines(list(groups.values()), cut)
    for verdict in verdicts:
        if not verdict.passed:
            text += _failed_lines(verdict)
    return text


def _passed_lines(groups: Sequence[Sequence[Verdict]], cut: bool) -> list[str]:
    """Return a row for each group of verdicts of one check: the verdict nearest to its limit."""
    rows, reasons = [], []
    for group in groups:
        worst = max(group, key=share_of_limit)
        where = shown(worst.output)
        if len(group) > 1:
            where = f"{len(group)} outputs, worst {where}" if where else f"{len(group)} times"
        rows.append((mark(worst).ljust(4), shown(worst.name), where, relation(worst)))
        reason = shown(worst.why)
        reasons.append(reason if worst.counted else f"proves nothing: {reason}".rstrip(": "))
    table = align(rows)
    start = max(map(len, table)) + 2
    room = max(WIDTH - 2 - start, _WHY)
    if cut:
        reasons = [reason if len(reason) <= room else f"{reason[: room - 1].rstrip()}…" for reason in reasons]
    return [f"  {line.ljust(start)}{reason}".rstrip() for line, reason in zip(table, reasons, strict=True)]


def _failed_lines(verdict: Verdict) -> list[str]:
    cells = [shown(verdict.name), shown(verdict.output), relation(verdict)]
    cells += [] if verdict.counted else ["(proves nothing)"]
    reason = _wrapped(shown(verdict.why), indent=8) if verdict.why else []
    return [f"  FAIL  {'  '.join(filter(None, cells))}", *reason]


def _section(title: str, body: Sequence[str]) -> Iterator[str]:
    if body:
        yield from ("", title, *(f"  {line}" for line in body))


def _wrapped(text: str, indent: int = 0, hang: int = 0) -> list[str]:
    """Return a text in lines of ``WIDTH`` less a section's indent; words are not broken."""
    return textwrap.wrap(
        text,
        WIDTH - 2,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent or hang),
        break_long_words=False,
        break_on_hyphens=False,
    )
