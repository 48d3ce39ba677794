"""Write a benchmark as Markdown."""

from __future__ import annotations

from lora_export.bench.result import BenchReport
from lora_export.reports.bench.to_text import (
    HEADINGS,
    MODEL_HEADINGS,
    WORDS,
    adapter_lines,
    closing_lines,
    model_rows,
    rows,
)
from lora_export.reports.markdown import block, section, table, text


def report_markdown(report: BenchReport) -> str:
    """Return times, the costs of opening and of adapters, and the machine."""
    opening = [*table([MODEL_HEADINGS, *model_rows(report)], 1), *block(filter(None, adapter_lines(report)))]
    parts = [
        f"# {text('lora-export bench: ' + ', '.join(model.label for model in report.models))}",
        "",
        text(report.stopped_by),
        "",
        *section("Times", table([HEADINGS, *rows(report)], WORDS)),
        *section("Opening and memory", opening),
        *section("How it was measured", block(closing_lines(report)[1:])),
    ]
    return "\n".join(parts)
