"""Write a `ParityReport` as JUnit XML: one suite for each state, one case for each verdict.

GitHub's test reporters and GitLab read it. Neither knows "proves nothing", so such a verdict is skipped,
and a check that proved nothing at all gets a case of its own that fails, so that no empty report is green.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lora_export.parity.result import ParityReport, Verdict
from lora_export.parity.sentence import failure_sentence, sentence
from lora_export.plan import align
from lora_export.reports.parity.to_text import localisation_lines, note_lines
from lora_export.reports.parity.words import by_state, facts, metric_rows, relation
from lora_export.untrusted.shown import shown


def junit_xml(report: ParityReport) -> str:
    r"""Return the XML document; the same report gives the same text.

    Characters of names that XML 1.0 can't hold are written out (``\x00``). No case has a time of its own,
    because verdicts share their runs; the root has the time of the whole check.
    """
    verdicts = list(report.verdicts)
    if not report.passed and not report.failed:
        verdicts.append(_nothing_proven(report))
    root = Element("testsuites", name="lora-export parity")
    used: dict[tuple[str, str], int] = {}
    for state, group in by_state(verdicts).items():
        root.append(_suite(report, state, group, used))
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    root.set("time", f"{report.seconds:.3f}")
    indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(root, encoding="unicode")}\n'


def _nothing_proven(report: ParityReport) -> Verdict:
    why = sentence(report)
    return Verdict(
        kind="law",
        name="something was proven",
        state="everything",
        output="",
        value=math.nan,
        limit=math.nan,
        passed=False,
        why=why,
    )


def _suite(
    report: ParityReport, state: str, verdicts: Sequence[Verdict], used: dict[tuple[str, str], int]
) -> Element:
    """Return a state's suite: properties, cases, notes and metrics, in the order of JUnit's schema."""
    suite = Element("testsuite", name=shown(state))
    properties = SubElement(suite, "properties")
    for label, value in facts(report):
        SubElement(properties, "property", name=label, value=value)
    # All failures of a state have one cause, so one message.
    failed = [verdict for verdict in verdicts if not verdict.passed]
    message = failure_sentence(report, failed) if report.failed and failed else sentence(report)
    for verdict in verdicts:
        suite.append(_case(report, verdict, message, used))
    counts = {
        "tests": len(verdicts),
        "failures": sum(not verdict.passed for verdict in verdicts),
        "errors": 0,
        "skipped": sum(verdict.passed and not verdict.counted for verdict in verdicts),
    }
    for key, count in counts.items():
        suite.set(key, str(count))
    suite.set("time", "0.000")
    metrics = metric_rows(row for row in report.metrics if row.state == state)
    # JUnit's schema allows text only in a suite, so each suite has the notes.
    if output := [*note_lines(report), *(align(metrics) if len(metrics) > 1 else [])]:
        SubElement(suite, "system-out").text = "\n".join(output)
    return suite


def _case(report: ParityReport, verdict: Verdict, message: str, used: dict[tuple[str, str], int]) -> Element:
    classname = f"parity.{shown(verdict.state).replace('.', '_')}"
    plain = shown(f"{verdict.name} [{verdict.output}]" if verdict.output else verdict.name)
    # GitLab takes two cases of one name for one case. The count goes on where the last equal name ended.
    name, count = plain, used.get((classname, plain), 0)
    while (classname, name) in used:
        count += 1
        name = f"{plain} #{count}"
    used[classname, plain] = max(count, 1)
    used.setdefault((classname, name), 1)
    case = Element("testcase", classname=classname, name=name, time="0.000")
    if not verdict.passed:
        failure = SubElement(case, "failure", message=message, type=verdict.kind)
        failure.text = "\n".join(_failure_lines(report, verdict))
    elif not verdict.counted:
        SubElement(case, "skipped", message=f"proves nothing: {shown(verdict.why)}".rstrip(": "))
    return case


def _failure_lines(report: ParityReport, verdict: Verdict) -> list[str]:
    facts = [
        ("check", verdict.name),
        ("state", verdict.state),
        ("output", verdict.output),
        ("found", relation(verdict)),
        ("why", verdict.why),
    ]
    text = align([(label, shown(value)) for label, value in facts if value])
    if report.localisation is not None:
        text += ["", *localisation_lines(report.localisation)]
    return text
