"""Write the result of `lora-export verify` as text."""

from __future__ import annotations

from lora_export.integrity.check import BROKEN, CheckedFile, VerifyReport
from lora_export.untrusted.shown import limited

_WORDS = {
    "sampled": "by a sample",
    "unhashed": "no full hash",
    "outside": "outside",
}


def file_lines(report: VerifyReport, quiet: bool = False) -> list[str]:
    """Return a line for each file, wrong files first.

    Args:
        report: Result of the check.
        quiet: Return only the lines of files that are not right.
    """
    rows = sorted(report.files, key=lambda found: found.state not in BROKEN)
    lines = [_line(found) for found in rows if not quiet or found.state != "ok"]
    return limited(lines, "files")


def last_line(report: VerifyReport) -> str:
    """Return the last line for a set of files that passed."""
    states = [found.state for found in report.files]
    kinds = [f"{states.count('ok')} right by full hash"]
    kinds += [f"{states.count(kind)} {_WORDS[kind]}" for kind in ("sampled", "unhashed") if kind in states]
    if others := states.count("not described"):
        kinds.append(f"{others} that nothing describes")
    return f"{len(states)} files: {', '.join(kinds)}"


def problem_line(found: CheckedFile) -> str:
    """Return the problem of a file, for an error."""
    return "; ".join([f"{found.path}: {_WORDS.get(found.state, found.state)}", *found.details])


def _line(found: CheckedFile) -> str:
    by = [name for name in found.by if name != found.path.name]
    what = _WORDS.get(found.state, found.state)
    details = [*([f"by {', '.join(by)}"] if by else []), *found.details]
    return f"{what:<13} {found.path}" + (f"  ({'; '.join(details)})" if details else "")
