"""What a bank lets through: each row of the batch its own adapters, wherever the batch's axis is."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from branch_graphs import (
    TOLERANCE,
    banked,
    bind,
    check_bits,
    check_values,
    conv_lora,
    convolve,
    lora,
    magnitude,
    reasons,
    refused,
    run_bank,
    swapped,
    table_lora,
)
from small_graphs import adapter, delta, embedding, graph, random, run, save

from lora_export import AdapterError, GraphError, SiteError, swap_onnx
from lora_export.binding.bind import clear_slot, slot_blocks
from lora_export.graph.exposed import WEIGHTS_INPUT
from lora_export.modes.bank_onnx import bank_onnx

OUT, IN, BATCH = 6, 8, 3
W, BIAS = random(OUT, IN, seed=7), random(OUT, seed=8)
X = random(BATCH, 4, IN, seed=9)
# Rows of `lora.adapter_weights` for two slots: chosen, the base, blended, subtracted.
CHOSEN = [[1, 0], [0, 1], [0, 0]]
BLENDED = [[0.7, 0.3], [-1, 0], [2, -0.5]]
BASE_ROWS = np.zeros((BATCH, 2))
FC = {"a": adapter(lora("fc", OUT, IN, 2)), "b": adapter(lora("fc", OUT, IN, 3, 2))}
FLAT = {"flat": np.array([-1, IN]), "deep": np.array([BATCH, -1, OUT])}


def fc_base(text, folder, stored=None, **more):
    weights = {"fc.weight": np.ascontiguousarray(W.T if stored is None else stored)}
    constants = FLAT | {"fc.bias": BIAS}
    weights |= {n: value for n, value in constants.items() if n.replace(".", "_") in text.partition("{")[2]}
    return save(graph(text, weights | more), folder)


def mixed(weight, given, weights, path, row):
    """Return the effective weight of a row of the batch."""
    total = weight.astype(np.float64)
    for name, share in zip(given, weights[row], strict=True):
        module = given[name].modules.get(f"{path}.weight")
        total = total + (share * delta(module) if module else 0)
    return total


def fc_answer(x, weights, given=FC, bias=0.0):
    rows = [x[row].astype(np.float64) @ mixed(W, given, weights, "fc", row).T + bias for row in range(len(x))]
    return np.stack(rows)


FLATTENED = "f = Reshape (x, flat) z = MatMul (f, fc_weight) y = Reshape (z, deep)"
# id: (graph, x)
LAYOUTS = {
    "2-D": ("g (float[b,8] x) => (float[b,6] y) { y = MatMul (x, fc_weight) }", X[:, 0]),
    "2-D-gemm": ("g (float[b,8] x) => (float[b,6] y) { y = Gemm (x, fc_weight) }", X[:, 0]),
    "2-D-unnamed": ("g (float[?,8] x) => (float[?,6] y) { y = MatMul (x, fc_weight) }", X[:, 0]),
    "3-D": ("g (float[b,s,8] x) => (float[b,s,6] y) { y = MatMul (x, fc_weight) }", X),
    "3-D-unnamed": ("g (float[?,?,8] x) => (float[?,?,6] y) { y = MatMul (x, fc_weight) }", X),
    "4-D": (
        "g (float[b,h,s,8] x) => (float[b,h,s,6] y) { y = MatMul (x, fc_weight) }",
        X.reshape(BATCH, 2, 2, IN),
    ),
    "static": ("g (float[3,4,8] x) => (float[3,4,6] y) { y = MatMul (x, fc_weight) }", X),
    "flattened": (f"g (float[b,s,8] x) => (float[b,s,6] y) {{ {FLATTENED} }}", X),
    "flattened-gemm": (
        f"g (float[b,s,8] x) => (float[b,s,6] y) {{ {FLATTENED.replace('MatMul', 'Gemm')} }}",
        X,
    ),
    "flattened-symbol": (f"g (float[b,s,8] x) => (float[b,s,6] y) <float[b_s,8] f> {{ {FLATTENED} }}", X),
    "flattened-unnamed": (f"g (float[?,?,8] x) => (float[?,?,6] y) <float[?,8] f> {{ {FLATTENED} }}", X),
    "unknown-rank": (
        "g (float[b,s,8] x) => (float[b,s,6] y) { f = Identity (x) y = MatMul (f, fc_weight) }",
        X,
    ),
    "loop": (
        "g (float[b,s,8] x) => (float[b,s,6] y) { n = Constant <value = int64 {1}> () "
        "on = Constant <value = bool {1}> () "
        "last, y0 = Loop (n, on, x) <body = l (int64 i, bool k, float[q,r,8] u) => "
        "(bool k2, float[q,r,8] u2, float[q,r,6] v) "
        "{ k2 = Identity (k) u2 = Identity (u) v = MatMul (u, fc_weight) }> "
        "axis = Constant <value = int64[1] {0}> () y = Squeeze (y0, axis) }",
        X,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_choose_their_adapters(layout, tmp_path):
    """Mixed ranks, one-hot rows, zeros, blends and negative weights; permuted rows, permuted outputs."""
    text, x = LAYOUTS[layout]
    base = fc_base(text, tmp_path)
    out, report = banked(base, FC)
    assert report.exposed.batch_input == "x"
    assert [slot.name for slot in report.exposed.slots] == ["a", "b"]
    check_bits(run(base, x=x), run_bank(out, BASE_ROWS, {"x": x}))
    for weights in (CHOSEN, BLENDED):
        (got,) = run_bank(out, weights, {"x": x})
        check_values([got], [fc_answer(x, weights)], TOLERANCE)
        order = [2, 0, 1]
        check_bits([got[order]], run_bank(out, np.array(weights)[order], {"x": x[order]}))


@pytest.mark.parametrize("layout", ["3-D", "flattened"])
def test_a_row_is_what_a_swap_computes(layout, tmp_path):
    text, x = LAYOUTS[layout]
    base = fc_base(text, tmp_path)
    out, _ = banked(base, FC)
    swap, report = swapped(base, FC["b"])
    (got,) = run_bank(out, CHOSEN, {"x": x})
    tensors = bind(FC["b"], report, base).tensors
    check_values([got[1]], [run(swap, x=x, **tensors)[0][1]], TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_another_number_of_rows_fails(rows, layout, tmp_path):
    """One row would broadcast to the whole batch: nothing may be computed with the wrong rows."""
    text, x = LAYOUTS[layout]
    base = fc_base(text, tmp_path)
    bank_onnx(base, FC, tmp_path / "bank.onnx")
    with pytest.raises(Exception, match=r"lora\.|INVALID_ARGUMENT"):
        run_bank(tmp_path / "bank.onnx", np.ones((rows, 2)), {"x": x})


@pytest.mark.parametrize("slots", [1, 3])
def test_another_number_of_slots_fails(slots, tmp_path):
    text, x = LAYOUTS["3-D"]
    bank_onnx(fc_base(text, tmp_path), FC, tmp_path / "bank.onnx")
    with pytest.raises(Exception, match=WEIGHTS_INPUT):
        run_bank(tmp_path / "bank.onnx", np.ones((BATCH, slots)), {"x": x})


def test_the_bias_stays_behind_the_branch(tmp_path):
    text = "g (float[b,8] x) => (float[b,6] y) { z = Gemm <beta = 0.5> (x, fc_weight, fc_bias) y = Relu (z) }"
    base = fc_base(text, tmp_path)
    out, _ = banked(base, FC)
    check_bits(run(base, x=X[:, 0]), run_bank(out, BASE_ROWS, {"x": X[:, 0]}))
    wanted = np.maximum(fc_answer(X[:, 0], BLENDED, bias=0.5 * BIAS), 0)
    check_values(run_bank(out, BLENDED, {"x": X[:, 0]}), [wanted], TOLERANCE)


def test_float16(tmp_path):
    """The weights stay float32 for whoever feeds them; eps of 11 bits, a few times."""
    text = LAYOUTS["3-D"][0].replace("float[", "float16[")
    base = fc_base(text, tmp_path, W.T.astype(np.float16))
    out, _ = banked(base, FC)
    x = X.astype(np.float16)
    check_bits(run(base, x=x), run_bank(out, BASE_ROWS, {"x": x}))
    got = run_bank(out, BLENDED, {"x": x})
    assert got[0].dtype == np.float16
    check_values(got, [fc_answer(x, BLENDED)], 3e-3)


# --- several modules ---------------------------------------------------------------------------------


def test_an_adapter_without_some_module(tmp_path):
    lines = "z = MatMul (x, fc_weight) u = Tanh (z) y = MatMul (u, up_weight)"
    text = f"g (float[b,s,8] x) => (float[b,s,n] y) {{ {lines} }}"
    up = random(5, OUT, seed=3)
    base = fc_base(text, tmp_path, **{"up.weight": up.T.copy()})
    given = {
        "fc": adapter(lora("fc", OUT, IN, 2)),
        "up": adapter(lora("up", 5, OUT, 1, 3)),
        "both": adapter(lora("fc", OUT, IN, 4, 4), lora("up", 5, OUT, 3, 5)),
    }
    out, report = banked(base, given)
    ranks = {module.name: module.members[0].ranks for module in report.exposed.modules}
    assert ranks == {"fc": (2, 0, 4), "up": (0, 1, 3)}
    for weights in (np.eye(3), [[1, 1, 0], [0, 0, -1], [0.5, 0, 0]]):
        rows = []
        for row in range(BATCH):
            hidden = np.tanh(X[row].astype(np.float64) @ mixed(W, given, weights, "fc", row).T)
            rows.append(hidden @ mixed(up, given, weights, "up", row).T)
        check_values(run_bank(out, weights, {"x": X}), [np.stack(rows)], TOLERANCE)


@pytest.mark.parametrize("pack", [False, True], ids=["single", "pack"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_whole_and_parts_of_a_fused_weight(fused, pack, tmp_path):
    """One adapter has qkv_proj, others q and v, or k: all of them in one bank, beside either layout."""
    spans = {"q": (0, 8), "k": (8, 12), "v": (12, 16)}
    weight = random(16, IN, seed=6)
    if fused:
        text = "g (float[b,s,8] x) => (float[b,s,16] y) { y = MatMul (x, a_qkv_proj_weight) }"
        weights = {"a.qkv_proj.weight": weight.T.copy()}
    else:
        lines = " ".join(f"{name} = MatMul (x, a_{name}_proj_weight)" for name in spans)
        text = f"g (float[b,s,8] x) => (float[b,s,16] y) {{ {lines} y = Concat <axis = -1> (q, k, v) }}"
        weights = {f"a.{name}_proj.weight": weight[slice(*rows)].T.copy() for name, rows in spans.items()}
    base = save(graph(text, weights), tmp_path)
    given = {
        "whole": adapter(lora("a.qkv_proj", 16, IN, 2)),
        "qv": adapter(lora("a.q_proj", 8, IN, 3, 2), lora("a.v_proj", 4, IN, 1, 3)),
        "k": adapter(lora("a.k_proj", 4, IN, 2, 4)),
    }
    out, _ = banked(base, given, pack=pack)
    check_bits(run(base, x=X), run_bank(out, np.zeros((BATCH, 3)), {"x": X}))
    for shares in (np.eye(3), [[1, 1, 1], [0, -1, 0.5], [0.3, 0, 0.7]]):
        rows = []
        for row in range(BATCH):
            full = mixed(weight, given, shares, "a.qkv_proj", row)
            for name, (start, stop) in spans.items():
                zeros = np.zeros((stop - start, IN))
                full[start:stop] += mixed(zeros, given, shares, f"a.{name}_proj", row)
            rows.append(X[row].astype(np.float64) @ full.T)
        check_values(run_bank(out, shares, {"x": X}), [np.stack(rows)], TOLERANCE)


@pytest.mark.parametrize("pack", [False, True], ids=["single", "pack"])
def test_siblings_in_a_bank(pack, tmp_path):
    rows = {"gate": 5, "up": 5}
    weights = {name: random(5, IN, seed=len(name)) for name in rows}
    lines = " ".join(f"{name} = MatMul (x, m_{name}_proj_weight)" for name in rows)
    text = f"g (float[b,s,8] x) => (float[b,s,n] gate, float[b,s,n] up) {{ {lines} }}"
    base = save(graph(text, {f"m.{n}_proj.weight": w.T.copy() for n, w in weights.items()}), tmp_path)
    given = {
        "a": adapter(lora("m.gate_proj", 5, IN, 2), lora("m.up_proj", 5, IN, 3, 2)),
        "b": adapter(lora("m.up_proj", 5, IN, 1, 3)),
    }
    out, report = banked(base, given, pack=pack)
    assert [m.name for m in report.exposed.modules] == (
        ["m.gate_up_proj"] if pack else ["m.gate_proj", "m.up_proj"]
    )
    wanted = [
        np.stack([
            X[row].astype(np.float64) @ mixed(w, given, BLENDED, f"m.{name}_proj", row).T
            for row in range(BATCH)
        ])
        for name, w in weights.items()
    ]  # fmt: skip
    check_values(run_bank(out, BLENDED, {"x": X}), wanted, TOLERANCE)


@pytest.mark.parametrize("pack", [False, True], ids=["single", "pack"])
@pytest.mark.parametrize("changed", ["q", "q v", "q k v", "qkv"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_biases_of_fused_and_split_modules(fused, changed, pack, tmp_path):
    """Each row has its own mixture of the branches' biases, and the other parts none."""
    parts = {"q": (0, 8), "k": (8, 12), "v": (12, 16)}
    spans = parts | {"qkv": (0, 16)}
    weight, own = random(16, IN, seed=6), random(16, seed=5)
    if fused:
        lines = "z = MatMul (x, a_qkv_proj_weight) y = Add (z, a_qkv_proj_bias)"
        weights = {"a.qkv_proj.weight": weight.T.copy(), "a.qkv_proj.bias": own}
    else:
        lines = " ".join(
            f"z{n} = MatMul (x, a_{n}_proj_weight) {n} = Add (z{n}, a_{n}_proj_bias)" for n in parts
        )
        lines += " y = Concat <axis = -1> (q, k, v)"
        weights = {f"a.{n}_proj.weight": weight[slice(*rows)].T.copy() for n, rows in parts.items()}
        weights |= {f"a.{n}_proj.bias": own[slice(*rows)] for n, rows in parts.items()}
    base = save(graph(f"g (float[b,s,8] x) => (float[b,s,16] y) {{ {lines} }}", weights), tmp_path)

    def made(seed, names):
        modules = []
        for number, name in enumerate(names.split()):
            height = spans[name][1] - spans[name][0]
            bias = random(height, seed=seed + 20 + number)
            modules.append(lora(f"a.{name}_proj", height, IN, 2, seed + 9 * number, lora_bias=bias))
        return adapter(*modules)

    given = {"a": made(1, changed), "b": made(2, changed.split()[0])}
    out, _ = banked(base, given, pack=pack)
    check_bits(run(base, x=X), run_bank(out, BASE_ROWS, {"x": X}))
    rows = []
    for row in range(BATCH):
        full, bias = weight.astype(np.float64), own.astype(np.float64)
        for name, span in spans.items():
            key = f"a.{name}_proj"
            full[slice(*span)] = mixed(full[slice(*span)], given, BLENDED, key, row)
            for share, one in zip(BLENDED[row], given.values(), strict=True):
                if module := one.modules.get(f"{key}.weight"):
                    bias[slice(*span)] += share * module.scaling * module.lora_bias.astype(np.float64)
        rows.append(X[row].astype(np.float64) @ full.T + bias)
    check_values(run_bank(out, BLENDED, {"x": X}), [np.stack(rows)], TOLERANCE)


# --- convolutions and embeddings ---------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 2, 2)], ids=["1-D", "2-D", "3-D"])
def test_conv(kernel, groups, tmp_path):
    """The ranks of a grouped convolution belong to groups, and in each to slots."""
    weight, bias = random(6, 4 // groups, *kernel, seed=7), random(6, seed=8)
    x = random(BATCH, 4, *(6, 5, 4)[: len(kernel)], seed=9)
    axes = ",".join("bchwd"[: x.ndim])
    line = f"y = Conv <group = {groups}> (x, c_weight, c_bias)"
    text = f"g (float[{axes}] x) => (float[{axes.upper()}] y) {{ {line} }}"
    base = save(graph(text.replace("[b,c", "[b,4", 1), {"c.weight": weight, "c.bias": bias}), tmp_path)
    given = {
        name: adapter(conv_lora("c", 6, 4, *kernel, rank=rank, seed=rank, groups=groups))
        for name, rank in (("a", 2), ("b", 4))
    }
    out, _ = banked(base, given)
    check_bits(run(base, x=x), run_bank(out, BASE_ROWS, {"x": x}))
    for weights in (CHOSEN, BLENDED):
        wanted = convolve(x, weight, bias, groups=groups)
        for slot, one in enumerate(given.values()):
            module = one.modules["c.weight"]
            change = convolve(convolve(x, module.lora_a), module.lora_b, groups=groups) * module.scaling
            share = np.array(weights, np.float64)[:, slot]
            wanted = wanted + change * share.reshape(-1, *(1 for _ in range(x.ndim - 1)))
        check_values(run_bank(out, weights, {"x": x}), [wanted], TOLERANCE)


@pytest.mark.parametrize(
    ("axes", "ids"),
    [
        ("b", [1, -2, 3]),
        ("?", [1, -2, 3]),
        ("b,s", [[1, 2], [3, -1], [0, 4]]),
        ("?,?", [[1, 2], [3, -1], [0, 4]]),
    ],
    ids=["1-D", "1-D-unnamed", "2-D", "2-D-unnamed"],
)
def test_embedding(axes, ids, tmp_path):
    table, ids = random(7, 5, seed=3), np.array(ids)
    text = f"g (int64[{axes}] ids) => (float[{axes},n] y) {{ y = Gather (e_weight, ids) }}"
    base = save(graph(text, {"e.weight": table}), tmp_path)
    given = {"a": adapter(table_lora("e", 7, 5, 2)), "b": adapter(table_lora("e", 7, 5, 3, 2))}
    out, _ = banked(base, given)
    check_bits(run(base, ids=ids), run_bank(out, BASE_ROWS, {"ids": ids}))
    wanted = np.stack([mixed(table, given, BLENDED, "e", row)[ids[row]] for row in range(BATCH)])
    check_values(run_bank(out, BLENDED, {"ids": ids}), [wanted], TOLERANCE)


def test_an_embedding_of_flattened_ids(tmp_path):
    table, ids = random(7, 5, seed=3), np.array([[1, 2], [3, -1], [0, 4]])
    text = "g (int64[b,s] ids) => (float[t,n] y) { f = Reshape (ids, all) y = Gather (e_weight, f) }"
    base = save(graph(text, {"e.weight": table, "all": np.array([-1])}), tmp_path)
    given = {"a": adapter(table_lora("e", 7, 5, 2)), "b": adapter(table_lora("e", 7, 5, 3, 2))}
    out, _ = banked(base, given)
    wanted = np.concatenate([mixed(table, given, BLENDED, "e", row)[ids[row]] for row in range(BATCH)])
    check_values(run_bank(out, BLENDED, {"ids": ids}), [wanted], TOLERANCE)


# --- which axis is the batch -------------------------------------------------------------------------

SEQUENCE_FIRST = (
    "g (float[{b},{s},8] x) => (float[{b},{s},6] y){info} {{ f = Transpose <perm = [1, 0, 2]> (x) "
    "z = MatMul (f, fc_weight) y = Transpose <perm = [1, 0, 2]> (z) }}"
)


@pytest.mark.parametrize(
    ("text", "axis", "hint"),
    [
        (SEQUENCE_FIRST.format(b="b", s="s", info=" <float[s,b,8] f>"), "s", "swap-onnx"),
        (SEQUENCE_FIRST.format(b="b", s="s", info=""), "s", "swap-onnx"),
        (SEQUENCE_FIRST.format(b="b", s="4", info=" <float[4,b,8] f>"), "4", "swap-onnx"),
        (
            f"g (float[3,4,8] x) => (float[3,4,6] y) <float[12,8] f> {{ {FLATTENED} }}",
            "12",
            "free batch axis",
        ),
        (
            "g (float[b,8] x, float[n,8] z) => (float[n,6] y) { y = MatMul (z, fc_weight) }",
            "n",
            "--batch-input z",
        ),
    ],
    ids=[
        *("sequence-first", "inferred-sequence-first", "static-sequence-first", "static-flattened"),
        "another input",
    ],
)
def test_an_activation_without_the_batch_in_front(text, axis, hint, tmp_path):
    """What is proposed can be done: an input is named only where one has that axis."""
    base = fc_base(text, tmp_path)
    caught = refused(bank_onnx, base, FC)
    assert isinstance(caught, SiteError)
    assert f"fc: the first axis of its activation is {axis}, the batch is" in str(caught)
    assert hint in caught.hint
    if "swap-onnx" in caught.hint:
        swap_onnx(base, tmp_path / "swap.onnx", adapter=next(iter(FC.values())))
    if "--batch-input" in caught.hint:
        bank_onnx(base, FC, tmp_path / "bank.onnx", batch_input="z")
    else:
        assert "--batch-input" not in caught.hint


def test_a_table_of_positions_in_a_bank(tmp_path):
    text = "g (float[B,7,4] x) => (float[B,7,4] y) { z = Gather (wpe_weight, places) y = Add (x, z) }"
    base = save(graph(text, {"wpe.weight": random(7, 4), "places": np.arange(7)[None]}), tmp_path)
    given = {"a": adapter(embedding("wpe", 7, 4))}
    hint = refused(bank_onnx, base, given).hint
    assert "all rows share its result" in hint
    swap_onnx(base, tmp_path / "swap.onnx", adapter=given["a"])


@pytest.mark.parametrize("axes", [{"b": "b", "s": "s"}, {"b": "?", "s": "?"}], ids=["operator", "unnamed"])
def test_sequence_first_of_unknown_shape(axes, tmp_path):
    """Shapes don't tell it, of unnamed axes or behind an operator that inference does not know."""
    text = SEQUENCE_FIRST.format(**axes, info="")
    if axes["b"] == "b":
        text = text.replace("(f, fc", "(e, fc")
        text = text.replace("z =", "e = com.microsoft.QuickGelu <alpha = 1.0> (f) z =")
    caught = refused(bank_onnx, fc_base(text, tmp_path), FC)
    assert "fc: the rows of the batch (of x) lie along axis 1 of its activation" in str(caught)


def test_a_convolution_without_the_batch_in_front(tmp_path):
    text = (
        "g (float[b,t,4,5,5] x) => (float[t,n,h,w] y) <float[t,4,5,5] f> "
        "{ f = Squeeze (x, front) y = Conv (f, c_weight) }"
    )
    base = save(graph(text, {"c.weight": random(6, 4, 3, 3), "front": np.array([0])}), tmp_path)
    caught = refused(bank_onnx, base, {"a": adapter(conv_lora("c", 6, 4, 3, 3))})
    assert "c: the first axis of its activation is t" in str(caught)


def test_frames_of_a_convolution_fail_when_run(tmp_path):
    """Their axis (batch · frames) isn't known when the bank is made; no row gets another's adapter."""
    text = "g (float[b,t,4,5,5] x) => (float[n,c,h,w] y) { f = Reshape (x, frames) y = Conv (f, c_weight) }"
    weights = {"c.weight": random(6, 4, 3, 3), "frames": np.array([-1, 4, 5, 5])}
    base = save(graph(text, weights), tmp_path)
    report = bank_onnx(base, {"a": adapter(conv_lora("c", 6, 4, 3, 3))}, tmp_path / "bank.onnx")
    with pytest.raises(Exception, match=r"c\.lora\.chosen"):
        run_bank(report.outputs["graph"], [[1], [0]], {"x": random(2, 3, 4, 5, 5)})


TWO_INPUTS = (
    "g (float[s,8] shift, float[b,s,8] x) => (float[b,s,6] y) "
    "{ u = Add (x, shift) y = MatMul (u, fc_weight) }"
)


def test_the_batch_input_is_named(tmp_path):
    """The first input's first axis isn't the batch, and the activation's is not the input's."""
    base, shift = fc_base(TWO_INPUTS, tmp_path), random(4, IN, seed=4)
    out, report = banked(base, FC, batch_input="x")
    assert report.exposed.batch_input == "x"
    wanted = fc_answer(X + shift, BLENDED)
    check_values(run_bank(out, BLENDED, {"x": X, "shift": shift}), [wanted], TOLERANCE)
    assert "the batch is s (of shift)" in str(refused(bank_onnx, base, FC))


@pytest.mark.parametrize("first", ["x", "z"])
def test_a_module_that_is_called_on_two_batches(first, tmp_path):
    """A siamese network: with either input as the batch, the other call's rows are none of it."""
    text = (
        "g (float[b,8] x, float[n,8] z) => (float[b,n] y) "
        "{ [p] p = MatMul (x, fc_weight) [q] q = MatMul (z, fc_weight) t = Transpose (q) y = MatMul (p, t) }"
    )
    weights = {"fc.weight": np.ascontiguousarray(W.T)}
    base = save(graph(text, weights, {"p": "fc", "q": "fc"}), tmp_path)
    caught = refused(bank_onnx, base, FC, batch_input=first)
    assert "one name for both axes" in caught.hint
    assert "--batch-input" not in caught.hint


def test_a_batch_input_that_is_none(tmp_path):
    base = fc_base(TWO_INPUTS, tmp_path)
    caught = refused(bank_onnx, base, FC, batch_input="y")
    assert "no input 'y'" in str(caught)
    assert "shift, x" in caught.hint


# --- slots that change while it runs -----------------------------------------------------------------


def with_slot(tensors, blocks):
    """Return a copy of a bank's tensors with blocks written into it."""
    changed = {name: values.copy() for name, values in tensors.items()}
    for block in blocks:
        changed[block.tensor][block.index] = block.values
    return changed


def defaults(path):
    return {
        str(value.name): value.const_value.numpy()
        for value in ir.load(path).graph.inputs
        if value.const_value is not None
    }


def test_resident_inputs_are_replaced(tmp_path):
    """As they are, with a slot changed, with a slot emptied; the others keep their bits."""
    text, x = LAYOUTS["3-D"]
    base = fc_base(text, tmp_path)
    out, report = banked(base, FC, resident="inputs", slot_rank=4)
    assert report.exposed.modules[0].members[0].ranks == (4, 4)
    check_bits(run(base, x=x), run_bank(out, BASE_ROWS, {"x": x}))
    (before,) = run_bank(out, CHOSEN, {"x": x})
    check_values([before], [fc_answer(x, CHOSEN)], TOLERANCE)
    other = adapter(lora("fc", OUT, IN, 1, 9))
    tensors = defaults(out)
    replaced = with_slot(tensors, slot_blocks(other, report.exposed, 1, where="bank").blocks)
    (after,) = run_bank(out, CHOSEN, {"x": x, **replaced})
    check_values([after], [fc_answer(x, CHOSEN, {"a": FC["a"], "b": other})], TOLERANCE)
    check_bits([before[[0, 2]]], [after[[0, 2]]])
    emptied = with_slot(replaced, clear_slot(report.exposed, 1))
    (gone,) = run_bank(out, [[0, 1]] * BATCH, {"x": x, **emptied})
    check_bits(run(base, x=x), [gone])
    back = with_slot(emptied, slot_blocks(FC["b"], report.exposed, 1, where="bank").blocks)
    check_bits([before], run_bank(out, CHOSEN, {"x": x, **back}))
    with pytest.raises(SiteError) as caught:
        slot_blocks(adapter(lora("fc", OUT, IN, 5)), report.exposed, 0, where="bank")
    assert "slot 0 has 4" in reasons(caught.value)["fc.weight"]


def test_slots_of_a_grouped_convolution(tmp_path):
    weight, x = random(6, 2, 3, seed=7), random(BATCH, 4, 9, seed=9)
    text = "g (float[b,4,t] x) => (float[b,n,t2] y) { y = Conv <group = 2> (x, c_weight) }"
    base = save(graph(text, {"c.weight": weight}), tmp_path)

    def made(rank, seed):
        return adapter(conv_lora("c", 6, 4, 3, rank=rank, seed=seed, groups=2))

    given = {"a": made(2, 1), "b": made(4, 2)}
    caught = refused(bank_onnx, base, given, resident="inputs", slot_rank=5)
    assert isinstance(caught, AdapterError)
    assert "multiple of 2" in caught.hint
    out, report = banked(base, given, resident="inputs", slot_rank=6)
    other = made(6, 3)
    tensors = with_slot(defaults(out), slot_blocks(other, report.exposed, 0, where="bank").blocks)
    wanted = convolve(x, weight, groups=2)
    for slot, one in enumerate((other, given["b"])):
        module = one.modules["c.weight"]
        change = convolve(convolve(x, module.lora_a), module.lora_b, groups=2) * module.scaling
        wanted = wanted + change * np.array(BLENDED)[:, slot, None, None]
    check_values(run_bank(out, BLENDED, {"x": x, **tensors}), [wanted], TOLERANCE)


def test_slots_of_a_pack(tmp_path):
    text = "g (float[b,s,8] x) => (float[b,s,16] y) { y = MatMul (x, a_qkv_proj_weight) }"
    weight = random(16, IN, seed=6)
    base = save(graph(text, {"a.qkv_proj.weight": weight.T.copy()}), tmp_path)
    spans = {"q": (0, 8), "v": (12, 16)}

    def made(seed, names="qv"):
        return adapter(*(lora(f"a.{n}_proj", spans[n][1] - spans[n][0], IN, 2, seed + ord(n)) for n in names))

    out, report = banked(base, {"a": made(1), "b": made(2)}, resident="inputs", pack=True, slot_rank=3)
    other = made(3, "v")
    tensors = with_slot(defaults(out), slot_blocks(other, report.exposed, 0, where="bank").blocks)
    given = {"a": other, "b": made(2)}
    rows = []
    for row in range(BATCH):
        full = weight.astype(np.float64)
        for name, (start, stop) in spans.items():
            full[start:stop] = mixed(full[start:stop], given, BLENDED, f"a.{name}_proj", row)
        rows.append(X[row].astype(np.float64) @ full.T)
    check_values(run_bank(out, BLENDED, {"x": X, **tensors}), [np.stack(rows)], TOLERANCE)


def test_tensorrt_takes_plain_inputs_of_one_batch(tmp_path):
    """No default that a TensorRT parser would build in; the batch's own symbol, which TensorRT compares."""
    text, x = LAYOUTS["3-D"]
    out, report = banked(fc_base(text, tmp_path), FC, resident="inputs", flavour="tensorrt")
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    shapes = {port.name: port.shape for port in session.get_inputs()}
    assert set(shapes) == {"x", WEIGHTS_INPUT, *report.exposed.tensor_names()}
    assert shapes[WEIGHTS_INPUT] == ["b", 2]
    assert not session.get_overridable_initializers()
    tensors = {}
    for slot, given in enumerate(FC.values()):
        for block in slot_blocks(given, report.exposed, slot, where="bank").blocks:
            shape = shapes[block.tensor]
            tensors.setdefault(block.tensor, np.zeros(shape, np.float32))[block.index] = block.values
    check_values(run_bank(out, BLENDED, {"x": x, **tensors}), [fc_answer(x, BLENDED)], TOLERANCE)


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_values_that_would_poison_other_rows(factor, value, tmp_path):
    (module,) = FC["b"].modules.values()
    values = getattr(module, factor).copy()
    values[1, 1] = value
    given = {"a": FC["a"], "b": adapter(replace(module, **{factor: values}))}
    caught = refused(bank_onnx, fc_base(LAYOUTS["3-D"][0], tmp_path), given)
    assert isinstance(caught, AdapterError)
    assert any("fc lora_" in problem for problem in caught.problems)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_products_that_overflow_stay_in_their_rows(share, tmp_path):
    """x·A of a slot that a row does not use is multiplied by 0, and infinity times 0 is NaN."""
    text, x = LAYOUTS["3-D"]
    (module,) = FC["b"].modules.values()
    size = np.float32(share * np.finfo(np.float32).max ** 0.5 / np.abs(module.lora_a).max())
    given = {
        "a": FC["a"],
        "b": adapter(replace(module, lora_a=module.lora_a * size, lora_b=module.lora_b / size)),
    }
    base, rows = fc_base(text, tmp_path), [[1, 0], [0, 0], [0, 1]]
    if share > 1:
        caught = refused(bank_onnx, base, given)
        assert "may overflow in rows of other adapters" in caught.problems[0]
        return
    report = bank_onnx(base, given, tmp_path / "bank.onnx")
    x = x * np.float32(1e9)  # larger than any activation
    (got,) = run_bank(report.outputs["graph"], rows, {"x": x})
    check_values([got], [fc_answer(x, rows, given)], TOLERANCE)


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a=b", "a\tb"])
def test_names_of_slots(name, tmp_path):
    caught = refused(bank_onnx, fc_base(LAYOUTS["3-D"][0], tmp_path), {name: FC["a"]})
    assert isinstance(caught, AdapterError)
    assert repr(name) in caught.problems[0]


def test_a_bank_without_adapters(tmp_path):
    assert "a bank needs adapters" in str(refused(bank_onnx, fc_base(LAYOUTS["3-D"][0], tmp_path), {}))


def test_dora_is_refused(tmp_path):
    given = {"a": FC["a"], "d": adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))}
    caught = refused(bank_onnx, fc_base(LAYOUTS["3-D"][0], tmp_path), given)
    assert "DoRA" in reasons(caught)["fc.weight"]
    assert "swap-onnx --dora" in caught.hint


def test_a_rank_above_the_slots(tmp_path):
    caught = refused(bank_onnx, fc_base(LAYOUTS["3-D"][0], tmp_path), FC, resident="inputs", slot_rank=2)
    assert "fc has rank 3, the slots are to have 2" in str(caught)
    assert "--slot-rank 3" in caught.hint


def test_a_module_without_a_place(tmp_path):
    """Of either adapter, whichever comes first."""
    given = {"a": FC["a"], "b": adapter(lora("other", OUT, IN))}
    caught = refused(bank_onnx, fc_base(LAYOUTS["3-D"][0], tmp_path), given)
    assert list(reasons(caught)) == ["other.weight"]


def test_a_bank_of_a_bank(tmp_path):
    base = fc_base(LAYOUTS["3-D"][0], tmp_path)
    for options in ({}, {"resident": "inputs"}):
        out, _ = banked(base, FC, **options)
        caught = refused(bank_onnx, out, FC)
        assert isinstance(caught, GraphError)
        assert "has exposed LoRA already" in str(caught)
