"""Collect the reports that options request, check their paths and write them as files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_export.reports import REPORTS
from lora_export.storage.outputs import OutputSet, output_errors


@dataclass(frozen=True)
class ReportFile:
    """Report that an option requests.

    Attributes:
        option: Option that the user typed: ``--report``, ``--html``.
        path: File to write.
        ending: Key of `REPORTS`; "" if the file's name has no such ending.
    """

    option: str
    path: Path
    ending: str

    def __str__(self) -> str:
        return f"{self.option} {self.path}"


def endings(kind: str) -> str:
    """Return the endings of a kind of result as a user reads them: ``.json, .html, .xml``."""
    return ", ".join(f".{ending}" for ending in REPORTS[kind])


def asked_for(kind: str, reports: Sequence[Path], **named: tuple[Path | None, str]) -> list[ReportFile]:
    """Return the reports that options request.

    Args:
        kind: Kind of the result, a key of `REPORTS`.
        reports: Paths of ``--report``; the ending decides the form of each.
        named: Option without its dashes → its path, None if it was not given, and its ending.
    """
    known = REPORTS[kind]
    found = [ReportFile("--report", path, path.suffix[1:].lower()) for path in reports]
    found = [file if file.ending in known else ReportFile(file.option, file.path, "") for file in found]
    return found + [
        ReportFile(f"--{option}", path, ending)
        for option, (path, ending) in named.items()
        if path is not None
    ]


def ending_problem(kind: str, file: ReportFile) -> str:
    """Return the problem of a report's ending; "" if it has none."""
    if file.ending:
        return ""
    seen = f"ends in {file.path.suffix}" if file.path.suffix else "has no ending"
    return f"{file} {seen}, which is not a report: wanted {endings(kind)}"


def content(kind: str, report: Any, ending: str) -> bytes:
    """Return the content of a report's file.

    Raises:
        BackendUnavailable: The report is a picture, and matplotlib is not installed.
    """
    module, _, attribute = REPORTS[kind][ending].partition(":")
    # Names that are not UTF-8 hold lone surrogates, which a file can't hold: they become escapes.
    made: str | bytes = getattr(import_module(module), attribute)(report)
    return made.encode("utf-8", "backslashreplace") if isinstance(made, str) else made


def write_reports(
    kind: str, report: Any, files: Sequence[ReportFile], force: bool = False, reads: Iterable[Path] = ()
) -> list[Path]:
    """Write the requested reports; all of them appear, or none.

    Args:
        kind: Kind of the result, a key of `REPORTS`.
        report: The result.
        files: Reports to write.
        force: Replace files that exist.
        reads: Files that were read and must not be replaced.

    Raises:
        BackendUnavailable: The report is a picture, and matplotlib is not installed.
        OutputError: A file exists already or can't be written.
    """
    with OutputSet(force, reads) as group:
        for file in files:
            staged = group.stage(file.path)
            with output_errors(file.path):
                staged.write_bytes(content(kind, report, file.ending))
        group.commit()
    return [file.path for file in files]
