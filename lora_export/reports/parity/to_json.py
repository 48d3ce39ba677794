"""Write a `ParityReport` as JSON, and read it again. `parity.schema.json` describes the JSON."""

from __future__ import annotations

import json
from pathlib import Path

from lora_export.parity.result import ParityReport
from lora_export.untrusted.documents import read_json

_HINT = "write a report: the same check without --baseline, with --report FILE.json"


def report_json(report: ParityReport) -> str:
    """Return the report as one strict JSON object; the same report gives the same text."""
    text = json.dumps(report.as_dict(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # Paths that are not UTF-8 hold lone surrogates, which a file can't hold: they become JSON's own escapes.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_report(path: str | Path) -> ParityReport:
    """Read a report that `report_json` wrote.

    Raises:
        LoraExportError: The file can't be read, is not JSON, or is not a whole report of this format.
    """
    # The file may hold the texts nan, inf and -inf, and paths that are not UTF-8.
    data = read_json(Path(path), hint=_HINT, finite=True, surrogates=True)
    return ParityReport.from_json(data, str(path))
