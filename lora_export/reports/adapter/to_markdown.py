"""Write an adapter's report as Markdown."""

from __future__ import annotations

from lora_export.reports.adapter.facts import AdapterReport
from lora_export.reports.adapter.to_text import HEADINGS, WORDS, closing_lines, heading_lines, rows
from lora_export.reports.markdown import block, section, table, text


def report_markdown(report: AdapterReport) -> str:
    """Return the adapter's facts and the table of `lora-export inspect`."""
    parts = [
        f"# {text(report.name)}",
        "",
        *block(heading_lines(report)),
        *section("Modules", table([HEADINGS, *rows(report)], WORDS)),
        *block(closing_lines(report)),
    ]
    return "\n".join(parts)
