"""A parity report against its baseline: what is worse is found, noise is not, other checks are refused."""

import json
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import parity_reports
import pytest

from lora_export.errors import LoraExportError
from lora_export.parity.result import Generated, ParityReport
from lora_export.reports.parity import to_json as parity_json
from lora_export.reports.parity.baseline import compare_reports, floors, regression_lines


def data(report):
    return json.loads(parity_json.report_json(report))


def with_metric(report, state="json", output="logits", **values):
    rows = [replace(r, **values) if (r.state, r.output) == (state, output) else r for r in report.metrics]
    return replace(report, metrics=tuple(rows))


def with_verdict(report, number=1, **values):
    verdicts = list(report.verdicts)
    verdicts[number] = replace(verdicts[number], **values)
    return replace(report, verdicts=tuple(verdicts))


@pytest.fixture
def old():
    return parity_reports.good()


def test_the_same_is_no_regression(old):
    read = ParityReport.from_json(data(old))
    assert compare_reports(old, old) == compare_reports(read, old) == compare_reports(read, read) == []
    assert regression_lines([]) == ["PASSED: nothing is worse than the baseline"]


def test_a_report_read_from_its_file_is_a_baseline(old, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(parity_json.report_json(old), encoding="utf-8")
    assert compare_reports(parity_json.read_report(path), old) == []
    assert compare_reports(parity_json.read_report(path), with_verdict(old, passed=False))


def test_what_passed_and_fails_now_is_found(old):
    (found,) = compare_reports(old, with_verdict(old, passed=False, value=0.5, why="v_proj is not applied"))
    before = old.verdicts[1]
    assert (found.kind, found.name, found.state, found.output) == (
        "verdict", before.name, before.state, before.output,
    )  # fmt: skip
    assert (found.before, found.now, found.limit) == (before.value, 0.5, before.limit)
    text = regression_lines([found])
    assert text[-1] == "FAILED: 1 thing worse than the baseline"
    assert "v_proj is not applied" in text[1]


def test_what_failed_before_and_still_fails_is_no_regression(old):
    broken = with_verdict(old, passed=False)
    assert compare_reports(broken, broken) == []
    assert compare_reports(broken, old) == []


def test_a_new_check_that_fails_is_found(old):
    extra = replace(old.verdicts[0], name="new", passed=False)
    (found,) = compare_reports(old, replace(old, verdicts=(*old.verdicts, extra)))
    assert (found.kind, found.name) == ("verdict", "new")
    assert compare_reports(old, replace(old, verdicts=(*old.verdicts, replace(extra, passed=True)))) == []


def test_a_check_that_is_gone_is_found(old):
    gone = old.verdicts[5]
    (found,) = compare_reports(old, replace(old, verdicts=tuple(v for v in old.verdicts if v is not gone)))
    assert (found.kind, found.output) == ("vanished", gone.output)
    assert math.isnan(found.now)
    twice = replace(old, verdicts=(*old.verdicts, gone))
    assert [row.kind for row in compare_reports(twice, old)] == ["vanished"]


def test_a_check_that_proves_nothing_now_is_found(old):
    (found,) = compare_reports(old, with_verdict(old, counted=False))
    assert found.kind == "void"


def test_a_measurement_that_is_gone_is_found(old):
    assert [row.kind for row in compare_reports(old, replace(old, metrics=old.metrics[1:]))] == [
        "vanished"
    ] * 3
    (found,) = compare_reports(old, with_metric(old, kl=None))
    assert (found.kind, found.name) == ("vanished", "kl")


@pytest.mark.parametrize("factor", [1.0, 2.0, 10.0])
def test_a_relative_error_may_grow_by_the_factor(old, factor):
    before = with_metric(old, relative=0.05)
    assert compare_reports(before, with_metric(old, relative=0.05 * factor * 0.999), factor) == []
    (found,) = compare_reports(before, with_metric(old, relative=0.05 * factor * 1.001), factor)
    assert (found.kind, found.name, found.before) == ("metric", "relative", 0.05)
    assert found.limit == pytest.approx(0.05 * factor)


def test_kl_may_grow_by_the_square_of_the_factor(old):
    before = with_metric(old, kl=0.1)
    assert compare_reports(before, with_metric(old, kl=0.1 * 2**2 * 0.999)) == []
    assert [row.name for row in compare_reports(before, with_metric(old, kl=0.1 * 2**2 * 1.001))] == ["kl"]


def test_top1_may_lose_the_factor_and_one_position(old):
    positions = sum(math.prod(feed["shapes"]["input_ids"]) for feed in old.feeds)
    before = with_metric(old, top1=0.9)
    least = 1 - 2 * 0.1 - 1 / positions
    assert compare_reports(before, with_metric(old, top1=least + 1e-6)) == []
    (found,) = compare_reports(before, with_metric(old, top1=least - 1e-6))
    assert found.limit == pytest.approx(least)
    assert compare_reports(before, with_metric(old, top1=1.0)) == []


def test_positions_are_those_that_were_compared(old):
    """Of padded feeds fewer are compared than the feeds have: one of them is more."""
    before = with_metric(old, top1=0.9, positions=4)
    now = with_metric(old, top1=1 - 2 * 0.1 - 1 / 4 + 1e-6, positions=4)
    assert compare_reports(before, now) == []
    assert compare_reports(with_metric(old, top1=0.9), now) == []
    worse = with_metric(old, top1=1 - 2 * 0.1 - 1 / 4 - 1e-6, positions=4)
    assert [row.name for row in compare_reports(before, worse)] == ["top1"]
    # A report that doesn't say it is compared as before.
    silent = data(now)
    for row in silent["metrics"]:
        del row["positions"]
    assert [row.name for row in compare_reports(before, ParityReport.from_json(silent))] == ["top1"]


def with_tokens(report, *runs):
    """``(reference, equal)`` for each prompt of the state ``json``."""
    return replace(
        report,
        generated=tuple(
            Generated(
                state="json",
                prompt=(1, i),
                reference=tuple(range(n)),
                candidate=(*range(equal), *[99] * (n - equal)),
                equal=equal,
                tie=True,
            )
            for i, (n, equal) in enumerate(runs)
        ),
    )


def test_fewer_tokens_asked_for_are_found(old):
    before = with_tokens(old, (64, 64), (3, 2))
    assert compare_reports(before, before) == []
    assert compare_reports(before, with_tokens(old, (65, 65), (3, 2))) == []
    (found,) = compare_reports(before, with_tokens(old, (8, 8), (3, 2)))
    assert (found.kind, found.state, found.before, found.now) == ("vanished", "json", 64, 8)
    assert "--generate" in found.why


def test_tokens_that_ended_at_a_tie_are_no_fewer(old):
    before = with_tokens(old, (64, 64), (64, 64))
    assert compare_reports(before, with_tokens(old, (64, 64), (5, 4))) == []
    # How many were asked for can't be told.
    assert compare_reports(before, with_tokens(old, (7, 6), (5, 4))) == []
    assert compare_reports(with_tokens(old, (7, 6), (5, 4)), with_tokens(old, (8, 8), (8, 8))) == []


def test_one_tie_of_a_float32_export_is_no_regression(old):
    exact = replace(old, candidate={**old.candidate, "dtype": "float32"})
    positions = sum(math.prod(feed["shapes"]["input_ids"]) for feed in old.feeds)
    assert compare_reports(with_metric(exact, top1=0.999), with_metric(exact, top1=1 - 1 / positions)) == []
    assert compare_reports(exact, with_metric(exact, top1=1 - 2 / positions))


@pytest.mark.parametrize("name", ["relative", "kl", "top1"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_now_is_worse(old, name, value):
    (found,) = compare_reports(old, with_metric(old, **{name: -value if name == "top1" else value}))
    assert (found.kind, found.name) == ("metric", name)
    broken = with_metric(old, **{name: math.nan})
    assert compare_reports(broken, broken) == []


def test_below_the_floor_all_is_noise(old):
    floor = floors("float32", old.candidate["dtype"])
    before = with_metric(old, relative=0.0, kl=0.0, top1=1.0)
    now = {"relative": floor.relative, "kl": floor.kl, "top1": 1 - floor.top1}
    assert compare_reports(before, with_metric(before, **now)) == []
    assert [
        row.name for row in compare_reports(before, with_metric(before, relative=3 * floor.relative))
    ] == ["relative"]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_floors_hold_what_the_order_of_a_sum_does(name):
    """Oracle: the same deep network computed in two orders of summation differs by less than its floor."""
    dtype = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
    rng = np.random.default_rng(0)
    weights = [(rng.normal(0, 1, (64, 64)) / 8).astype(dtype).astype(np.float64) for _ in range(12)]
    x = rng.normal(0, 1, (32, 64)).astype(dtype)

    def run(order):
        hidden = x
        for weight in weights:
            total = np.zeros(hidden.shape, np.float64 if name == "float64" else np.float32)
            for i in order:
                total += np.outer(hidden[:, i], weight[i].astype(dtype)).astype(total.dtype)
            hidden = (hidden + 0.3 * np.tanh(total)).astype(dtype)
        return hidden.astype(np.float64)

    one, other = run(range(64)), run(range(63, -1, -1))
    apart = np.linalg.norm(one - other) / np.linalg.norm(one)
    assert apart < floors(name, "float64").relative
    assert floors(name).relative == 2 * float(ml_dtypes.finfo(dtype).eps)


def test_floors_are_those_of_the_coarser_dtype():
    assert floors("float32", "bfloat16") == floors("bfloat16", "float16") == floors("bfloat16")
    assert floors("float32", "float16") == floors("float16")
    assert floors("unheard of") == floors("float32")


REASONS = {
    "reference's kind": lambda r: replace(r, reference={**r.reference, "kind": "onnx"}),
    "reference's dtype": lambda r: replace(r, reference={**r.reference, "dtype": "float64"}),
    "reference's name": lambda r: replace(r, reference={**r.reference, "path": "models/other"}),
    "candidate's dtype": lambda r: replace(r, candidate={**r.candidate, "dtype": "float32"}),
    "candidate's mode": lambda r: replace(r, candidate={**r.candidate, "mode": "bank"}),
    "adapters": lambda r: replace(r, adapters=r.adapters[:1]),
    "adapter 'json': sha256": lambda r: replace(
        r, adapters=({**r.adapters[0], "sha256": "ff" * 32}, *r.adapters[1:])
    ),
    "adapter 'json': scaling": lambda r: replace(
        r, adapters=({**r.adapters[0], "scaling": [1, 1]}, *r.adapters[1:])
    ),
    "tolerance": lambda r: replace(r, tolerance="0.5,0.5"),
    "feeds": lambda r: replace(r, feeds=r.feeds[1:]),
}


@pytest.mark.parametrize("reason", REASONS)
def test_another_check_is_refused(reason, old):
    with pytest.raises(LoraExportError, match="can't be compared") as caught:
        compare_reports(old, REASONS[reason](old))
    (problem,) = caught.value.problems
    assert reason in problem
    assert caught.value.exit_code == 1


def test_all_reasons_come_at_once(old):
    other = old
    for change in REASONS.values():
        other = change(other)
    with pytest.raises(LoraExportError) as caught:
        compare_reports(old, other)
    assert len(caught.value.problems) == len(REASONS)


def test_feeds_of_other_shapes_are_refused(old):
    feeds = ({**old.feeds[0], "shapes": {"input_ids": [1, 99]}}, *old.feeds[1:])
    with pytest.raises(LoraExportError, match=old.feeds[0]["label"]):
        compare_reports(old, replace(old, feeds=feeds))


def test_other_values_of_the_same_shapes_are_other_feeds(old):
    def hashed(sha):
        return replace(old, feeds=({**old.feeds[0], "sha256": sha}, *old.feeds[1:]))

    assert compare_reports(hashed("aa" * 32), hashed("aa" * 32)) == []
    # An older report has none.
    assert compare_reports(old, hashed("aa" * 32)) == compare_reports(hashed("aa" * 32), old) == []
    with pytest.raises(LoraExportError, match="the feeds") as caught:
        compare_reports(hashed("aa" * 32), hashed("bb" * 32))
    (reason,) = caught.value.problems
    assert reason.endswith(f"not the same: {old.feeds[0]['label']}")


def test_hashes_of_the_reference_count_where_there_are_both(old):
    def hashed(sha, path):
        return replace(old, reference={**old.reference, "sha256": sha, "path": path})

    assert compare_reports(hashed("aa" * 32, "one/a"), hashed("aa" * 32, "two/b")) == []
    assert compare_reports(hashed("", "one/a"), hashed("aa" * 32, "two/a/")) == []
    with pytest.raises(LoraExportError, match="reference's sha256"):
        compare_reports(hashed("aa" * 32, "one/a"), hashed("bb" * 32, "one/a"))


def test_another_machine_runtime_or_export_is_the_same_check(old):
    candidate = {**old.candidate, "sha256": "ee" * 32, "provider": "cuda", "path": "/elsewhere/m.onnx"}
    now = replace(old, candidate=candidate, environment={}, seconds=1.0, notes=("other",))
    assert compare_reports(old, now) == []


@pytest.mark.parametrize(
    "verdicts",
    [
        lambda rows: (),
        lambda rows: (replace(rows[0], counted=False),),
        lambda rows: (replace(rows[0], passed=False),),
    ],
)
def test_an_empty_baseline_is_refused(verdicts, old):
    with pytest.raises(LoraExportError, match="the baseline is empty"):
        compare_reports(replace(old, verdicts=verdicts(old.verdicts)), old)


def test_a_damaged_baseline_is_refused(old):
    damaged = data(old)
    del damaged["metrics"]
    with pytest.raises(LoraExportError, match=r"the baseline: (?s:.*)metrics: is missing"):
        ParityReport.from_json(damaged, "the baseline")
    with pytest.raises(LoraExportError, match="the baseline"):
        ParityReport.from_json({}, "the baseline")


@pytest.mark.parametrize("factor", [0.5, 0, -1, math.nan, math.inf])
def test_a_factor_below_one_is_refused(factor, old):
    with pytest.raises(LoraExportError, match="factor"):
        compare_reports(old, old, factor)


def test_lines_hold_nothing_that_a_terminal_acts_on():
    names = parity_reports.HOSTILE
    verdicts = tuple(replace(parity_reports.good().verdicts[0], state=name, why=name) for name in names)
    now = tuple(replace(verdict, passed=False) for verdict in verdicts)
    text = regression_lines(
        compare_reports(parity_reports.good(verdicts=verdicts), parity_reports.good(verdicts=now))
    )
    assert len(text) == 2 * len(names) + 1
    assert all(line.isprintable() for line in text)


def test_of_many_regressions_the_first_are_listed(old):
    passed = next(row for row in old.verdicts if row.passed)
    many = tuple(replace(passed, name=f"n{i}") for i in range(5000))
    found = compare_reports(replace(old, verdicts=(*old.verdicts, *many)), old)
    text = regression_lines(found)
    assert len(found) == 5000
    assert len(text) == 2 * 100 + 2
    assert text[-2:] == ["… and 4900 more", "FAILED: 5000 things worse than the baseline"]
