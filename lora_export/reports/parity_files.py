"""The reports of a parity check as files: JSON, JUnit, HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_export.errors import OutputError
from lora_export.output import OutputSet
from lora_export.parity.result import ParityReport
from lora_export.reports.parity_html import report_html
from lora_export.reports.parity_json import report_json
from lora_export.reports.parity_junit import junit_xml

_WRITERS: Mapping[str, Callable[[ParityReport], str]] = {
    "json": report_json,
    "junit": junit_xml,
    "html": report_html,
}
Outputs = Mapping[str, Path | None]


def check_outputs(outputs: Outputs, force: bool, baseline: Path | None = None) -> None:
    """Refuse what could not be written, before anything is run.

    Raises:
        OutputError: Two reports have one path, one would replace the baseline, or exists without ``force``.
    """
    problems: list[str] = []
    seen: dict[Path, str] = {}
    for kind, path in outputs.items():
        if path is None:
            continue
        known = path.resolve()
        if known in seen:
            problems.append(f"--{seen[known]} and --{kind} are both {path}")
        seen[known] = kind
        if baseline is not None and known == baseline.resolve():
            problems.append(f"--{kind} {path} is the baseline itself")
        if path.is_dir():
            problems.append(f"{path} is a folder")
        elif any(parent.is_file() for parent in path.parents):
            problems.append(f"{path} lies below a file, not in a folder")
        elif path.exists() and not force:
            problems.append(f"{path} exists; --force replaces it")
    if problems:
        raise OutputError("the reports can't be written", "give each a path of its own", problems)


def write_reports(report: ParityReport, outputs: Outputs) -> list[Path]:
    """Write the reports that were asked for; all of them appear, or none.

    Raises:
        OutputError: A folder can't be written.
    """
    written = [(kind, path) for kind, path in outputs.items() if path is not None]
    with OutputSet(force=True) as group:  # `check_outputs` has looked what may be replaced
        for kind, path in written:
            group.stage(path).write_text(_WRITERS[kind](report), encoding="utf-8")
        group.commit()
    return [path for _, path in written]
