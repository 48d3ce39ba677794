"""Write a benchmark as one HTML page: charts, tables, the machine."""

from __future__ import annotations

from lora_export.bench.result import BenchReport, WorkloadTable
from lora_export.reports.bench.to_text import (
    HEADINGS,
    MODEL_HEADINGS,
    WORDS,
    adapter_lines,
    closing_lines,
    model_rows,
    ratio_text,
    rows,
)
from lora_export.reports.markup import Markup, element
from lora_export.reports.page import lines, page, section, table
from lora_export.reports.svg import Axis, bar, dot, drawing, label, segment

# Columns of a chart, in pixels: names, bars, then the ratios on a scale of their own.
_NAMES, _BARS, _GAP, _RATIOS, _LINE = 300, 330, 90, 330, 24
# On a disturbed machine p95 is far above the medians, whose bars would be too short to compare: it is cut.
_CUT = 3.0
_WIDTH = _NAMES + _BARS + _GAP + _RATIOS + 20
_WHY = {"narrow": "narrow intervals", "time": "the time budget"}


def report_html(report: BenchReport) -> str:
    """Return the page with charts and tables of `lora-export bench`, loading and the machine."""
    title = f"lora-export bench: {', '.join(model.label for model in report.models)}"
    hashes = [
        (f"{model.label}: {name}", sha256) for model in report.models for name, sha256 in model.sha256.items()
    ]
    return page(
        title,
        element("h1", title),
        element("p", report.stopped_by),
        *(
            section(
                part.workload.label,
                _chart(part),
                element(
                    "p", f"{part.rounds} rounds of {part.runs_per_block}, stopped by {_WHY[part.stopped_by]}"
                ),
            )
            for part in report.tables
        ),
        section("Times", table([HEADINGS, *rows(report)], words=WORDS)),
        section(
            "Opening and memory",
            table([MODEL_HEADINGS, *model_rows(report)], words=1),
            lines(adapter_lines(report)),
        ),
        section(
            "How it was measured",
            lines(closing_lines(report)[1:]),
            table([("file", "sha256"), *hashes], words=2),
        ),
    )


def _chart(table: WorkloadTable) -> Markup:
    """Return bars of the medians with a line up to p95, and the ratios' intervals beside them."""
    medians = [row.latency.median_ms for row in table.rows]
    longest = min(max(row.latency.p95_ms for row in table.rows), _CUT * max(medians))
    ratios = [row.ratio for row in table.rows if row.ratio]
    left, height = _NAMES + _BARS + _GAP, _LINE * (len(table.rows) + 1)
    times = Axis(low=0.0, high=longest, start=_NAMES, end=_NAMES + _BARS)
    compared = Axis(
        low=min([0.95, *(ratio.low for ratio in ratios)]),
        high=max([1.05, *(ratio.high for ratio in ratios)]),
        start=left,
        end=left + _RATIOS,
    )
    one = compared.at(1)
    parts = [
        label(_NAMES, 14, "ms: median, line to p95"),
        label(left, 14, f"ratio to {table.rows[0].contender}"),
        segment("one", (one, _LINE), (one, height)),
    ]
    for place, row in enumerate(table.rows, 1):
        middle = place * _LINE + _LINE / 2
        time = f"{row.latency.median_ms:.3f} ms"
        median, reach = times.at(row.latency.median_ms), times.at(row.latency.p95_ms)
        parts += [
            label(_NAMES - 8, middle + 4, row.contender, "end"),
            bar("bar", _NAMES, place * _LINE + 4, width=median - _NAMES, height=_LINE - 8, title=time),
            segment("reach", (median, middle), (reach, middle)),
            label(reach + 6, middle + 4, f"{row.latency.median_ms:.3g}"),
        ]
        if row.ratio:
            parts += [
                segment("ratio", (compared.at(row.ratio.low), middle), (compared.at(row.ratio.high), middle)),
                dot(compared.at(row.ratio.value), middle, "ratio", title=ratio_text(row.ratio), radius=3.5),
            ]
    words = f"{table.workload.label}: medians and ratios, as in the table below"
    return drawing(_WIDTH, height, words, parts)
