"""Write a `ParityReport` as Markdown: verdict, failures, where the error begins, then passed checks."""

from __future__ import annotations

from collections.abc import Iterable

from lora_export.parity.result import ParityReport, Verdict
from lora_export.parity.sentence import sentence
from lora_export.reports.markdown import block, section, table, text
from lora_export.reports.parity.to_text import localisation_lines
from lora_export.reports.parity.words import facts, generated_rows, logit_rows, mark, relation, verdict_line

_HEADINGS = ("", "check", "state", "output", "value and limit", "why")


def report_markdown(report: ParityReport) -> str:
    """Return the summary of a check."""
    big, _, rest = sentence(report).partition(": ")
    _, _, count = verdict_line(report).partition(": ")
    found = report.localisation
    passed = [verdict for verdict in report.verdicts if verdict.passed]
    parts = [
        f"# {big}",
        "",
        text(rest),
        "",
        text(count),
        "",
        *table([("", ""), *facts(report)], 2),
        *(f"- {text(note)}" for note in report.notes),
        *([""] if report.notes else []),
        *section("What failed", _verdicts(report.failed)),
        *section("Where the error begins", block(localisation_lines(found)) if found is not None else []),
        *section("What passed", _verdicts(passed)),
        *section("Logits", table(logit_rows(report.metrics), 2)),
        *section("Generated tokens", table(generated_rows(report.generated), 4)),
    ]
    return "\n".join(parts)


def _verdicts(verdicts: Iterable[Verdict]) -> list[str]:
    rows = [(mark(v), v.name, v.state, v.output, relation(v), v.why) for v in verdicts]
    return table([_HEADINGS, *rows], len(_HEADINGS))
