"""A parity report as JUnit: one case for each verdict, none green where nothing was proven."""

import re
from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import parity_reports
import pytest
from parity_reports import words

from lora_export.reports.parity import to_junit as parity_junit
from lora_export.reports.parity.words import mark, relation
from lora_export.untrusted.shown import printable

# What XML 1.0 may hold; expat alone lets U+FFFE through.
LEGAL = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")
# JUnit.xsd: children of a suite come in this order.
ORDER = ("properties", "testcase", "system-out", "system-err")
COUNTS = ("tests", "failures", "errors", "skipped")


@pytest.fixture(params=parity_reports.REPORTS)
def report(request):
    return parity_reports.REPORTS[request.param]()


def parsed(report):
    text = parity_junit.junit_xml(report)
    assert LEGAL.fullmatch(text)
    return ElementTree.fromstring(text.encode("utf-8"))


def outcome(case):
    assert set(case.attrib) == {"classname", "name", "time"}
    assert all(case.attrib.values())
    children = [child.tag for child in case]
    assert children in ([], ["failure"], ["skipped"])
    return children[0] if children else "passed"


def test_junit_has_the_structure_of_its_schema(report):
    root = parsed(report)
    assert root.tag == "testsuites"
    names = Counter((case.get("classname"), case.get("name")) for case in root.iter("testcase"))
    assert set(names.values()) == {1}
    for suite in root:
        assert suite.tag == "testsuite"
        assert suite.get("name")
        places = [ORDER.index(child.tag) for child in suite]
        assert places == sorted(places)
        outcomes = Counter(map(outcome, suite.iter("testcase")))
        counted = (sum(outcomes.values()), outcomes["failure"], 0, outcomes["skipped"])
        assert tuple(int(suite.get(key)) for key in COUNTS) == counted
        for row in suite.iter("property"):
            assert set(row.attrib) == {"name", "value"}
    for element in root.iter():
        if "time" in element.attrib:
            assert re.fullmatch(r"\d+\.\d{3}", element.get("time"))
    assert tuple(int(root.get(key)) for key in COUNTS) == tuple(
        sum(int(suite.get(key)) for suite in root) for key in COUNTS
    )
    assert float(root.get("time")) == pytest.approx(report.seconds, abs=1e-3)


def test_junit_has_one_case_for_each_verdict(report):
    root = parsed(report)
    wanted = Counter({"ok": "passed", "void": "skipped", "FAIL": "failure"}[mark(v)] for v in report.verdicts)
    assert Counter(outcome(case) for case in root.iter("testcase")) == wanted
    for suite in root:
        verdicts = [v for v in report.verdicts if printable(v.state) == suite.get("name")]
        for verdict, case in zip(verdicts, suite.iter("testcase"), strict=True):
            assert case.get("name").startswith(printable(verdict.name))
            failure = case.find("failure")
            if failure is not None:
                assert failure.get("type") == verdict.kind
                for part in (relation(verdict), printable(verdict.why)):
                    assert part in failure.text
                assert failure.get("message").startswith("FAILED: ")


def test_junit_failures_say_where_the_error_begins():
    failures = list(parsed(parity_reports.failed()).iter("failure"))
    assert len(failures) == 2
    assert all(parity_reports.CULPRIT in failure.text for failure in failures)


def test_junit_has_the_notes(report):
    for suite in parsed(report):
        text = words(suite.find("system-out").text)
        for note in report.notes:
            assert words(f"note: {printable(note)}") in text
    empty = parsed(replace(report, verdicts=()))
    assert words(f"note: {printable(report.notes[0])}") in words(empty.find(".//system-out").text)


@pytest.mark.parametrize("counted", [True, False])
def test_junit_is_not_green_where_nothing_was_proven(counted):
    verdicts = () if counted else (replace(parity_reports.good().verdicts[0], counted=False),)
    root = parsed(parity_reports.good(verdicts=verdicts))
    assert root.get("failures") == "1"
    assert "nothing was proven" in root.find(".//failure").get("message")


def test_junit_of_the_same_report_is_the_same():
    assert parity_junit.junit_xml(parity_reports.failed()) == parity_junit.junit_xml(parity_reports.failed())


def test_junit_cases_of_one_name_are_told_apart():
    verdict = parity_reports.good().verdicts[0]
    clash = replace(verdict, name=f"{verdict.name} [{verdict.output}] #2", output="")
    root = parsed(parity_reports.good(verdicts=(clash, verdict, verdict, verdict)))
    names = [case.get("name") for case in root.iter("testcase")]
    assert len(set(names)) == 4


class Counted(dict):
    """The names so far; counts how often it is asked."""

    asked = 0

    def __contains__(self, key):
        self.asked += 1
        return super().__contains__(key)


def test_junit_numbers_equal_names_without_trying_all_numbers():
    report = parity_reports.good()
    used, verdict, count = Counted(), report.verdicts[0], 2000
    names = [parity_junit._case(report, verdict, "", used).get("name") for _ in range(count)]
    assert names == [names[0], *(f"{names[0]} #{i}" for i in range(2, count + 1))]
    assert used.asked <= 3 * count
