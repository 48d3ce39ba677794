"""Draw a benchmark as a PNG or SVG picture, with matplotlib."""

from __future__ import annotations

import textwrap
from typing import Any

from lora_export.bench.result import BenchReport, WorkloadTable
from lora_export.reports.picture import COLOUR, REFERENCE, picture
from lora_export.untrusted.shown import shown

# On a disturbed machine p95 is far above the medians, whose bars would be too short to compare.
_CUT = 3.0
# Number of characters of a name beside a bar, and of a line above all plots.
_LABEL, _LINE = 80, 160


def report_png(report: BenchReport) -> bytes:
    """Return a PNG of times (median, middle half, p95) and ratios with intervals, a row for each workload."""
    return _picture(report, "png")


def report_svg(report: BenchReport) -> bytes:
    """Return the picture of `report_png` as SVG."""
    return _picture(report, "svg")


def _picture(report: BenchReport, file_format: str) -> bytes:
    def draw(figure: Any, axes: Any) -> None:
        for table, (times, ratios) in zip(report.tables, axes, strict=True):
            _draw_times(times, table)
            _draw_ratios(ratios, table)
        # Not wrapped by matplotlib: for that, it reads dollars as formulas wherever that is switched off.
        title = textwrap.fill(shown(f"{report.environment.cpu}; {report.timed}"), _LINE)
        figure.suptitle(title, fontsize=9)

    height = sum(0.35 * len(table.rows) + 0.9 for table in report.tables) + 0.6
    return picture(file_format, len(report.tables), height, draw)


def _draw_times(axes: Any, table: WorkloadTable) -> None:
    places = range(len(table.rows))
    found = [row.latency for row in table.rows]
    medians = [latency.median_ms for latency in found]
    reach = [[0.0] * len(found), [max(latency.p95_ms - latency.median_ms, 0.0) for latency in found]]
    axes.barh(places, medians, xerr=reach, color=COLOUR, ecolor=REFERENCE, capsize=3)
    axes.set_yticks(places, [shown(row.contender, _LABEL) for row in table.rows], fontsize=8)
    axes.set_ylim(len(table.rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.05 * min(max(latency.p95_ms for latency in found), _CUT * max(medians)))
    axes.set_title(f"{shown(table.workload.label, _LABEL)}: ms, median and p95", fontsize=9)


def _draw_ratios(axes: Any, table: WorkloadTable) -> None:
    axes.axvline(1, color=REFERENCE, linewidth=0.8, linestyle="--")
    for place, row in enumerate(table.rows[1:], 1):
        if row.ratio:
            low, high = row.ratio.value - row.ratio.low, row.ratio.high - row.ratio.value
            axes.errorbar(
                row.ratio.value,
                place,
                xerr=[[low], [high]],
                color=COLOUR,
                marker="o",
                markersize=4,
                capsize=3,
            )
    axes.set_yticks([])
    axes.set_ylim(len(table.rows) - 0.4, -0.6)
    first = shown(table.rows[0].contender, _LABEL)
    axes.set_title(f"time compared with {first}, 95 % interval", fontsize=9)
