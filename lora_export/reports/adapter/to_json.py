"""Write an adapter's report as JSON, singular values included."""

from __future__ import annotations

import json

from lora_export.reports.adapter.facts import AdapterReport


def report_json(report: AdapterReport) -> str:
    """Return the report as indented JSON; its keys are those of `AdapterReport` and the classes within it."""
    return json.dumps(report.to_json(), indent=2) + "\n"
