"""A benchmark as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_export.bench.result import BenchReport, Table
from lora_export.reports.bench.to_text import (
    HEADINGS,
    MODEL_HEADINGS,
    adapter_lines,
    closing_lines,
    model_rows,
    ratio_text,
    rows,
)
from lora_export.untrusted.shown import safe

_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem;
       color: #1d1d1f; background: #fff; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e5e5e7; }
th:first-child, td:first-child, .words3 :is(th, td):nth-child(-n+3) { text-align: left; }
pre { white-space: pre-wrap; }
svg { display: block; max-width: 100%; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.bar { fill: #4c72b0; } .reach, .one { stroke: #888; fill: none; } .one { stroke-dasharray: 4 3; }
.ratio { stroke: #4c72b0; fill: #4c72b0; }
@media (prefers-color-scheme: dark) {
  body { color: #eee; background: #161618; } td, th { border-color: #333; } .bar { fill: #6f95d6; }
  .ratio { stroke: #6f95d6; fill: #6f95d6; }
}
"""
# A chart: names, bars, then the ratios on a scale of their own; in pixels.
_NAMES, _BARS, _GAP, _RATIOS, _LINE = 300, 330, 90, 330, 24
# A disturbed machine has p95 far above the medians, which would be too short to compare: it is cut there.
_CUT = 3.0
_WIDTH = _NAMES + _BARS + _GAP + _RATIOS + 20


def write_html(report: BenchReport, path: Path) -> None:
    """Write the page: charts and table of `lora-export bench`, loading, machine."""
    path.write_text(page(report), encoding="utf-8")


def page(report: BenchReport) -> str:
    """Return the page's text."""
    title = f"lora-export bench: {', '.join(model.label for model in report.models)}"
    charts = "\n".join(
        f"<h2>{safe(table.workload.label)}</h2>\n{_chart(table)}"
        f"<p>{table.rounds} rounds of {table.runs_per_block}, stopped by {_WHY[table.stopped_by]}</p>"
        for table in report.tables
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{safe(title)}</h1>\n"
        f"<p>{safe(report.stopped_by)}</p>\n{charts}\n"
        f"<h2>Times</h2>\n{_table(HEADINGS, rows(report), 'words3')}\n"
        f"<h2>Opening and memory</h2>\n{_table(MODEL_HEADINGS, model_rows(report), 'words1')}\n"
        f"<pre>{chr(10).join(map(safe, adapter_lines(report)))}</pre>\n"
        f"<h2>How it was measured</h2>\n<pre>{chr(10).join(map(safe, closing_lines(report)[1:]))}</pre>\n"
        f"<table><thead><tr><th>file</th><th>sha256</th></tr></thead><tbody>{_hashes(report)}</tbody></table>"
        "\n</body></html>\n"
    )


_WHY = {"narrow": "narrow intervals", "time": "the time budget"}


def _table(headings: Sequence[str], cells: Iterable[Sequence[str]], kind: str) -> str:
    head = "".join(f"<th>{safe(text)}</th>" for text in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _hashes(report: BenchReport) -> str:
    return "".join(
        f"<tr><td>{safe(model.label)}: {safe(name)}</td><td><code>{sha256}</code></td></tr>"
        for model in report.models
        for name, sha256 in model.sha256.items()
    )


def _chart(table: Table) -> str:
    """Return bars of the medians with a line up to p95, and the ratios' intervals beside them."""
    longest = min(
        max(row.latency.p95_ms for row in table.rows), _CUT * max(row.latency.median_ms for row in table.rows)
    )
    ratios = [row.ratio for row in table.rows if row.ratio]
    low = min([0.95, *(ratio.low for ratio in ratios)])
    high = max([1.05, *(ratio.high for ratio in ratios)])
    left = _NAMES + _BARS + _GAP
    height = _LINE * (len(table.rows) + 1)

    def at(ratio: float) -> float:
        return left + _RATIOS * (ratio - low) / (high - low)

    parts = [
        f'<text x="{_NAMES}" y="14">ms: median, line to p95</text>',
        f'<text x="{left}" y="14">ratio to {safe(table.rows[0].contender)}</text>',
        f'<line class="one" x1="{at(1):.1f}" x2="{at(1):.1f}" y1="{_LINE}" y2="{height}"/>',
    ]
    for number, row in enumerate(table.rows, 1):
        top, middle = number * _LINE + 4, number * _LINE + _LINE / 2
        wide = _BARS * row.latency.median_ms / longest
        reach = _NAMES + _BARS * min(row.latency.p95_ms / longest, 1.0)
        parts += [
            f'<text x="{_NAMES - 8}" y="{middle + 4}" text-anchor="end">{safe(row.contender)}</text>',
            f'<rect class="bar" x="{_NAMES}" y="{top}" width="{wide:.1f}" height="{_LINE - 8}">'
            f"<title>{row.latency.median_ms:.3f} ms</title></rect>",
            f'<line class="reach" x1="{_NAMES + wide:.1f}" x2="{reach:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{reach + 6:.1f}" y="{middle + 4}">{row.latency.median_ms:.3g}</text>',
        ]
        if row.ratio:
            parts.append(
                f'<g class="ratio"><title>{ratio_text(row.ratio)}</title>'
                f'<line x1="{at(row.ratio.low):.1f}" x2="{at(row.ratio.high):.1f}" '
                f'y1="{middle}" y2="{middle}" stroke-width="2"/>'
                f'<circle cx="{at(row.ratio.value):.1f}" cy="{middle}" r="3.5"/></g>'
            )
    label = safe(f"{table.workload.label}: medians and ratios, as in the table below")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>\n"
    )
