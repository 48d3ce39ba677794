"""A weight that a loop takes as an input, beside a call outside: what reads it inside is not followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_graphs import adapter, delta, embedding, error, graph, linear, random, refusals, run, save

from lora_export import SiteError, merge_onnx, swap_onnx

SIZE = 6
LOOP = """
    n = Constant<value = int64 {3}>()
    on = Constant<value = bool {1}>()
    w0 = %s(m_fc_weight)
    h, last = Loop(n, on, x, w0) <body = step (int64 i, bool c, float[b, 6] h0, float[6, 6] w1)
        => (bool c1, float[b, 6] h2, float[6, 6] w2) {
        h1 = MatMul(h0, w1)
        h2 = Tanh(h1)
        w2 = Identity(w1)
        c1 = Identity(c)
    }>
"""
CAPTURED = """
    n = Constant<value = int64 {3}>()
    on = Constant<value = bool {1}>()
    w0 = Transpose<perm = [1, 0]>(m_fc_weight)
    h = Loop(n, on, x) <body = step (int64 i, bool c, float[b, 6] h0) => (bool c1, float[b, 6] h2) {
        h1 = MatMul(h0, w0)
        h2 = Tanh(h1)
        c1 = Identity(c)
    }>
"""
SCAN = """
    w0 = %s(m_fc_weight)
    last, hs = Scan(w0, x) <num_scan_inputs = 1, body = step (float[6, 6] w1, float[6] x1)
        => (float[6, 6] w2, float[6] h2) {
        h1 = MatMul(x1, w1)
        h2 = Tanh(h1)
        w2 = Identity(w1)
    }>
    h = Identity(hs)
"""
CALL = """
    t = Transpose<perm = [1, 0]>(m_fc_weight)
    y = MatMul(h, t)
"""
LOOKUP = """
    e = Gather(m_fc_weight, ids)
    y = Add(e, h)
"""


def _base(folder: Path, body: str, call: str) -> Path:
    text = f"g (float[b, {SIZE}] x, int64[b] ids) => (float[b, {SIZE}] y) {{ {body} {call} }}"
    model = graph(text, {"m.fc.weight": random(SIZE, SIZE)}, named=False)
    for number, node in enumerate(model.graph.all_nodes()):
        if node.op_type in ("MatMul", "Gather"):
            node.name = f"/m/fc/{node.op_type}_{number}"
    return save(model, folder)


@pytest.mark.parametrize("view", ["Transpose<perm = [1, 0]>", "Identity"])
@pytest.mark.parametrize("body", [LOOP, SCAN])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_weight_that_a_loop_takes_is_refused(kind: str, body: str, view: str, tmp_path: Path) -> None:
    base = _base(tmp_path, body % view, CALL if kind == "linear" else LOOKUP)
    made = linear if kind == "linear" else embedding
    reasons = refusals(base, adapter(made("m.fc", SIZE, SIZE)), tmp_path)
    operator = "Loop" if body is LOOP else "Scan"
    assert f"is also given to {operator} as an input" in reasons["m.fc.weight"]


@pytest.mark.parametrize("write", [merge_onnx, swap_onnx])
@pytest.mark.parametrize("body", [LOOP, SCAN])
def test_the_hint_does_not_ask_for_another_export(write: Any, body: str, tmp_path: Path) -> None:
    """No exporter gives these calls names: merging into the checkpoint is the way."""
    base = _base(tmp_path, body % "Identity", CALL)
    given = adapter(linear("m.fc", SIZE, SIZE))
    more = {"adapter": given, "output": tmp_path / "o.onnx"}
    with pytest.raises(SiteError) as caught:
        merge_onnx(base, given, tmp_path / "o.onnx") if write is merge_onnx else swap_onnx(base, **more)
    assert "lora-export merge" in caught.value.hint
    assert "optimize=False" not in caught.value.hint


def test_a_weight_that_a_loop_only_captures_is_changed_for_all(tmp_path: Path) -> None:
    base, given = _base(tmp_path, CAPTURED, CALL), adapter(linear("m.fc", SIZE, SIZE))
    merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=False)
    x = random(2, SIZE, seed=3)
    ids = np.zeros(2, np.int64)
    weight = random(SIZE, SIZE).astype(np.float64) + delta(next(iter(given.modules.values())))
    h = x.astype(np.float64)
    for _ in range(3):
        h = np.tanh(h @ weight.T)
    (actual,) = run(tmp_path / "m.onnx", x=x, ids=ids)
    assert error(actual, h @ weight.T) < 1e-5
