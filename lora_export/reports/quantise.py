"""Write the result of quantize-onnx as text."""

from __future__ import annotations

import json

from lora_export.modes.quantising.write import QuantiseReport
from lora_export.reports.merge import size_text
from lora_export.reports.quantised import quantised_lines, weight_lines
from lora_export.untrusted.places import exists


def report_json(report: QuantiseReport) -> str:
    """Return the report as one JSON object."""
    return json.dumps(report.as_dict(), indent=1, sort_keys=True, ensure_ascii=False)


def plan_lines(report: QuantiseReport) -> list[str]:
    """Return the lines that a dry run prints: each weight, and what happens to it."""
    lines = weight_lines(report.quantised)
    sizes = f"{size_text(report.before_bytes)} would become {size_text(report.size_bytes)}"
    lines.append(f"dry run: {sizes} of weights")
    if existing := [str(path) for path in report.outputs.values() if exists(path)]:
        lines.append(f"note: --force would be needed, there is already: {', '.join(existing)}")
    return lines


def summary_lines(report: QuantiseReport, seconds: float) -> list[str]:
    """Return the lines that a user reads after quantising."""
    sizes = f"{size_text(report.before_bytes)} of weights became {size_text(report.size_bytes)}"
    lines = quantised_lines(report.quantised)
    return [
        f"{sizes} in {seconds:.1f} s",
        *lines,
        *(f"wrote {path}" for path in report.outputs.values()),
    ]
