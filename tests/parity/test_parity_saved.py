"""Parity against saved outputs, and against graphs."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import broken_exports as broken
import numpy as np
import pytest
from parity_cases import (
    TEXT,
    A,
    B,
    assert_passes,
    banked,
    base,
    feeds,
    merged,
    of,
    proven,
    right,
    saved,
    swapped,
)
from session_graphs import P, Q, both
from small_graphs import graph, random, save

from lora_export import bank_onnx, swap_onnx
from lora_export.errors import BackendError
from lora_export.parity.check import check_parity
from lora_export.parity.judge.limits import STEP, STEPS


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("mode", ["merged", "swap", "bank"])
def test_saved_outputs_with_their_states(mode, suffix, tmp_path):
    outputs = {"base/y": right(), "a/y": right((A, 1)), "b/y": right((B, 1))}
    given = {"a": A, "b": B}
    if mode == "merged":
        candidate, given = merged(tmp_path, A), {"a": A}
        del outputs["b/y"]
    else:
        candidate = swapped(tmp_path) if mode == "swap" else banked(tmp_path, given)
    reference = saved(tmp_path / f"right{suffix}", outputs)
    report = check_parity(reference, candidate, given, feeds=feeds(tmp_path))
    assert_passes(report)
    assert proven(report) == set(given)
    assert report.reference == {"kind": "saved", "path": str(reference), "dtype": "float64"}
    assert (report.candidate["mode"], report.candidate["dtype"]) == (mode, "float32")
    assert {row.state for row in report.metrics} == set(given) | (
        {"no adapter"} if mode != "merged" else set()
    )
    assert report.notes == ()
    for name, adapter in given.items():
        (row,) = [row for row in report.metrics if row.state == name]
        effect = np.linalg.norm(right((adapter, 1)) - right()) / np.linalg.norm(right((adapter, 1)))
        assert row.effect == pytest.approx(effect)
        assert row.relative == pytest.approx(0, abs=1e-6)
    # A wrong one among them is found and no other is blamed.
    outputs[f"{list(given)[-1]}/y"] = right((both(9), 1))
    wrong = check_parity(saved(tmp_path / f"w{suffix}", outputs), candidate, given, feeds=feeds(tmp_path))
    assert {v.state for v in wrong.failed if v.kind != "law"} == {list(given)[-1]}


def test_saved_outputs_without_a_name_are_those_of_a_merged_graph(tmp_path):
    reference = saved(tmp_path / "right.npz", {"y": right((A, 1))})
    report = check_parity(reference, merged(tmp_path, A), {"a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    (effect,) = of(report, "effect")
    assert not effect.counted
    limits = {v.name: v.limit for v in of(report, "error")}
    assert limits["relative error"] == pytest.approx(STEPS * STEP["float32"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_saved_outputs_in_bfloat16(suffix, tmp_path):
    import ml_dtypes

    reference = saved(tmp_path / f"right{suffix}", {"y": right().astype(ml_dtypes.bfloat16)})
    report = check_parity(reference, base(tmp_path), feeds=feeds(tmp_path), dtype="bfloat16")
    assert_passes(report)
    assert report.reference["dtype"] == "bfloat16"
    assert [note for note in report.notes if "held to bfloat16" in note] == list(report.notes)
    # It can't tell whether a float32 export is as good as float32.
    report = check_parity(reference, tmp_path / "base.onnx", feeds=feeds(tmp_path))
    assert not report.passed
    assert any("coarser than float32" in note for note in report.notes)


def test_saved_states_that_the_candidate_has_not_are_said(tmp_path):
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "a/y": right((A, 1)), "b/y": right((B, 1))})
    report = check_parity(reference, swapped(tmp_path), {"a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    assert [note for note in report.notes if "b" in note and "not compared" in note]


def test_a_base_that_was_not_saved_is_said(tmp_path):
    reference = saved(tmp_path / "right.npz", {"a/y": right((A, 1))})
    report = check_parity(reference, swapped(tmp_path), {"a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    assert any("base is not checked" in note for note in report.notes)
    assert not of(report, "error", "no adapter")


def copied(path: Path, folder: Path) -> Path:
    """Return a graph that computes the same, in another file."""
    return broken.edited(path, folder / f"other-{path.name}", lambda model: None)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_merged_graph_against_another_one(with_base, tmp_path):
    candidate = merged(tmp_path, A)
    reference = copied(candidate, tmp_path)
    options = {"base": tmp_path / "base.onnx"} if with_base else {}
    report = check_parity(reference, candidate, {"a": A}, **options)
    assert_passes(report)
    assert report.reference["kind"] == "onnx"
    assert proven(report) == ({"a"} if with_base else set())
    not_applied = check_parity(reference, tmp_path / "base.onnx", {"a": A}, tolerance="1e9,1e9", **options)
    # Only what is known without the adapter can tell, where errors don't count.
    assert not_applied.passed == (not with_base)


def test_a_bank_against_a_swap_graph(tmp_path):
    given = {"a": A, "b": B}
    report = check_parity(swapped(tmp_path), banked(tmp_path, given), given)
    assert_passes(report)
    assert proven(report) == {"a", "b"}
    assert {"mixed batch", "permuted rows", "row alone", "A→B→A"} == {
        verdict.name.partition(":")[0] for verdict in of(report, "law")
    }


def test_an_output_of_another_name_is_compared_where_it_is_the_only_one(tmp_path):
    text = TEXT.replace("=> (float[batch,3] y)", "=> (float[batch,3] result)").replace(" y = ", " result = ")
    other = save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "other.onnx")
    report = check_parity(base(tmp_path), other)
    assert_passes(report)
    assert any("'result'" in note and "'y'" in note for note in report.notes)


def test_outputs_that_the_candidate_lacks_are_said(tmp_path):
    text = TEXT.replace("=> (float[batch,3] y)", "=> (float[batch,3] y, float[batch,5] t)")
    more = save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "more.onnx")
    report = check_parity(more, base(tmp_path))
    assert_passes(report)
    (left,) = [verdict for verdict in report.verdicts if verdict.name == "not compared"]
    assert (left.output, left.counted) == ("t", False)


def test_a_candidate_without_logits_fails(tmp_path):
    text = TEXT.replace("=> (float[batch,3] y)", "=> (float[batch,3] y, float[batch,5] logits)")
    text = text.replace("t =", "logits =").replace("(t,", "(logits,")
    more = save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "more.onnx")
    report = check_parity(more, base(tmp_path))
    assert {(verdict.name, verdict.output) for verdict in report.failed} == {("not compared", "logits")}


def test_graphs_are_compared_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    other = shutil.copy(base(tmp_path), tmp_path / "other.onnx")
    assert check_parity(other, tmp_path / "base.onnx").passed


def test_a_base_tells_nothing_without_an_adapter(tmp_path):
    merged_graph = merged(tmp_path, A)
    with pytest.raises(BackendError, match="no adapter was given"):
        check_parity(merged_graph, base(tmp_path), base=base(tmp_path), tolerance=(2, 2))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_no_number(weight, tmp_path):
    with pytest.raises(BackendError, match="weights are"):
        check_parity(base(tmp_path), merged(tmp_path, A), {"a": A}, weights=[weight])


def test_a_bank_whose_first_input_all_rows_share(tmp_path):
    """Each row of the reference gets its adapter: how many there are, the shared input does not tell."""
    text = TEXT.replace("(float[batch,4] x)", "(float[2] factor, float[batch,4] x)")
    scaled = "s = ReduceSum<keepdims = 0>(factor)  u = Mul(t, s)  y = MatMul(u, q_weight)"
    text = text.replace("y = MatMul(t, q_weight)", scaled)
    save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "base.onnx")
    given = {"a": A, "b": B}
    swap_onnx(tmp_path / "base.onnx", tmp_path / "swap.onnx", target_modules=["p", "q"], max_rank=8)
    bank_onnx(tmp_path / "base.onnx", given, tmp_path / "bank.onnx", batch_input="x")
    feed = saved(tmp_path / "shared.npz", {"factor": np.float32([0.25, 0.75]), "x": random(5, 4, seed=3)})
    for reference, candidate in (("bank", "swap"), ("swap", "bank")):
        report = check_parity(
            tmp_path / f"{reference}.onnx", tmp_path / f"{candidate}.onnx", given, feeds=feed
        )
        assert_passes(report)
        assert proven(report) == {"a", "b"}
