"""Weights found and verified by their values: folded norms, fused operators, wrong checkpoints, ambiguity."""

import contextlib
import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from safetensors.numpy import save_file
from small_graphs import adapter, conv, delta, embedding, error, graph, linear, random, refusals, run, save
from torch import nn

from lora_export import bank_onnx, merge_onnx, swap_onnx
from lora_export.sites.values import content

HEAD = "g (float[B,S,8] x) => (float[B,S,N] y) "
X = random(2, 3, 8, seed=9)


def checkpoint(folder, **weights):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name.replace("__", "."): w for name, w in weights.items()}, folder / "model.safetensors")
    return folder


# --- batch norm folded into a convolution ---------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        with torch.no_grad():
            if kind != "fresh":
                self.bn.running_var.uniform_(0.5, 2)
                self.bn.running_mean.normal_()
                self.bn.weight.uniform_(0.5, 2)
            if kind == "negative":
                self.bn.weight[::2] *= -1
            if kind == "zero":
                self.bn.weight[[0, 3]] = 0
            if kind == "nearly one":
                self.bn.weight[:] = torch.sqrt(self.bn.running_var) * torch.linspace(0.996, 1.004, 6)

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["positive", "negative", "zero", "nearly one", "fresh"])
def test_folded_batch_norm(exporter, kind, dora, tmp_path):
    """The graph holds s·W a channel; merged it must hold s·W', though only W is in the checkpoint."""
    model = Normed(kind).eval()
    image = random(1, 3, 8, 8, seed=9)
    base = tmp_path / "base.onnx"
    options = {"dynamo": True, "verbose": False} if exporter == "dynamo" else {"dynamo": False}
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, (torch.tensor(image),), str(base), input_names=["x"], **options)
    assert [node.op_type for node in ir.load(base).graph] == ["Conv"]
    module = conv("conv", 6, 3, 3, 3)
    if dora:
        module = replace(module, magnitude=np.abs(random(6, seed=6)) + 1)
    assert "give --checkpoint" in refusals(base, adapter(module), tmp_path)["conv.weight"]
    folder = checkpoint(tmp_path / "c", **{k: v.numpy() for k, v in model.state_dict().items()})
    report = merge_onnx(base, adapter(module), tmp_path / "m.onnx", checkpoint=folder)
    assert "rescaled" in report.plan.rows[0].layout
    model = model.double()
    with torch.no_grad():
        changed = model.conv.weight + torch.tensor(delta(module))
        if dora:
            norms = changed.flatten(1).norm(dim=1)
            changed *= (torch.tensor(module.magnitude).double() / norms)[:, None, None, None]
        model.conv.weight.copy_(changed)
        wanted = model(torch.tensor(image).double()).numpy()
    assert error(run(tmp_path / "m.onnx", x=image)[0], wanted) < 2e-6


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("kind", ["fresh", "positive"])
def test_a_bias_that_a_norm_was_folded_into_is_refused(exporter, kind, tmp_path):
    """Even where it is zero before and after: what is added to it would need the norm's factor."""
    model, base = Normed(kind).eval(), tmp_path / "base.onnx"
    nn.init.zeros_(model.conv.bias)
    options = {"dynamo": True, "verbose": False} if exporter == "dynamo" else {"dynamo": False}
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, (torch.tensor(random(1, 3, 8, 8)),), str(base), **options)
    folder = checkpoint(tmp_path / "c", **{k: v.numpy() for k, v in model.state_dict().items()})
    saved = adapter(extras={"conv.bias": random(6)})
    added = adapter(conv("conv", 6, 3, 3, 3, lora_bias=random(6)))
    for given in (saved, added):
        assert "conv.bias" in refusals(base, given, tmp_path)
        assert refusals(base, given, tmp_path, checkpoint=folder).keys() == {"conv.bias"}


def test_a_channel_of_zeros_has_no_known_factor(tmp_path):
    weight = random(6, 3, 3)
    weight[2] = 0
    stored = weight * np.linspace(1, 2, 6, dtype=np.float32)[:, None, None]
    text = "g (float[B,3,H] x) => (float[B,N,L] y) { y = Conv (x, conv_w) }"
    base = save(graph(text, {"conv.w": stored}), tmp_path)
    folder = checkpoint(tmp_path / "c", conv__weight=weight)
    assert refusals(base, adapter(conv("conv", 6, 3, 3)), tmp_path, checkpoint=folder).keys() == {
        "conv.weight"
    }


# --- names gone -----------------------------------------------------------------------------------------

CHAIN = HEAD + "{ h = MatMul (x, c0) y = MatMul (h, c1) }"


def test_found_by_value_alone_in_both_orientations(tmp_path):
    a, b = random(8, 8, seed=1), random(8, 8, seed=2)
    text = HEAD + "{ t = Transpose (c0) h = MatMul (x, t) y = MatMul (h, c1) }"
    base = save(graph(text, {"c0": a, "c1": np.ascontiguousarray(b.T)}), tmp_path)
    one, two = linear("m.a", 8, 8, seed=1), linear("m.b", 8, 8, seed=2)
    folder = checkpoint(tmp_path / "c", m__a__weight=a, m__b__weight=b)
    report = merge_onnx(base, adapter(one, two), tmp_path / "m.onnx", checkpoint=folder)
    assert [row.place for row in report.plan.rows] == ["c0", "c1"]
    wanted = X.astype(np.float64) @ (a + delta(one)).T @ (b + delta(two)).T
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_the_same_values_twice_are_ambiguous(tmp_path):
    a = random(8, 8, seed=1)
    base = save(graph(CHAIN, {"c0": np.ascontiguousarray(a.T), "c1": np.ascontiguousarray(a.T)}), tmp_path)
    folder = checkpoint(tmp_path / "c", a__weight=a, b__weight=a)
    found = refusals(base, adapter(linear("a", 8, 8)), tmp_path, checkpoint=folder)
    assert "ambiguous" in found["a.weight"]
    assert "c0" in found["a.weight"]
    assert "c1" in found["a.weight"]


def test_one_constant_read_twice_without_names_is_ambiguous(tmp_path):
    a = random(8, 8, seed=1)
    text = HEAD + "{ h = MatMul (x, c0) y = MatMul (h, c0) }"
    base = save(graph(text, {"c0": np.ascontiguousarray(a.T)}), tmp_path)
    folder = checkpoint(tmp_path / "c", a__weight=a)
    found = refusals(base, adapter(linear("a", 8, 8)), tmp_path, checkpoint=folder)
    assert "ambiguous" in found["a.weight"]


def test_two_targets_whose_values_are_found_once_are_ambiguous(tmp_path):
    """`b` was pruned, or it is `a` that was: its equal values do not tell."""
    a = random(8, 8, seed=1)
    base = save(graph(HEAD + "{ y = MatMul (x, c0) }", {"c0": np.ascontiguousarray(a.T)}), tmp_path)
    folder = checkpoint(tmp_path / "c", a__weight=a, b__weight=a)
    given = adapter(linear("a", 8, 8, seed=1), linear("b", 8, 8, seed=2))
    assert refusals(base, given, tmp_path, checkpoint=folder).keys() == {"a.weight", "b.weight"}


def test_tied_embedding_without_names(tmp_path):
    table = random(10, 8, seed=1)
    text = "g (int64[N] i) => (float[N,V] y) { t = Transpose (c0) e = Gather (c0, i) y = MatMul (e, t) }"
    base = save(graph(text, {"c0": table}), tmp_path)
    folder = checkpoint(tmp_path / "c", embed__weight=table, lm_head__weight=table)
    head, emb, ids = linear("lm_head", 10, 8), embedding("embed", 10, 8), np.array([3, 0, 9])
    merge_onnx(base, adapter(head), tmp_path / "h.onnx", checkpoint=folder)
    assert error(run(tmp_path / "h.onnx", i=ids)[0], table[ids] @ (table + delta(head)).T) < 2e-6
    merge_onnx(base, adapter(emb), tmp_path / "e.onnx", checkpoint=folder)
    assert error(run(tmp_path / "e.onnx", i=ids)[0], (table + delta(emb))[ids] @ table.T) < 2e-6
    merge_onnx(base, adapter(head, emb), tmp_path / "b.onnx", checkpoint=folder)
    wanted = (table + delta(emb))[ids] @ (table + delta(head)).T
    assert error(run(tmp_path / "b.onnx", i=ids)[0], wanted) < 2e-6


@pytest.mark.parametrize("stored", ["fused", "split"])
def test_rows_of_a_weight_without_names(stored, tmp_path):
    parts = {name: random(8, 8, seed=at) for at, name in enumerate("qkv")}
    modules = [linear(name, 8, 8, seed=10 + at) for at, name in enumerate("qkv")]
    whole = np.vstack(list(parts.values()))
    if stored == "fused":
        base = save(graph(HEAD + "{ y = MatMul (x, c0) }", {"c0": np.ascontiguousarray(whole.T)}), tmp_path)
        folder = checkpoint(tmp_path / "c", **{f"{name}__weight": w for name, w in parts.items()})
        given, change = adapter(*modules), np.vstack([delta(module) for module in modules])
    else:
        text = HEAD + (
            "{ a = MatMul (x, c0) b = MatMul (x, c1) c = MatMul (x, c2) y = Concat <axis = 2> (a, b, c) }"
        )
        weights = {f"c{at}": np.ascontiguousarray(w.T) for at, w in enumerate(parts.values())}
        base = save(graph(text, weights), tmp_path)
        folder = checkpoint(tmp_path / "c", qkv__weight=whole)
        module = linear("qkv", 24, 8)
        given, change = adapter(module), delta(module)
    merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=folder)
    wanted = X.astype(np.float64) @ (whole + change).T
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_equal_parts_of_a_fused_weight_are_ambiguous(tmp_path):
    """The values of k also lie where q's are: the first place found would change q."""
    q, v = random(8, 8, seed=1), random(8, 8, seed=2)
    whole = np.ascontiguousarray(np.vstack([q, q, v]).T)
    base = save(graph(HEAD + "{ y = MatMul (x, c0) }", {"c0": whole}), tmp_path)
    folder = checkpoint(tmp_path / "c", q__weight=q, k__weight=q, v__weight=v)
    found = refusals(base, adapter(linear("k", 8, 8)), tmp_path, checkpoint=folder)
    assert "ambiguous" in found["k.weight"]


# --- names that lie, checkpoints that do not belong -------------------------------------------------------


def test_the_wrong_checkpoint_is_refused(tmp_path):
    a, b = random(8, 8, seed=1), random(8, 8, seed=2)
    text = CHAIN.replace("c0", "a_weight").replace("c1", "b_weight")
    base = save(graph(text, {"a.weight": a, "b.weight": b}), tmp_path)
    folder = checkpoint(tmp_path / "c", a__weight=random(8, 8, seed=3), b__weight=random(8, 8, seed=4))
    given = adapter(linear("a", 8, 8, seed=1), linear("b", 8, 8, seed=2))
    found = refusals(base, given, tmp_path, checkpoint=folder)
    assert found.keys() == {"a.weight", "b.weight"}
    assert all("does not hold the checkpoint's values" in reason for reason in found.values())


def test_a_name_that_lies_is_outvoted_by_the_values(tmp_path):
    a, b = random(8, 8, seed=1), random(8, 8, seed=2)
    text = CHAIN.replace("c0", "b_weight").replace("c1", "a_weight")
    swapped = {"b.weight": np.ascontiguousarray(a.T), "a.weight": np.ascontiguousarray(b.T)}
    base = save(graph(text, swapped, named=False), tmp_path)
    folder, module = checkpoint(tmp_path / "c", a__weight=a, b__weight=b), linear("a", 8, 8)
    report = merge_onnx(base, adapter(module), tmp_path / "m.onnx", checkpoint=folder)
    assert report.plan.rows[0].place == "b.weight"
    wanted = X.astype(np.float64) @ (a + delta(module)).T @ b.T.astype(np.float64)
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_a_checkpoint_without_the_weight_does_not_silence_doubt(tmp_path):
    """The node that reads `fc.weight` is another module's; the checkpoint does not vouch for it."""
    text = HEAD + "{ [n] y = MatMul (x, fc_weight) }"
    base = save(graph(text, {"fc.weight": random(8, 8)}, {"n": "norm"}), tmp_path)
    folder = checkpoint(tmp_path / "c", other__weight=random(8, 8, seed=5))
    found = refusals(base, adapter(linear("fc", 8, 8)), tmp_path, checkpoint=folder)
    assert "read by a node of 'norm'" in found["fc.weight"]


def test_a_name_whose_readers_are_several_modules_is_ambiguous(tmp_path):
    """The exporter kept one of two equal weights, under a name that fits neither reader."""
    text = HEAD + "{ [m] h = MatMul (x, fc_weight) [n] y = MatMul (h, fc_weight) }"
    weight = random(8, 8)
    base = save(graph(text, {"fc.weight": weight}, {"m": "one", "n": "two"}), tmp_path)
    folder = checkpoint(tmp_path / "c", fc__weight=np.ascontiguousarray(weight.T))
    found = refusals(base, adapter(linear("fc", 8, 8)), tmp_path, checkpoint=folder)
    assert "ambiguous" in found["fc.weight"]


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_another_float_type_is_the_same_weight(stored, tmp_path):
    import ml_dtypes

    weight = random(8, 8, seed=1)
    rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    text = HEAD + "{ w = Cast <to = 1> (fc_weight) y = MatMul (x, w) }"
    weights = {"fc.weight": np.ascontiguousarray(rounded.T).astype(stored)}
    base = save(graph(text, weights, named=False), tmp_path)
    folder, module = checkpoint(tmp_path / "c", fc__weight=weight), linear("fc", 8, 8)
    report = merge_onnx(base, adapter(module), tmp_path / "m.onnx", checkpoint=folder)
    assert report.plan.rows[0].reason == "weight name; content agrees"
    wanted = X.astype(np.float64) @ (rounded + delta(module)).T
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < (1e-3 if stored == np.float16 else 2e-6)


# --- com.microsoft.Attention ------------------------------------------------------------------------------


def attention_graph(folder):
    """BERT as onnxruntime.transformers optimises it: q, k and v in one Attention operator."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    model, inputs = tiny.build("bert").eval(), tiny.ARCHITECTURES["bert"].inputs()
    # The optimiser knows the pattern of eager attention.
    model.set_attn_implementation("eager")
    forward, heads, width = model.forward, model.config.num_attention_heads, model.config.hidden_size
    model.forward = lambda *values: forward(**dict(zip(inputs, values, strict=True)))
    plain, path = folder / "plain.onnx", folder / "optimised.onnx"
    options = FusionOptions("bert")
    with tiny.quiet():
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(plain),
            input_names=list(inputs),
            dynamo=False,
            opset_version=17,
        )
        optimised = optimizer.optimize_model(
            str(plain), "bert", heads, width, opt_level=0, optimization_options=options
        )
    optimised.save_model_to_file(str(path))
    return path


@pytest.mark.xdist_group("bert")
def test_attention_operator_of_onnxruntime(tmp_path):
    base = attention_graph(tmp_path)
    operators = [node.op_type for node in ir.load(base).graph]
    given = tiny.adapter("bert")
    report = merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=tiny.checkpoint("bert"))
    assert "Attention" in operators
    rows = [row for row in report.plan.rows if row.operator == "Attention"]
    assert any("rows 0" in row.layout for row in rows)
    got = tiny.run(tmp_path / "m.onnx", tiny.feeds("bert", tmp_path / "m.onnx"))
    assert tiny.relative_error(got, tiny.reference("bert", given)) < 2e-6


def test_attention_by_hand(tmp_path):
    """q‖k‖v as one operand (in, 3·out); one head, so that softmax(q·kᵀ/√d)·v is the oracle."""
    parts = [random(8, 8, seed=at) / 3 for at in range(3)]
    bias = random(24, seed=5)
    text = HEAD + "{ y = com.microsoft.Attention <num_heads = 1> (x, c0, c1) }"
    base = save(graph(text, {"c0": np.ascontiguousarray(np.vstack(parts).T), "c1": bias}), tmp_path)
    names = ("att.q", "att.k", "att.v")
    folder = checkpoint(tmp_path / "c", **{f"{n}.weight": w for n, w in zip(names, parts, strict=True)})
    modules = [linear(name, 8, 8, seed=10 + at) for at, name in enumerate(names)]
    report = merge_onnx(base, adapter(*modules), tmp_path / "m.onnx", checkpoint=folder)
    assert [row.operator for row in report.plan.rows] == ["Attention"] * 3
    x64 = X.astype(np.float64)
    q, k, v = (
        x64 @ (w + delta(m)).T + bias[8 * at : 8 * at + 8]
        for at, (w, m) in enumerate(zip(parts, modules, strict=True))
    )
    scores = np.exp((q @ k.transpose(0, 2, 1)) / np.sqrt(8))
    wanted = scores / scores.sum(-1, keepdims=True) @ v
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6
    # Without the checkpoint there is nothing to find them by.
    assert len(refusals(base, adapter(*modules), tmp_path)) == 3


# --- the comparison itself ----------------------------------------------------------------------------------


def test_compare_tells_the_same_a_scaled_and_another_weight():
    wanted = random(100, 16, seed=1).astype(np.float64)
    assert content.compare(wanted + 1e-4 * random(100, 16, seed=2), wanted).same
    scale = np.linspace(-2, 2, 100)[:, None] + 0.013
    scaled = content.compare(wanted * scale, wanted)
    assert scaled.scaled
    assert not scaled.same
    np.testing.assert_allclose(scaled.row_scale, scale[:, 0], rtol=1e-12)
    other = content.compare(random(100, 16, seed=3).astype(np.float64), wanted)
    assert not other.same
    assert not other.scaled
    zeros = content.compare(np.zeros_like(wanted), wanted)
    assert not zeros.same
    assert not zeros.scaled


def test_compare_reads_every_row():
    """One rescaled row between the sampled ones is 0.4 % of the norm, but that channel's whole delta."""
    wanted = random(1000, 16, seed=1).astype(np.float64)
    picks = np.unique(np.linspace(0, 999, 32).astype(int))
    gap = next(one + 1 for one, two in pairwise(picks) if two - one > 2)
    stored = wanted.copy()
    stored[gap] *= 1.1
    every = content.compare(stored, wanted)
    assert not every.same
    assert every.scaled
    np.testing.assert_allclose(every.row_scale[gap], 1.1)


def test_find_rows_returns_every_place():
    wanted = random(4, 16, seed=1)
    stored = np.vstack([random(3, 16, seed=2), wanted, random(2, 16, seed=3), wanted])
    assert content.find_rows(stored, wanted) == [3, 9]
    assert content.find_rows(random(9, 16, seed=4), wanted) == []
    leading = np.vstack([np.zeros((1, 16), np.float32), wanted])
    assert content.find_rows(np.vstack([random(3, 16, seed=2), leading]), leading) == [3]


@pytest.mark.parametrize("mode", ["merge", "swap", "bank"])
@pytest.mark.parametrize("shape", [(8, 0), (0, 8), (0, 0)])
@pytest.mark.parametrize("reader", ["MatMul (h, z)", "MatMul (z, h)", "Gather (z, i)", "Gemm (h, z)"])
def test_a_constant_without_values_is_nobodys(reader, shape, mode, tmp_path):
    ports = "float[n,8] x, int64[k] i) => (float[n,8] h, float[a,b] y"
    text = f"g ({ports}) {{ h = MatMul (x, q_weight) y = {reader} }}"
    base = save(graph(text, {"q.weight": random(8, 8), "z": np.zeros(shape, np.float32)}), tmp_path)
    given, out = adapter(linear("q", 8, 8)), tmp_path / "out.onnx"
    if mode == "merge":
        merge_onnx(base, given, out)
    elif mode == "swap":
        swap_onnx(base, out, adapter=given)
    else:
        bank_onnx(base, {"one": given}, out)
    assert out.exists()
