"""Run the tests behind what SECURITY.md and docs/guides/errors.md promise of files, and print a table.

Run: python tools/reliability.py [--only WORD]        runs each row's command
     python tools/reliability.py --junit report.xml   reads the rows from a run of all tests
A row is one pytest command. What it tried is what its tests recorded (``tried``: faults, kills, mutated
files, answers, flipped bits), else their number. Exits with 1 where a row failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
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
        "tests/storage/test_commit_errors.py tests/storage/test_commit_signals.py "
        "tests/storage/test_commit_locks.py tests/storage/test_leftovers.py tests/storage/test_leases.py "
        "tests/commands/test_signals.py",
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
        "a pickle makes only what trainers write, and members of archives are what they state",
        "tests/untrusted/test_untrusted_objects.py tests/untrusted/test_untrusted_members.py",
        "cases",
    ),
    (
        "names, shapes and values of an .onnx_adapter share no bytes",
        "tests/untrusted/test_untrusted_tables.py",
        "cases",
    ),
    (
        "numbers of a config are counted before modules are made of them",
        "tests/base/test_module_counts.py tests/base/test_weight_sets.py",
        "cases",
    ),
    (
        "a place that can't be read is not taken for an empty one",
        "tests/untrusted/test_unreadable_places.py",
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
    (
        "what a result is made from stays as it is, or there is no result",
        "tests/storage/test_same_inputs.py tests/storage/test_inputs_kept.py",
        "cases",
    ),
    (
        "a graph that two readers understand differently is refused",
        "tests/untrusted/test_untrusted_protos.py tests/graph/test_scale_shapes.py",
        "cases",
    ),
    ("no verb asks the network for anything", "tests/untrusted/test_no_network.py", "cases"),
    ("same inputs, same bytes", "tests/modes/test_determinism.py", "cases"),
]


def measure(arguments: str) -> Iterable[ElementTree.Element]:
    """Run a row's tests and return their results."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *arguments.split(), f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
        return list(ElementTree.parse(report).iter("testcase"))


def chosen(arguments: str, cases: Iterable[ElementTree.Element]) -> Iterable[ElementTree.Element]:
    """Return the results of a row's tests from those of all: ``-k`` stands for a part of the name here."""
    files, _, word = arguments.partition(" -k ")
    modules = {file.removesuffix(".py").replace("/", ".") for file in files.split()}
    return [case for case in cases if case.get("classname") in modules and word in case.get("name", "")]


def is_wrong(case: ElementTree.Element) -> bool:
    """Return True if a test failed."""
    return case.find("failure") is not None or case.find("error") is not None


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
    parser.add_argument("--junit", type=Path, action="append", help="a report of pytest --junitxml; repeat")
    given = parser.parse_args()
    all_cases = [case for file in given.junit or () for case in ElementTree.parse(file).iter("testcase")]
    failed = 0
    print("| promise | `pytest` … | tried | failed | s |", "|---|---|---|---|---|", sep="\n")
    for promise, arguments, unit in ROWS:
        if given.only not in promise and given.only not in arguments:
            continue
        cases = list(measure(arguments) if given.junit is None else chosen(arguments, all_cases))
        wrong, seconds = sum(map(is_wrong, cases)), sum(float(case.get("time", "0")) for case in cases)
        if not cases:
            sys.exit(f"no test ran for {promise!r}: pytest {arguments}")
        failed += wrong
        count = sum(map(tried, cases))
        print(f"| {promise} | `{arguments}` | {count:,} {unit} | {wrong} | {seconds:.0f} |", flush=True)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
