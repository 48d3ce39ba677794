"""Draw an adapter's spectra as a PNG or SVG picture, with matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_export.reports.adapter.facts import AdapterReport
from lora_export.reports.adapter.to_text import module_label
from lora_export.reports.picture import COLOUR, REFERENCE, picture
from lora_export.untrusted.shown import shown

# Number of characters of a name beside a bar.
_LABEL = 80
_SHOWN = 60


def report_png(report: AdapterReport) -> bytes:
    """Return a PNG of the energy in the first k directions of every module, and of the largest ‖ΔW‖."""
    return _picture(report, "png")


def report_svg(report: AdapterReport) -> bytes:
    """Return the picture of `report_png` as SVG."""
    return _picture(report, "svg")


def _picture(report: AdapterReport, file_format: str) -> bytes:
    largest = sorted(report.modules, key=lambda row: -row.norm)[:_SHOWN]

    def draw(figure: Any, axes: Any) -> None:
        energy, norms = axes[0]
        _draw_energy(energy, report)
        norms.barh(range(len(largest)), [row.norm for row in largest], color=COLOUR)
        norms.set_yticks(
            range(len(largest)), [shown(module_label(row), _LABEL) for row in largest], fontsize=7
        )
        norms.set_ylim(len(largest) - 0.4, -0.6)
        norms.set(xlabel="‖ΔW‖ (Frobenius)", title=f"the {len(largest)} largest changes")
        figure.suptitle(
            f"{shown(report.name, _LABEL)}: {shown(report.tuner, _LABEL)}, {len(report.modules)} modules"
        )

    return picture(file_format, 1, max(4.0, 0.18 * len(largest) + 1.5), draw)


def _draw_energy(axes: Any, report: AdapterReport) -> None:
    for row in report.modules:
        energy = np.cumsum(np.square(row.singular_values))
        if energy.size and energy[-1] > 0:
            share = np.concatenate([[0.0], energy / energy[-1]])
            axes.plot(range(share.size), 100 * share, color=COLOUR, alpha=0.35, linewidth=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(90, color=REFERENCE, linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="k, directions of ΔW",
        ylabel="share of ‖ΔW‖² that the first k hold (%)",
        title="one line for each module",
        ylim=(0, 102),
        xlim=(0, None),
    )
