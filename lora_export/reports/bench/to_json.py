"""Write a benchmark as JSON: all measurements, with units in the keys' names."""

from __future__ import annotations

import json

from lora_export.bench.result import BenchReport


def report_json(report: BenchReport) -> str:
    """Return the report as indented JSON.

    Its keys are those of `lora_export.bench.result.BenchReport` and the classes within it, and ``kind``,
    ``format``, ``confidence`` and ``stopped_by``.
    """
    return json.dumps(report.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
