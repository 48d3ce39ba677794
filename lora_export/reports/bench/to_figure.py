"""A benchmark as a PNG or SVG picture, with matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_export.bench.result import BenchReport, Table
from lora_export.errors import BackendUnavailable

FORMATS = ("png", "svg")
# A disturbed machine has p95 far above the medians, which would be too short to compare.
_CUT = 3.0
_COLOUR, _REFERENCE = "#4c72b0", "#777777"


def check_matplotlib() -> None:
    """Raise `BackendUnavailable` if pictures can't be drawn here."""
    if find_spec("matplotlib") is None:
        raise BackendUnavailable(
            "a plot needs matplotlib, which is not installed",
            "pip install 'lora-export[plot]', or write --html, which needs nothing",
        )


def write_figure(report: BenchReport, path: Path, file_format: str) -> None:
    """Draw a row for each workload: times (median, middle half, p95) and ratios with their intervals.

    Args:
        report: What to draw.
        path: File to write.
        file_format: One of `FORMATS`.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("agg")
    # Fixed ids and no date: the same report gives the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "lora-export"
    from matplotlib import pyplot

    count = len(report.tables)
    height = sum(0.35 * len(table.rows) + 0.9 for table in report.tables) + 0.6
    figure, axes = pyplot.subplots(count, 2, figsize=(12, height), squeeze=False, layout="constrained")
    for table, (times, ratios) in zip(report.tables, axes, strict=True):
        _draw_times(times, table)
        _draw_ratios(ratios, table)
    figure.suptitle(f"{report.environment.cpu}; {report.timed}", fontsize=9, wrap=True)
    metadata = {"Date": None} if file_format == "svg" else {"Software": None}
    figure.savefig(path, format=file_format, dpi=130, metadata=metadata)
    pyplot.close(figure)


def _draw_times(axes: Any, table: Table) -> None:
    places = range(len(table.rows))
    found = [row.latency for row in table.rows]
    medians = [latency.median_ms for latency in found]
    reach = [[0.0] * len(found), [max(latency.p95_ms - latency.median_ms, 0.0) for latency in found]]
    axes.barh(places, medians, xerr=reach, color=_COLOUR, ecolor=_REFERENCE, capsize=3)
    axes.set_yticks(places, [row.contender for row in table.rows], fontsize=8)
    axes.set_ylim(len(table.rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.05 * min(max(latency.p95_ms for latency in found), _CUT * max(medians)))
    axes.set_title(f"{table.workload.label}: ms, median and p95", fontsize=9)


def _draw_ratios(axes: Any, table: Table) -> None:
    axes.axvline(1, color=_REFERENCE, linewidth=0.8, linestyle="--")
    for place, row in enumerate(table.rows[1:], 1):
        if row.ratio:
            low, high = row.ratio.value - row.ratio.low, row.ratio.high - row.ratio.value
            axes.errorbar(
                row.ratio.value,
                place,
                xerr=[[low], [high]],
                color=_COLOUR,
                marker="o",
                markersize=4,
                capsize=3,
            )
    axes.set_yticks([])
    axes.set_ylim(len(table.rows) - 0.4, -0.6)
    axes.set_title(f"time compared with {table.rows[0].contender}, 95 % interval", fontsize=9)
