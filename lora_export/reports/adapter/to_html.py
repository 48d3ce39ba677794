"""Write an adapter's report as one HTML page: the table of `inspect` with each module's energy curve."""

from __future__ import annotations

from itertools import accumulate

from lora_export.reports.adapter.facts import AdapterReport, ModuleReport
from lora_export.reports.adapter.to_text import HEADINGS, WORDS, closing_lines, heading_lines, rows
from lora_export.reports.markup import Markup, element, joined
from lora_export.reports.page import lines, page, table
from lora_export.reports.svg import Axis, curve, drawing

_WIDTH, _HEIGHT = 120, 26


def report_html(report: AdapterReport) -> str:
    """Return the page."""
    drawn = [(*cells, _curve(row)) for cells, row in zip(rows(report), report.modules, strict=True)]
    return page(
        report.name,
        element("h1", report.name),
        lines(heading_lines(report)),
        table([(*HEADINGS, "energy of the first k"), *drawn], words=WORDS),
        lines(closing_lines(report)),
    )


def _curve(row: ModuleReport) -> Markup:
    """Return the share of ‖ΔW‖² in the first k directions as a small line drawing."""
    held = [0.0, *accumulate(value * value for value in row.singular_values)]
    if not held[-1]:
        return joined(["no change"])
    x, y = (
        Axis(low=0, high=len(held) - 1, start=0, end=_WIDTH),
        Axis(low=0, high=held[-1], start=_HEIGHT, end=0),
    )
    words = f"{row.module}: 90 % in {row.effective_rank_90} of {len(held) - 1} directions"
    line = curve("error", [(x.at(k), y.at(energy)) for k, energy in enumerate(held)])
    return drawing(_WIDTH, _HEIGHT, words=words, parts=[element("title", words), line], kind="small")
