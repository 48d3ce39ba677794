"""The order of a pack's parts: the graph's nodes may contradict its name. float64 is the oracle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from small_graphs import adapter, delta, error, graph, linear, random, refusals, run, save

from lora_export import SiteError, merge_onnx, swap_onnx

DIM = 6
CUTS = {
    "split": "a, b = Split<axis = -1, num_outputs = 2>(p)",
    "slices": """
        zero = Constant<value = int64[1] {0}>()
        half = Constant<value = int64[1] {6}>()
        end = Constant<value = int64[1] {12}>()
        last = Constant<value = int64[1] {-1}>()
        a = Slice(p, zero, half, last)
        b = Slice(p, half, end, last)
    """,
    "axes": """
        shape = Constant<value = int64[4] {0, 0, 2, 6}>()
        q = Reshape(p, shape)
        first = Constant<value = int64 {0}>()
        second = Constant<value = int64 {1}>()
        a = Gather<axis = 2>(q, first)
        b = Gather<axis = 2>(q, second)
    """,
    "woven": """
        shape = Constant<value = int64[4] {0, 0, -1, 2}>()
        q = Reshape(p, shape)
        c, d = Split<axis = -1, num_outputs = 2>(q)
        last = Constant<value = int64[1] {-1}>()
        a = Squeeze(c, last)
        b = Squeeze(d, last)
    """,
}
GATES = {
    "silu": "s = Sigmoid({0})\n t = Mul({0}, s)\n y = Mul(t, {1})",
    "relu": "t = Relu({0})\n y = Mul({1}, t)",
    "gelu": """
        r = Constant<value = float {{1.4142135}}>()
        g = Div({0}, r)
        e = Erf(g)
        t = Mul({0}, e)
        y = Mul(t, {1})
    """,
}


def _gate(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    return x * np.vectorize(math.erf)(x / 1.4142135)


def _base(folder: Path, cut: str, gate: str, order: str) -> tuple[Path, np.ndarray]:
    weight = random(2 * DIM, DIM, seed=3)
    nodes = GATES[gate].format(*order)
    text = f"""g (float[b, s, {DIM}] x) => (float[b, s, {DIM}] y) {{
        t0 = Transpose<perm = [1, 0]>(mlp_gate_up_proj_weight)
        p = MatMul(x, t0)
        {CUTS[cut]}
        {nodes}
    }}"""
    return save(graph(text, {"mlp.gate_up_proj.weight": weight}), folder), weight


@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_halves(cut: str, gate: str, order: str, part: str, tmp_path: Path) -> None:
    base, weight = _base(tmp_path, cut, gate, order)
    given = adapter(linear(f"mlp.{part}", DIM, DIM))
    if cut == "woven" or order == "ba":
        reasons = refusals(base, given, tmp_path, checkpoint=False)
        assert "is not cut in the order of its name" in reasons[f"mlp.{part}.weight"]
        with pytest.raises(SiteError, match="is not cut in the order"):
            swap_onnx(base, tmp_path / "s.onnx", adapter=given, checkpoint=False)
        return
    merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=False)
    changed = weight.astype(np.float64)
    start = 0 if part == "gate_proj" else DIM
    changed[start : start + DIM] += delta(next(iter(given.modules.values())))
    x = random(2, 3, DIM, seed=5)
    a, b = np.split(x @ changed.T, 2, -1)
    (actual,) = run(tmp_path / "m.onnx", x=x)
    assert error(actual, _gate(gate, a) * b) < 1e-5
