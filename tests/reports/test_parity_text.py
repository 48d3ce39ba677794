"""A parity report as text: every number is there, and nothing that a terminal acts on."""

import math
import re
from dataclasses import replace

import numpy as np
import parity_reports
import pytest
from parity_reports import words

from lora_export.parity.result import Localisation, ModuleRow, Verdict
from lora_export.reports.parity import to_text as parity_text
from lora_export.reports.parity.words import number, relation, share_of_limit, verdict_line
from lora_export.untrusted.shown import printable


@pytest.fixture(params=parity_reports.REPORTS)
def report(request):
    return parity_reports.REPORTS[request.param]()


def test_text_says_every_failure_in_full(report):
    text = words("\n".join(parity_text.check_lines(report)))
    assert report.failed or report.passed
    for verdict in report.failed:
        said = (verdict.name, verdict.output, verdict.why)
        for part in (*map(printable, said), number(verdict.value), number(verdict.limit)):
            assert words(part) in text


def test_text_says_the_worst_of_what_passed():
    report = parity_reports.good()
    text = parity_text.check_lines(report)
    for state in parity_reports.STATES:
        errors = [v for v in report.verdicts if v.state == state and v.name == "relative error"]
        worst = errors[int(np.argmax([v.value / v.limit for v in errors]))]
        row = next(line for line in text[text.index(state) :] if "relative error" in line)
        assert f"{len(errors)} outputs, worst {worst.output} " in row
        assert f"{number(worst.value)} ≤ {number(worst.limit)}" in row


@pytest.mark.parametrize("kind", ["good", "failed"])
def test_text_keeps_its_width_on_a_terminal(kind):
    assert (
        max(map(len, parity_text.check_lines(parity_reports.REPORTS[kind](), cut=True))) <= parity_text.WIDTH
    )


def test_text_in_a_log_has_every_reason_in_full():
    why = "a reason " * 30 + "that ends here"
    report = parity_reports.good()
    long = replace(report, verdicts=tuple(replace(verdict, why=why) for verdict in report.verdicts))
    log = [line for line in parity_text.check_lines(long) if "relative error" in line]
    assert len(log) == len(parity_reports.STATES)
    assert all(line.endswith(why) for line in log)
    assert not any("that ends here" in line for line in parity_text.check_lines(long, cut=True))


def test_text_holds_nothing_that_a_terminal_acts_on():
    text = parity_text.check_lines(parity_reports.hostile())
    assert all(line.isprintable() for line in text)
    assert r"\x00\x01\x1b[31mred\x07\r\nnext\tline" in "\n".join(text)


def test_last_line_is_the_verdict():
    good, failed = parity_reports.good(), parity_reports.failed()
    assert parity_text.check_lines(good)[-1] == f"PASSED: {len(good.verdicts)} checks"
    begins = f"the error begins at {parity_reports.CULPRIT}"
    assert parity_text.check_lines(failed)[-1] == f"FAILED: 2 of {len(failed.verdicts)} checks; {begins}"
    one = good.verdicts[:1]
    assert verdict_line(replace(good, verdicts=one)) == "PASSED: 1 check"
    empty = replace(one[0], counted=False)
    assert verdict_line(replace(good, verdicts=(*one, empty))) == "PASSED: 1 check; 1 more proves nothing"
    assert (
        verdict_line(replace(good, verdicts=(empty, empty)))
        == "FAILED: nothing was proven; 2 more prove nothing"
    )
    assert verdict_line(replace(good, verdicts=())) == "FAILED: nothing was proven"
    assert verdict_line(replace(failed, localisation=None)) == f"FAILED: 2 of {len(failed.verdicts)} checks"


@pytest.mark.parametrize(("passed", "sign"), [(True, "void"), (False, "FAIL")])
def test_what_proves_nothing_says_so(passed, sign):
    verdict = Verdict(
        kind="effect",
        name="error / effect",
        state="zero",
        output="logits",
        value=math.nan,
        limit=math.inf,
        passed=passed,
        why="B is 0",
        counted=False,
    )
    text = parity_text.check_lines(parity_reports.good(verdicts=(*parity_reports.good().verdicts, verdict)))
    at = text.index("zero")
    said = words(" ".join(text[at + 1 : text.index("", at)]))
    assert said.startswith(f"{sign} error / effect logits nan, no limit")
    assert "proves nothing" in said
    assert "B is 0" in said


def test_text_marks_where_the_error_begins():
    text = parity_text.check_lines(parity_reports.failed())
    assert [line.split()[1] for line in text if line.split()[:1] == [">>"]] == [parity_reports.CULPRIT]


@pytest.mark.parametrize("begins", [0, 100, 199])
def test_a_long_table_of_modules_is_cut_around_the_culprit(begins):
    rows = tuple(
        ModuleRow(
            module=f"layers.{i}.proj",
            error_in=1e-4,
            error_out=1e-4,
            own_out=1e-4,
            effect=0.1,
            jumped=i in (begins, 50),
        )
        for i in range(200)
    )
    found = Localisation(state="json", module=rows[begins].module, rows=rows, looked_at=9, of=200)
    text = parity_text.localisation_lines(found)
    shown = re.findall(r"layers\.(\d+)\.proj  ", "\n".join(text[1:]))
    assert {str(begins), "50"} <= set(shown)
    assert len(shown) < 20
    assert f"… and {200 - len(shown)} more with --report FILE.json" in text


def test_no_module_found_is_said():
    lines = parity_text.localisation_lines(
        Localisation(state="json", module="", rows=(), note="the graph has no names")
    )
    assert [line.strip() for line in lines] == ["the graph has no names"]


def test_numbers_keep_what_matters():
    for value in np.random.default_rng(0).lognormal(0, 12, 500):
        assert float(number(float(value))) == pytest.approx(value, rel=0.05)
        assert len(number(-float(value))) <= 9
    assert [number(float(count)) for count in (7, 9900, -12345)] == ["7", "9900", "-12345"]
    assert [number(v) for v in (math.nan, math.inf, -math.inf, 0.0, None)] == ["nan", "inf", "-inf", "0", ""]


def test_share_is_worst_where_nothing_can_be_told():
    def of(value, limit):
        return share_of_limit(
            Verdict(kind="error", name="", state="", output="", value=value, limit=limit, passed=True)
        )

    assert of(1.0, 4.0) == 0.25
    assert of(0.0, 0.0) == of(9.0, math.inf) == 0.0
    assert of(1.0, 0.0) == of(math.nan, 1.0) == of(math.inf, 1.0) == math.inf


@pytest.mark.parametrize(
    ("value", "limit", "passed", "said"),
    [
        (0.1, 0.2, True, "0.1 ≤ 0.2"),
        (0.3, 0.2, False, "0.3 > 0.2"),
        (0.1, 0.2, False, "0.1, limit 0.2"),
        (math.nan, 0.2, False, "nan, limit 0.2"),
        (0.3, math.inf, True, "0.3, no limit"),
    ],
)
def test_relation_says_nothing_false(value, limit, passed, said):
    assert (
        relation(Verdict(kind="error", name="", state="", output="", value=value, limit=limit, passed=passed))
        == said
    )
