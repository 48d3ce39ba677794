"""An adapter's paths and a graph's: prefixes, ambiguity, renamed, fused, split and flattened modules."""

import contextlib
import io
import time

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from safetensors.numpy import save_file
from small_graphs import adapter, delta, error, graph, linear, random, refusals, run, save
from torch import nn

from lora_export import SiteError, load_adapter, merge_onnx

HEAD = "g (float[B,S,8] x) => (float[B,S,N] y) "
X = random(2, 3, 8, seed=9)


def weights(*names, out_dim=8):
    return {name: random(8, out_dim, seed=at) for at, name in enumerate(names)}


def chain(names):
    """Return the text of x times each weight in turn."""
    lines, last = [], "x"
    for at, name in enumerate(names):
        now = "y" if at == len(names) - 1 else f"h{at}"
        lines.append(f"{now} = MatMul ({last}, {name.replace('.', '_')})")
        last = now
    return HEAD + "{ " + " ".join(lines) + " }"


def product(stored, changes):
    result = X.astype(np.float64)
    for name, values in stored.items():
        result = result @ (values + changes.get(name, np.zeros((8, 8))).T)
    return result


@pytest.mark.parametrize(
    ("in_graph", "in_adapter"),
    [
        ("layers.0.q", "layers.0.q"),
        ("model.layers.0.q", "layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
        ("wrapper.net.model.layers.0.q", "model.layers.0.q"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("m.model.layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("_orig_mod.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("model.layers.0._checkpoint_wrapped_module.q_proj", "model.layers.0.q_proj"),
    ],
)
def test_prefixes_and_renamed_modules(in_graph, in_adapter, tmp_path):
    other = in_graph.replace("0", "1")
    stored = weights(f"{in_graph}.weight", f"{other}.weight")
    base = save(graph(chain(stored), stored), tmp_path)
    one, two = linear(in_adapter, 8, 8, seed=1), linear(in_adapter.replace("0", "1"), 8, 8, seed=2)
    merge_onnx(base, adapter(one, two), tmp_path / "m.onnx")
    wanted = product(stored, {f"{in_graph}.weight": delta(one), f"{other}.weight": delta(two)})
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_a_path_that_fits_two_submodels_is_ambiguous(tmp_path):
    stored = weights(*(f"{part}.layers.{n}.q.weight" for part in ("encoder", "decoder") for n in (0, 1)))
    base = save(graph(chain(stored), stored), tmp_path)
    found = refusals(base, adapter(linear("layers.0.q", 8, 8), linear("layers.1.q", 8, 8)), tmp_path)
    assert found.keys() == {"layers.0.q.weight", "layers.1.q.weight"}
    assert all("encoder" in reason and "decoder" in reason for reason in found.values())
    # With the whole path it is not.
    module = linear("decoder.layers.1.q", 8, 8)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = product(stored, {"decoder.layers.1.q.weight": delta(module)})
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_the_path_itself_wins_over_a_longer_one(tmp_path):
    stored = weights("layers.0.q.weight", "draft.layers.0.q.weight")
    base, module = save(graph(chain(stored), stored), tmp_path), linear("layers.0.q", 8, 8)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = product(stored, {"layers.0.q.weight": delta(module)})
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_another_architecture(tmp_path):
    stored = weights("bert.encoder.layer.0.attention.self.query.weight")
    base = save(graph(chain(stored), stored), tmp_path)
    given = adapter(*(linear(f"model.layers.{n}.self_attn.q_proj", 8, 8) for n in range(3)))
    assert len(refusals(base, given, tmp_path)) == 3
    with pytest.raises(SiteError, match="made for another model"):
        merge_onnx(base, given, tmp_path / "m.onnx", allow_unmatched=True)


# --- fused and split ------------------------------------------------------------------------------------

ROWS = {"q_proj": (0, 8), "k_proj": (8, 12), "v_proj": (12, 16), "gate_proj": (0, 8), "up_proj": (8, 16)}


def fused(tmp_path, name, heads=None):
    """A fused weight (8, 16) under a builder's name; with heads, an attention that says how it is cut."""
    values = random(8, 16, seed=7)
    key = f"model.layers.0.attn.{name}.MatMul.weight"
    text = HEAD + f"{{ y = MatMul (x, {key.replace('.', '_')}) }}"
    if heads is not None:
        text = text.replace("y = ", "h = ").replace(
            " }",
            f" q, k, v = Split <axis = 2> (h, sizes) y, pk, pv = com.microsoft.GroupQueryAttention "
            f"<num_heads = {heads[0]}, kv_num_heads = {heads[1]}> (q, k, v, , , lens, total) }}",
        )
        more = {"sizes": np.array([8, 4, 4]), "lens": np.int32([2, 2]), "total": np.int32(3)}
        return save(graph(text, {key: values, **more}), tmp_path), values
    return save(graph(text, {key: values}), tmp_path), values


@pytest.mark.parametrize(
    "parts",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("k_proj",),
        ("v_proj", "q_proj"),
        ("gate_proj", "up_proj"),
        ("up_proj",),
    ],
    ids="-".join,
)
def test_parts_of_a_fused_weight(parts, tmp_path):
    base, values = fused(tmp_path, "gate_up_proj" if "up_proj" in parts else "qkv_proj")
    change, modules = np.zeros((16, 8)), []
    for at, part in enumerate(parts):
        start, stop = ROWS[part]
        modules.append(linear(f"model.layers.0.self_attn.{part}", stop - start, 8, seed=at))
        change[start:stop] = delta(modules[-1])
    merge_onnx(base, adapter(*modules), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (values + change.T)
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


@pytest.mark.parametrize(("part", "rows"), [("q_proj", 6), ("k_proj", 3), ("v_proj", 8), ("q_proj", 16)])
def test_a_part_that_no_division_into_heads_explains(part, rows, tmp_path):
    base, _ = fused(tmp_path, "qkv_proj")
    module = linear(f"model.layers.0.self_attn.{part}", rows, 8)
    (reason,) = refusals(base, adapter(module), tmp_path).values()
    assert "shapes differ" in reason


@pytest.mark.parametrize(("rows", "fits"), [(4, True), (2, False)])
def test_the_graphs_own_head_counts_decide(rows, fits, tmp_path):
    """Only k in the adapter: 2 rows could be a model with more query heads; the attention says it is not."""
    base, _ = fused(tmp_path, "qkv_proj", heads=(2, 1))
    given = adapter(linear("model.layers.0.self_attn.k_proj", rows, 8))
    if fits:
        report = merge_onnx(base, given, tmp_path / "m.onnx")
        assert "rows 0–4 at 8" in report.plan.rows[0].layout
    else:
        assert "shapes differ" in next(iter(refusals(base, given, tmp_path).values()))


@pytest.mark.parametrize("verified", [False, True], ids=["by-name", "verified"])
def test_a_bias_of_a_fused_weight(verified, tmp_path):
    key, bias = "model.layers.0.attn.qkv_proj.Add.bias", random(16, seed=6)
    stored = {"model.layers.0.attn.qkv_proj.MatMul.weight": random(8, 16, seed=7), key: bias}
    first, second = (name.replace(".", "_") for name in stored)
    text = HEAD + f"{{ h = MatMul (x, {first}) y = Add (h, {second}) }}"
    base = save(graph(text, stored), tmp_path)
    module = linear("model.layers.0.self_attn.v_proj", 4, 8, lora_bias=random(4, seed=4))
    options = {}
    if verified:
        rows = {"q": (0, 8), "k": (8, 12), "v": (12, 16)}
        values = {f"model.layers.0.self_attn.{n}_proj.bias": bias[a:b].copy() for n, (a, b) in rows.items()}
        save_file(values, tmp_path / "model.safetensors")
        options = {"checkpoint": tmp_path}
    report = merge_onnx(base, adapter(module), tmp_path / "m.onnx", **options)
    assert ("content agrees" in report.plan.rows[1].reason) == verified
    change = np.zeros((16, 8))
    change[12:] = delta(module)
    wanted = X.astype(np.float64) @ (next(iter(stored.values())) + change.T) + bias
    wanted[..., 12:] += 1.5 * module.lora_bias
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_a_split_weight(tmp_path):
    """Phi-3's qkv_proj and gate_up_proj, which builders cut into their parts."""
    sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    stored = {f"m.attn.{n}.MatMul.weight": random(8, rows, seed=rows) for n, rows in sizes.items()}
    names = [name.replace(".", "_") for name in stored]
    text = HEAD + "{ " + " ".join(f"h{at} = MatMul (x, {name})" for at, name in enumerate(names))
    base = save(graph(text + " y = Concat <axis = 2> (h0, h1, h2) }", stored), tmp_path)
    module = linear("m.self_attn.qkv_proj", 16, 8)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (np.hstack(list(stored.values())) + delta(module).T)
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6
    # The checkpoint holds it whole; each part is compared with its rows.
    save_file(
        {"m.self_attn.qkv_proj.weight": np.hstack(list(stored.values())).T.copy()},
        tmp_path / "model.safetensors",
    )
    report = merge_onnx(base, adapter(module), tmp_path / "v.onnx", checkpoint=tmp_path)
    assert "content agrees" in report.plan.rows[0].reason
    assert error(run(tmp_path / "v.onnx", x=X)[0], wanted) < 2e-6
    reason = refusals(base, adapter(linear("m.self_attn.qkv_proj", 20, 8)), tmp_path)
    assert "shapes differ" in reason["m.self_attn.qkv_proj.weight"]


# --- flattened paths --------------------------------------------------------------------------------------


def test_flattened_paths(tmp_path):
    stored = weights("unet.down_blocks.0.attn.to_q.weight", "unet.down_blocks.0.cross_attn.to_q.weight")
    base = save(graph(chain(stored), stored), tmp_path)
    module = linear("down_blocks_0_attn_to_q", 8, 8)
    merge_onnx(base, adapter(module, flattened=True), tmp_path / "m.onnx")
    wanted = product(stored, {"unet.down_blocks.0.attn.to_q.weight": delta(module)})
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


@pytest.mark.parametrize("paths", [("a.b_c", "a_b.c"), ("one.a.b_c", "two.a.b.c")], ids=["dots", "prefixes"])
def test_flattened_paths_that_fit_twice(paths, tmp_path):
    text = HEAD + "{ [m] h = MatMul (x, c0) [n] y = MatMul (h, c1) }"
    base = save(graph(text, weights("c0", "c1"), dict(zip("mn", paths, strict=True))), tmp_path)
    (reason,) = refusals(base, adapter(linear("a_b_c", 8, 8), flattened=True), tmp_path).values()
    assert reason.startswith("ambiguous")
    assert all(path in reason for path in paths)


def test_a_flattened_path_does_not_begin_inside_a_name(tmp_path):
    stored = weights("unet.cross_attn.to_q.weight")
    base = save(graph(chain(stored), stored), tmp_path)
    (reason,) = refusals(base, adapter(linear("attn_to_q", 8, 8), flattened=True), tmp_path).values()
    assert reason.startswith("not found")


# --- builders' and exporters' own files ---------------------------------------------------------------------


@pytest.mark.xdist_group("llama")
def test_int4_from_onnxruntime_genai_is_refused_for_every_module(tmp_path):
    from onnxruntime_genai.models import builder

    source, out = str(tiny.checkpoint("llama")), str(tmp_path / "int4")
    with tiny.quiet():
        options = builder.parse_extra_options(None, source, out, "int4", "cpu", str(tmp_path), [])
        builder.create_model(None, source, out, "int4", "cpu", str(tmp_path), **options)
    (base,) = (tmp_path / "int4").glob("*.onnx")
    operators = {node.op_type for node in ir.load(base).graph}
    given = load_adapter(tiny.adapter("llama"))
    found = refusals(base, given, tmp_path)
    assert len(found) == len(given.modules)
    assert "MatMulNBits" in operators
    assert all("quantised weight (MatMulNBits)" in reason for reason in found.values()), found
    assert all("can't be merged into" in reason for reason in found.values())


class Sequence(nn.Module):
    """Names that exporters write in ways of their own: `/seq/seq.0/`, members of a list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seq = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.list = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        x = self.seq(x)
        for layer in self.list:
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo_noopt", "torchscript"])
def test_names_of_containers(exporter, tmp_path):
    model, base = Sequence().eval(), tmp_path / "base.onnx"
    options = {"dynamo": False} if exporter == "torchscript" else {"dynamo": True, "verbose": False}
    if exporter == "dynamo_noopt":
        options["optimize"] = False
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, (torch.tensor(X),), str(base), input_names=["x"], **options)
    modules = [
        linear(path, 8, 8, seed=at, lora_bias=random(8, seed=30 + at))
        for at, path in enumerate(("seq.0", "seq.2.0", "list.0", "list.1"))
    ]
    merge_onnx(base, adapter(*modules), tmp_path / "m.onnx")
    model = model.double()
    with torch.no_grad():
        for module in modules:
            layer = model.get_submodule(module.path)
            layer.weight += torch.tensor(delta(module))
            layer.bias += 1.5 * torch.tensor(module.lora_bias)
        wanted = model(torch.tensor(X).double()).numpy()
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


@pytest.mark.parametrize("place", ["node", "constant"])
@pytest.mark.parametrize("part", ["/Fusion", "_Q4", "_W_", "MatMulBn"])
def test_a_long_name_is_read_in_time_that_grows_as_it_does(part, place, tmp_path):
    name, end = f"MatMul{part * 20_000}", "" if part in ("_W_", "MatMulBn") else "!"
    made = graph(
        "g (float[B,8] x) => (float[B,8] y) { h = MatMul (x, q_weight) y = MatMul (h, other) }",
        {"q.weight": random(8, 8), "other": random(8, 8, seed=1)},
    )
    node = made.graph.node(1)
    (node if place == "node" else node.inputs[1]).name = name + end
    base, given, began = save(made, tmp_path), adapter(linear("q", 8, 8)), time.process_time()
    merge_onnx(base, given, tmp_path / "m.onnx")
    assert time.process_time() - began < 10
