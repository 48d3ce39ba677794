"""An adapter's spectra as a PNG or SVG picture, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import BackendUnavailable
from lora_export.reports.adapter.facts import AdapterReport
from lora_export.reports.adapter.to_text import label
from lora_export.untrusted.shown import shown

# Characters of a name beside a bar.
_LABEL = 80
_SHOWN = 60


def write_figure(report: AdapterReport, path: Path, file_format: str) -> None:
    """Draw, for every module, the energy that the first k directions hold, and the largest ‖ΔW‖.

    Args:
        report: What to draw.
        path: File to write.
        file_format: ``png`` or ``svg``.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        # Fixed ids and no date: the same adapter gives the same bytes.
        matplotlib.rcParams["svg.hashsalt"] = "lora-export"
        # A name with a dollar is no formula.
        matplotlib.rcParams["text.parse_math"] = False
        from matplotlib import pyplot
    except ImportError as error:
        raise BackendUnavailable(
            f"a {file_format} plot needs matplotlib, which is not installed",
            "pip install 'lora-export[plot]', or --plot to an .html file",
        ) from error
    largest = sorted(report.modules, key=lambda row: -row.norm)[:_SHOWN]
    height = max(4.0, 0.18 * len(largest) + 1.5)
    figure, (energy, norms) = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    _draw_energy(energy, report)
    norms.barh(range(len(largest)), [row.norm for row in largest], color="#4c72b0")
    norms.set_yticks(range(len(largest)), [shown(label(row), _LABEL) for row in largest], fontsize=7)
    norms.set_ylim(len(largest) - 0.4, -0.6)
    norms.set(xlabel="‖ΔW‖ (Frobenius)", title=f"the {len(largest)} largest changes")
    figure.suptitle(
        f"{shown(report.name, _LABEL)}: {shown(report.tuner, _LABEL)}, {len(report.modules)} modules"
    )
    metadata = {"Date": None} if file_format == "svg" else {"Software": None}
    figure.savefig(path, format=file_format, dpi=130, metadata=metadata)
    pyplot.close(figure)


def _draw_energy(axes: Any, report: AdapterReport) -> None:
    for row in report.modules:
        energy = np.cumsum(np.square(row.singular_values))
        if energy.size and energy[-1] > 0:
            share = np.concatenate([[0.0], energy / energy[-1]])
            axes.plot(range(share.size), 100 * share, color="#4c72b0", alpha=0.35, linewidth=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(90, color="#999999", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="k, directions of ΔW",
        ylabel="share of ‖ΔW‖² that the first k hold (%)",
        title="one line for each module",
        ylim=(0, 102),
        xlim=(0, None),
    )
