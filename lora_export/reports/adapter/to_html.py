"""An adapter's report as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from pathlib import Path

from lora_export.reports.adapter.facts import AdapterReport, ModuleReport
from lora_export.reports.adapter.to_text import HEADINGS, closing_lines, heading_lines, rows
from lora_export.untrusted.shown import safe

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
       color: #1d1d1f; background: #fff; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e5e5e7; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th { position: sticky; top: 0; background: inherit; }
svg { vertical-align: middle; }
@media (prefers-color-scheme: dark) {
  body { color: #eee; background: #161618; } td, th { border-color: #333; }
}
"""
_WIDTH, _HEIGHT = 120, 26


def write_html(report: AdapterReport, path: Path, file_format: str) -> None:
    """Write the page: the table of `lora-export inspect` with each module's energy curve.

    Args:
        report: What to show.
        path: File to write.
        file_format: ``html``.
    """
    assert file_format == "html"
    head = "".join(f"<th>{safe(text)}</th>" for text in (*HEADINGS, "energy of the first k"))
    body = "".join(
        "<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in cells) + f"<td>{_curve(row)}</td></tr>\n"
        for cells, row in zip(rows(report), report.modules, strict=True)
    )
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{safe(report.name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{safe(report.name)}</h1>\n"
        f"<pre>{chr(10).join(map(safe, heading_lines(report)))}</pre>\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"
        f"<pre>{chr(10).join(map(safe, closing_lines(report)))}</pre>\n</body></html>\n",
        encoding="utf-8",
    )


def _curve(row: ModuleReport) -> str:
    """Return the share of ‖ΔW‖² in the first k directions as a small line drawing."""
    energies = [value * value for value in row.singular_values]
    total = sum(energies)
    if not total:
        return "no change"
    points, held = [f"0,{_HEIGHT}"], 0.0
    for k, energy in enumerate(energies, start=1):
        held += energy
        points.append(f"{_WIDTH * k / len(energies):.1f},{_HEIGHT * (1 - held / total):.1f}")
    label = f"{row.module}: 90 % in {row.effective_rank_90} of {len(energies)} directions"
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{safe(label)}">'
        f"<title>{safe(label)}</title>"
        f'<polyline points="{" ".join(points)}" fill="none" stroke="#4c72b0" stroke-width="1.5"/></svg>'
    )
