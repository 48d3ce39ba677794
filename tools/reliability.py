"""Run the tests behind what SECURITY.md and docs/guides/errors.md promise of files, and print a table.

Run: python tools/reliability.py [--only WORD]
A row is one pytest command. What it tried is what its tests recorded (``tried``: faults, kills, mutated
files, answers, flipped bits), else their number. Exits with 1 where a row failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
# Promise, pytest's arguments, what is counted.
ROWS = [
    (
        "an error or a signal at any call that writes leaves the old output or the new one",
        "tests/storage/test_interrupted_output.py",
        "faults at single calls",
    ),
    (
        "a killed process leaves the old output or the new one, and the next run says so",
        "tests/storage/test_forked_runs.py -k killed",
        "kills",
    ),
    ("two writers of one output do not mix", "tests/storage/test_forked_runs.py -k writers", "races"),
    (
        "locks, leftovers and signals are told from others'",
        "tests/storage/test_commit.py",
        "cases",
    ),
    (
        "weights of another model beside a graph are refused",
        "tests/base/test_data_identity.py",
        "cases",
    ),
    (
        "one flipped bit in a set that we wrote is found",
        "tests/integrity/test_verify.py",
        "flipped bits and further cases",
    ),
    (
        "every answer of sixteen threads is its own adapter's",
        "tests/runtimes/test_session_threads.py -k soak",
        "calls",
    ),
    (
        "a checkpoint's own Python never runs",
        "tests/untrusted/test_own_code.py",
        "cases",
    ),
    (
        "no command of a name runs in a kit's script",
        "tests/packages/test_build_kit_names.py",
        "cases",
    ),
    (
        "malformed files are the user's error: no traceback, no hang",
        "tests/untrusted/test_mutations.py tests/untrusted/test_mutations_parity.py",
        "mutated files",
    ),
    (
        "what a file claims is compared with what it holds before memory is taken",
        "tests/untrusted/test_untrusted_sizes.py tests/untrusted/test_untrusted_computed.py",
        "cases",
    ),
    (
        "documents and records are checked field by field",
        "tests/untrusted/test_untrusted_documents.py tests/untrusted/test_untrusted_fields.py "
        "tests/base/test_damaged_manifests.py",
        "cases",
    ),
    (
        "a stranger's pattern can't keep a verb busy",
        "tests/formats/test_patterns.py",
        "cases",
    ),
    (
        "a stranger's text is nothing but text",
        "tests/untrusted/test_untrusted_shown.py tests/untrusted/test_untrusted_logs.py",
        "cases",
    ),
    (
        "no path in a file leads out of its folder",
        "tests/untrusted/test_paths_inside.py",
        "cases",
    ),
    ("no verb asks the network for anything", "tests/untrusted/test_no_network.py", "cases"),
    ("same inputs, same bytes", "tests/modes/test_determinism.py", "cases"),
]


def measure(arguments: str) -> tuple[int, int, float]:
    """Run a row's tests; return what was tried, how many tests failed, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report, begin = Path(folder) / "report.xml", time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", *arguments.split(), f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
        wrong = sum(1 for case in cases if case.find("failure") is not None or case.find("error") is not None)
        return sum(map(tried, cases)), wrong, time.monotonic() - begin


def tried(case: ElementTree.Element) -> int:
    """Return what one test tried: 0 where it was skipped."""
    if case.find("skipped") is not None:
        return 0
    recorded = [int(one.get("value", "0")) for one in case.iter("property") if one.get("name") == "tried"]
    return sum(recorded) if recorded else 1


def main() -> None:
    """Run all rows, or those whose promise or command holds a word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the promise or the command")
    given = parser.parse_args()
    failed = 0
    print("| promise | `pytest` … | tried | failed | s |", "|---|---|---|---|---|", sep="\n")
    for promise, arguments, unit in ROWS:
        if given.only in promise or given.only in arguments:
            count, wrong, seconds = measure(arguments)
            failed += wrong
            print(f"| {promise} | `{arguments}` | {count:,} {unit} | {wrong} | {seconds:.0f} |", flush=True)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
