"""Check parity in a user's own tests: a difference raises an `AssertionError` with the whole report."""

from __future__ import annotations

from typing import Any

from lora_export.formats.given import Adapters
from lora_export.parity.check import PathLike, check_parity
from lora_export.parity.result import ParityReport
from lora_export.reports.parity.to_text import check_lines


def assert_parity(
    reference: PathLike, candidate: PathLike, adapters: Adapters = (), **options: Any
) -> ParityReport:
    """Compare an exported model with the model that it was exported from, and fail the test if it differs.

    Args:
        reference: Reference, as for `check_parity`.
        candidate: Candidate, as for `check_parity`.
        adapters: Adapters, as for `check_parity`.
        **options: The keyword arguments of `check_parity`: ``tolerance``, ``generate``, ``feeds``, ….

    Returns:
        The report; it has passed.

    Raises:
        AssertionError: Something differs, or nothing was proven. Its text is that which `lora-export parity`
            prints.
        LoraExportError: The two could not be compared, as for `check_parity`.
    """
    __tracebackhide__ = True  # pytest shows the calling line of the test
    report = check_parity(reference, candidate, adapters, **options)
    if not report.passed:
        # The sentence comes first, because pytest's summary shows a message's first line.
        raise AssertionError("\n".join(check_lines(report)))
    return report
