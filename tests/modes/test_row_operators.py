"""Operators along the batch and along other axes, one by one: refused, followed, or said."""

from __future__ import annotations

import re

import numpy as np
import pytest
from branch_graphs import TOLERANCE, check_values, lora, refused, run_bank, table_lora
from small_graphs import adapter, delta, graph, random, run, save

from lora_export import SiteError, bank_onnx

OUT, IN, BATCH, LENGTH = 6, 8, 3, 4
WEIGHT = random(OUT, IN, seed=7)
GIVEN = {"a": adapter(lora("fc", OUT, IN)), "b": adapter(lora("fc", OUT, IN, 3, 2))}
SHARES = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
CONSTANTS = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "back": np.array([-1]),
    "far": np.array([1 << 40]),
    "low": np.array([-(1 << 40)]),
    "order": np.array([2, 0, 1]),
    "spots": np.array([[2], [0], [1]]),
    "inner": np.array([3, 1]),
    "some": np.array([True, False, True, True]),
    "rows": np.array([True, True, False]),
    "sides": np.array([0, 1, 0, 0, 0, 0]),
    "ends": np.array([1, 0, 0, -1, 0, 0]),
    "wide": np.array([1, 2, 1]),
    "twice": np.array([2, 1, 1]),
    "longer": np.array([1, 2, 1], np.float32),
    "taller": np.array([2, 1, 1], np.float32),
}
KEPT = {
    "reversed": "f = ReverseSequence <batch_axis = 0, time_axis = 1> (x, n)",
    "compressed": "f = Compress <axis = 1> (x, some)",
    "own-picks": "m = Unsqueeze (n, back) f = GatherND <batch_dims = 1> (x, m)",
    "largest": "f, i = TopK <axis = 1> (x, two)",
    "tiled": "f = Tile (x, wide)",
    "scattered": "m = Reshape (n, column) i = Expand (m, flat) f = ScatterElements <axis = 1> (x, i, u)",
    "whole": "f = Slice (x, zero, far, zero, one)",
    "turned": "f = Slice (x, back, low, one, back)",
    "split": "f, g = Split <axis = 1, num_outputs = 2> (x)",
    "sequence": "q = SplitToSequence <axis = 1> (x, halves) f = SequenceAt (q, start)",
    "padded": "f = Pad (x, sides)",
    "resized": 'f = Resize <mode = "nearest"> (x, , longer)',
    "picked": "f = Gather <axis = 1> (x, inner)",
    "centred": "m = ReduceMean (x, zero) f = Sub (x, m)",
    "quantised": "q, s, p = DynamicQuantizeLinear (x) c = DequantizeLinear (q, s, p) f = Relu (c)",
}
MOVED = {
    "reversed": "f = ReverseSequence <batch_axis = 1, time_axis = 0> (x, m4)",
    "compressed": "f = Compress <axis = 0> (x, rows)",
    "largest": "f, i = TopK <axis = 0> (x, two)",
    "tiled": "f = Tile (x, twice)",
    "scattered": "f = ScatterND (x, spots, x)",
    "added": 'z = Sub (x, x) f = ScatterND <reduction = "add"> (z, spots, x)',
    "turned": "f = Slice (x, back, low, zero, back)",
    "split": "g, h = Split <axis = 0> (x, parts) f = Concat <axis = 0> (h, g)",
    "sequence": "q = SplitToSequence <axis = 0> (x, one) f = SequenceAt (q, start)",
    "padded": "f = Pad (x, ends)",
    "resized": 'f = Resize <mode = "nearest"> (x, , taller)',
    "picked": "f = Gather <axis = 0> (x, order)",
    "nd": "f = GatherND (x, spots)",
    "one": "f = ReduceMax (x, zero)",
    "sorted": "v, i = TopK <axis = 0> (n, three) f = Gather <axis = 0> (x, i)",
    "put back": "v, i = TopK <axis = 0> (n, three) e = Gather <axis = 0> (x, i) w, j = TopK <axis = 0, "
    "largest = 0> (i, three) f = Gather <axis = 0> (e, j)",
}
CONSTANTS |= {
    "column": np.array([-1, 1, 1]),
    "flat": np.array([1, 1, IN]),
    "u": random(BATCH, 1, IN, seed=4),
    "start": np.array(0),
    "m4": np.array([3, 2, 1, 3]),
    "parts": np.array([2, 1]),
    "halves": np.array([2, 2]),
    "three": np.array([3]),
}


def base_of(lines, folder, axis):
    ports = f"(float[{axis},4,8] x, int64[{axis}] n) => (float[p,q,r] y)"
    text = f"g {ports} {{ {lines} y = MatMul (f, fc_weight) }}"
    return save(graph(text, {"fc.weight": WEIGHT.T.copy()} | constants_of(lines)), folder)


def constants_of(lines):
    return {name: value for name, value in CONSTANTS.items() if name in re.findall(r"\w+", lines)}


def feeds():
    return {"x": random(BATCH, LENGTH, IN, seed=9), "n": np.array([1, 3, 2])}


@pytest.mark.parametrize("axis", ["b", BATCH])
@pytest.mark.parametrize("case", KEPT)
def test_what_leaves_rows_in_their_order(case, axis, tmp_path):
    """Oracle: the operator as ONNX Runtime computes it, times each row's own weight."""
    base = base_of(KEPT[case], tmp_path, axis)
    report = bank_onnx(base, GIVEN, tmp_path / "bank.onnx")
    assert not [note for note in report.plan.notes if "first axis" in note]
    before = graph(
        f"g (float[{axis},4,8] x, int64[{axis}] n) => (float[p,q,r] f) {{ {KEPT[case]} }}",
        constants_of(KEPT[case]),
    )
    (hidden,) = run(save(before, tmp_path / "f"), **feeds())
    rows = []
    for row, share in enumerate(SHARES):
        pairs = zip(GIVEN.values(), share, strict=True)
        changes = [delta(one.modules["fc.weight"]) * part for one, part in pairs]
        rows.append(hidden[row].astype(np.float64) @ (WEIGHT + sum(changes)).T)
    check_values(run_bank(tmp_path / "bank.onnx", SHARES, feeds()), [np.stack(rows)], TOLERANCE)


@pytest.mark.parametrize("axis", ["b", BATCH])
@pytest.mark.parametrize("case", MOVED)
def test_what_does_not(case, axis, tmp_path):
    caught = refused(bank_onnx, base_of(MOVED[case], tmp_path, axis), GIVEN)
    assert isinstance(caught, SiteError)
    assert "fc: " in str(caught)
    assert "swap-onnx" in caught.hint or "free batch axis" in caught.hint


@pytest.mark.parametrize("axis", ["b", BATCH])
def test_ids_in_another_order(axis, tmp_path):
    lines = "f = Slice (x, back, low, zero, back) y = Gather (t_weight, f)"
    text = f"g (int64[{axis},s] x) => (float[{axis},s,6] y) {{ {lines} }}"
    constants = {name: CONSTANTS[name] for name in ("back", "low", "zero")}
    base = save(graph(text, {"t.weight": random(9, OUT)} | constants), tmp_path)
    caught = refused(bank_onnx, base, {"a": adapter(table_lora("t", 9, OUT))})
    assert "t: Slice f takes the rows of the batch (of x) in another order" in str(caught)


@pytest.mark.parametrize("axis", ["b", BATCH])
@pytest.mark.parametrize(
    "lines",
    [
        "k = NonZero (n) t = Transpose (k) f = GatherND (x, t)",
        "f = my.domain.Mix (x)",
        "m = my.domain.Mix (x) f = Add (x, m)",
    ],
    ids=["by-values", "foreign", "combined"],
)
def test_what_is_not_followed_is_said(lines, axis, tmp_path):
    """Whatever the shapes tell: all of the batch's rows, in an order that nobody knows."""
    ports = f"(float[{axis},4,8] x, int64[{axis}] n) => (float[{axis},4,6] y) <float[{axis},4,8] f>"
    text = f"g {ports} {{ {lines} y = MatMul (f, fc_weight) }}"
    head = '<ir_version: 10, opset_import: ["" : 20, "my.domain" : 1]>'
    base = save(graph(text, {"fc.weight": WEIGHT.T.copy()}, head=head), tmp_path)
    report = bank_onnx(base, GIVEN, tmp_path / "bank.onnx")
    (note,) = [note for note in report.plan.notes if "first axis" in note]
    assert "which is not followed" in note
