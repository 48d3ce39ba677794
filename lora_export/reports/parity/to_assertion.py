"""The parity check for a user's own tests: what differs is an `AssertionError` with the whole report."""

from __future__ import annotations

from typing import Any

from lora_export.formats.given import Adapters
from lora_export.parity.check import PathLike, check_parity
from lora_export.parity.result import ParityReport
from lora_export.reports.parity.to_text import lines


def assert_parity(
    reference: PathLike, candidate: PathLike, adapters: Adapters = (), **options: Any
) -> ParityReport:
    """Compare an exported model with what it was exported from, and fail the test where it differs.

    Args:
        reference: As of `check_parity`.
        candidate: As of `check_parity`.
        adapters: As of `check_parity`.
        **options: The keyword arguments of `check_parity`: ``tolerance``, ``generate``, ``feeds``, ….

    Returns:
        The report; it has passed.

    Raises:
        AssertionError: Something differs, or nothing was proven. Its text is what `lora-export parity`
            prints.
        LoraExportError: The two could not be compared, as of `check_parity`.
    """
    __tracebackhide__ = True  # pytest shows the line of the test that called
    report = check_parity(reference, candidate, adapters, **options)
    if not report.passed:
        # pytest's summary shows a message's first line: the sentence.
        raise AssertionError("\n".join(lines(report)))
    return report
