"""A module that no output of the graph depends on is refused by name, whatever else gives the answer."""

from functools import partial

import changed_graphs as changed
import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import save_file
from small_graphs import adapter, delta, error, graph, linear, random, refusals, run, save
from torch import nn

from lora_export import (
    AdapterSession,
    GraphError,
    SiteError,
    bank_onnx,
    convert_adapter,
    merge_onnx,
    swap_onnx,
)
from lora_export.graph.reach import Reach

SIZE = 8
X = random(SIZE, SIZE, seed=9)
W = random(SIZE, SIZE, seed=4)
UNUSED = "the graph never uses it"


# How the result of ``q`` is lost: ``z`` does not depend on it.
LOST = {
    "nothing reads it": "z = Identity (x)",
    "only its shape": "s = Shape (d) z = Expand (x, s)",
    "times a zero": "o = Constant <value_float = 0.0> () z = Mul (d, o)",
    "times zeros": "z = Mul (zeros, d)",
    "times computed zeros": "s = Shape (x) o = ConstantOfShape (s) p = Neg (o) z = Mul (p, d)",
    "a matrix of zeros": "z = MatMul (d, zeros)",
    "a matrix of zeros that is turned": "t = Transpose <perm = [1, 0]> (zeros) z = MatMul (d, t)",
    "Gemm of zeros": "z = Gemm (d, zeros, row)",
    "Gemm times no alpha": "z = Gemm <alpha = 0.0> (d, val_1, row)",
    "Gemm times no beta": "z = Gemm <beta = 0.0> (x, val_1, d)",
    "a norm times zeros": "z = LayerNormalization (d, nought, row)",
    "minus itself": "e = Sub (d, d) z = Add (e, x)",
    "never chosen": "z = Where (no, d, x)",
    "the branch that is never run": (
        "z = If (no) "
        "<then_branch = t () => (float[B,8] a) {a = Identity (d)}, "
        "else_branch = e () => (float[B,8] a2) {a2 = Identity (x)}>"
    ),
    "a result of an If that nothing reads": (
        "i = ReduceSum <keepdims = 0> (x) b = Cast <to = 9> (i) u, z = If (b) "
        "<then_branch = t () => (float[B,8] a, float[B,8] k) {a = Identity (d) k = Identity (x)}, "
        "else_branch = e () => (float[B,8] a2, float[B,8] k2) {a2 = Identity (d) k2 = Neg (x)}>"
    ),
    "a state of a Loop that nothing reads": (
        "m = Constant <value_int = 2> () yes = Constant <value_int = 1> () b = Cast <to = 9> (yes) "
        "u, z = Loop (m, b, d, x) <body = l (int64 i, bool c, float[B,8] p, float[B,8] r) => "
        "(bool c2, float[B,8] p2, float[B,8] r2) {c2 = Identity (c) p2 = Neg (p) r2 = Neg (r)}>"
    ),
    "a Loop without an iteration": (
        "m = Constant <value_int = 0> () yes = Constant <value_int = 1> () b = Cast <to = 9> (yes) "
        "z = Loop (m, b, x) <body = l (int64 i, bool c, float[B,8] p) => (bool c2, float[B,8] p2) "
        "{c2 = Identity (c) p2 = Add (p, d)}>"
    ),
}
# How it reaches the output all the same.
USED = {
    "a factor that is not zero throughout": "z = Mul (d, val_2)",
    "what a zero is added to": "z = Add (d, zeros)",
    "a state of a Loop that crosses over": (
        "m = Constant <value_int = 3> () yes = Constant <value_int = 1> () b = Cast <to = 9> (yes) "
        "u, z = Loop (m, b, d, x) <body = l (int64 i, bool c, float[B,8] p, float[B,8] r) => "
        "(bool c2, float[B,8] p2, float[B,8] r2) {c2 = Identity (c) p2 = Neg (p) r2 = Add (r, p)}>"
    ),
    "a branch that may be run": (
        "i = ReduceSum <keepdims = 0> (x) b = Cast <to = 9> (i) z = If (b) "
        "<then_branch = t () => (float[B,8] a) {a = Identity (d)}, "
        "else_branch = e () => (float[B,8] a2) {a2 = Neg (d)}>"
    ),
    "a Scan": (
        "u, v = Scan <num_scan_inputs = 1, body = l (float[8] p, float[8] r) => (float[8] p2, float[8] r2) "
        "{p2 = Add (p, r) r2 = Neg (p)}> (row, d) z = Add (x, u)"
    ),
}


def model_of(lines, q=W, **more):
    """Return a graph whose module ``q`` gives ``d``, while a nameless product has a part in ``y``."""
    late = np.eye(SIZE, dtype=np.float32)
    late[0, 0] = 0
    weights = {"q.weight": q.T.copy(), "val_1": W.T + np.float32(0.5), "val_2": late, **more}
    weights |= {"zeros": np.zeros((SIZE, SIZE), np.float32), "nought": np.zeros(SIZE, np.float32)}
    weights |= {"row": random(SIZE, seed=5), "no": np.array(False)}
    text = f"d = MatMul (x, q_weight) n = MatMul (x, val_1) {lines} y = Add (n, z)"
    return graph(f"g (float[B,8] x) => (float[B,8] y) {{ {text} }}", weights)


class FromZeros(nn.Module):
    """DETR's decoder: its first attention takes its values from zeros."""

    def __init__(self):
        super().__init__()
        self.proj, self.v_proj = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        target = torch.zeros_like(x)
        return torch.softmax(self.proj(x), -1) * self.v_proj(target) + x


class FromZeroState(FromZeros):
    """The first step of a recurrent network."""

    def forward(self, x):
        state = torch.zeros_like(x)
        return torch.tanh(self.proj(x) + self.v_proj(state))


@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", [FromZeros, FromZeroState])
def test_a_module_that_is_called_on_zeros(kind, exporter, tmp_path):
    """Its weight has no effect in PyTorch either; alone it would be an adapter without any."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, SIZE)
    for name, targets in (("both", ("proj", "v_proj")), ("alone", ("v_proj",))):
        (tmp_path / name).mkdir()
        wanted = changed.saved(model, x, tmp_path / name, targets)
        changed.EXPORTERS[exporter](model, x, tmp_path / "g.onnx")
        for mode in changed.MODES:
            got = changed.outcome(
                mode, tmp_path / "g.onnx", tmp_path / name / "adapter", x.numpy(), tmp_path / "out.onnx"
            )
            if name == "both":
                np.testing.assert_allclose(got, wanted, atol=1e-5)
            else:
                assert UNUSED in str(got)
                np.testing.assert_allclose(wanted, model(x).detach().numpy(), atol=1e-6)


def swap(base, given, out):
    swap_onnx(base, out, adapter=given)


def bank(base, given, out):
    bank_onnx(base, {"one": given}, out)


@pytest.mark.parametrize("lines", LOST.values(), ids=LOST)
def test_a_module_that_no_output_depends_on(lines, tmp_path):
    base = save(model_of(lines), tmp_path)
    given = adapter(linear("q", SIZE, SIZE))
    changed = save(model_of(lines, W + delta(given.modules["q.weight"]).astype(np.float32)), tmp_path / "c")
    # Only then it is right to refuse.
    np.testing.assert_array_equal(run(base, x=X)[0], run(changed, x=X)[0])
    (reason,) = refusals(base, given, tmp_path).values()
    assert reason.startswith(UNUSED)
    for make in (swap, bank):
        with pytest.raises(SiteError) as caught:
            make(base, given, tmp_path / "out.onnx")
        assert UNUSED in str(caught.value.problems)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("lines", USED.values(), ids=USED)
def test_a_module_that_reaches_an_output_in_a_roundabout_way(lines, tmp_path):
    base = save(model_of(lines), tmp_path)
    given = adapter(linear("q", SIZE, SIZE))
    merge_onnx(base, given, tmp_path / "m.onnx")
    changed = save(model_of(lines, W + delta(given.modules["q.weight"]).astype(np.float32)), tmp_path / "c")
    wanted = run(changed, x=X)[0]
    assert error(run(base, x=X)[0], wanted) > 1e-2
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 1e-5


@pytest.mark.parametrize("unread", [True, False])
def test_a_function_that_leaves_its_input_unread(unread, tmp_path):
    lines = "{ b = Identity (x2) }" if unread else "{ b = Add (a, x2) }"
    text = (
        "g (float[B,8] x) => (float[B,8] y) { d = MatMul (x, q_weight) y = own.left (d, x) } "
        f'<opset_import: ["" : 20], domain: "own"> left (a, x2) => (b) {lines}'
    )
    head = '<ir_version: 10, opset_import: ["" : 20, "own" : 1]>'
    base = save(graph(text, {"q.weight": W.T.copy()}, head=head), tmp_path)
    given = adapter(linear("q", SIZE, SIZE))
    if unread:
        assert next(iter(refusals(base, given, tmp_path).values())).startswith(UNUSED)
    else:
        merge_onnx(base, given, tmp_path / "m.onnx")
        assert error(run(tmp_path / "m.onnx", x=X)[0], run(base, x=X)[0]) > 1e-2


def test_an_unused_call_beside_one_that_is_used(tmp_path):
    """Both have the module's name, and constants of their own: the one that gives the output changes."""
    text = "g (float[B,8] x) => (float[B,8] y) { d = MatMul (x, old) y = MatMul (x, q_weight) }"
    made = graph(text, {"q.weight": W.T.copy(), "old": W.T + np.float32(1)}, named=False)
    for node, name in zip(made.graph, ("/q/MatMul_1", "/q/MatMul"), strict=True):
        node.name = name
    base, given = save(made, tmp_path), adapter(linear("q", SIZE, SIZE))
    merge_onnx(base, given, tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (W + delta(given.modules["q.weight"])).T
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 1e-5


def test_a_checkpoint_leads_to_the_product_that_is_used(tmp_path):
    """The named product is read by nobody; the nameless one holds the checkpoint's values."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"q.weight": W}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    text = "g (float[B,8] x) => (float[B,8] y) { d = MatMul (x, q_weight) y = MatMul (x, val_1) }"
    base = save(graph(text, {"q.weight": W.T.copy(), "val_1": W.T.copy()}), tmp_path)
    given = adapter(linear("q", SIZE, SIZE))
    merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=folder)
    wanted = X.astype(np.float64) @ (W + delta(given.modules["q.weight"])).T
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 1e-5
    permuted = save(graph(text, {"q.weight": W.T.copy(), "val_1": W.T[:, ::-1].copy()}), tmp_path / "p")
    assert next(iter(refusals(permuted, given, tmp_path, checkpoint=folder).values())).startswith(UNUSED)


@pytest.mark.parametrize("both", [True, False])
def test_zeros_that_the_adapter_changes_as_well(both, tmp_path):
    """A module behind a weight that is zero has an effect where the adapter changes that weight too."""
    text = "g (float[B,8] x) => (float[B,8] y) { d = MatMul (x, q_weight) y = MatMul (d, out_weight) }"
    zeros = np.zeros((SIZE, SIZE), np.float32)
    base = save(graph(text, {"q.weight": W.T.copy(), "out.weight": zeros}), tmp_path)
    modules = [linear("q", SIZE, SIZE), linear("out", SIZE, SIZE, seed=7)]
    if not both:
        assert next(iter(refusals(base, adapter(modules[0]), tmp_path).values())).startswith(UNUSED)
        return
    merge_onnx(base, adapter(*modules), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (W + delta(modules[0])).T @ delta(modules[1]).T
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 1e-5


@pytest.mark.parametrize("name", ["q.lora_A.weight", "q.lora_A.MatMul.weight"])
def test_lora_inputs_that_no_output_depends_on(name, tmp_path):
    """A graph that somebody has changed since, whose product with the adapter is read by nobody."""
    given = adapter(linear("q", SIZE, SIZE))
    base = save(model_of("z = Identity (d)"), tmp_path)
    swap(base, given, tmp_path / "swap.onnx")
    convert_adapter(given, tmp_path / "swap.onnx", tmp_path / "a.onnx_adapter")
    model = ir.load(tmp_path / "swap.onnx")
    node = next(node for node in model.graph if node.op_type == "Identity")
    product = next(node for node in model.graph if node.name == "/q/MatMul")
    node.replace_input_with(0, product.outputs[0])
    if "MatMul" in name:
        model.metadata_props.clear()
        for value in model.graph.inputs:
            if ".lora_" in str(value.name):
                model.graph.initializers.pop(value.name, None)
                value.name = str(value.name).replace(".weight", ".MatMul.weight")
    ir.save(model, tmp_path / "lost.onnx")
    with pytest.raises(SiteError) as caught:
        convert_adapter(given, tmp_path / "lost.onnx", tmp_path / "b.onnx_adapter")
    assert UNUSED in str(caught.value.problems)


# How the three parts of ``d``, q, k and v of eight columns each, are taken apart.
APART = {
    "Split": "q, k, v = Split <axis = -1> (d, sizes)",
    "Split by a counted axis": "q, k, v = Split <axis = 1> (d, sizes)",
    "Split into equal parts": "q, k, v = Split <axis = -1, num_outputs = 3> (d)",
    "a bias, a cast and Split": (
        "b = Add (d, bias) c = Cast <to = 11> (b) e = Cast <to = 1> (c) "
        "q, k, v = Split <axis = -1> (e, sizes)"
    ),
    "Slice": ("q = Slice (d, n0, n8, one) k = Slice (d, n8, n16, one) v = Slice (d, n16, most, one)"),
    "axes and Gather": (
        "r = Reshape (d, three) q = Gather <axis = 1> (r, s0) k = Gather <axis = 1> (r, s1) "
        "v = Gather <axis = 1> (r, s2)"
    ),
    "axes turned and Split": (
        "r = Reshape (d, three) t = Transpose <perm = [1, 0, 2]> (r) "
        "q3, k3, v3 = Split <axis = 0, num_outputs = 3> (t) "
        "q = Squeeze (q3, n0) k = Squeeze (k3, n0) v = Squeeze (v3, n0)"
    ),
    "the rest by Slice": "kv = Slice (d, n8, most, one) q = Slice (d, n0, n8, one) "
    "k, v = Split <axis = -1, num_outputs = 2> (kv)",
}
SIZES = {
    **{f"n{number}": np.array([number]) for number in (0, 8, 16)},
    **{f"s{number}": np.array(number) for number in (0, 1, 2)},
    "most": np.array([2**63 - 1]),
    "one": np.array([1]),
    "sizes": np.array([SIZE] * 3),
    "three": np.array([SIZE, 3, SIZE]),
}


def packed(apart, made_of, weight, **more):
    """Return a graph of a packed weight, whose output is made of the parts and of a nameless product."""
    text = f"d = MatMul (x, packed_weight) n = MatMul (x, val_1) {apart} y = Sum ({made_of}, n)"
    weights = {"packed.weight": weight.T.copy(), "val_1": W.T + np.float32(0.5), **SIZES}
    weights |= {"bias": random(3 * SIZE, seed=5), **more}
    made = graph(f"g (float[8,8] x) => (float[8,8] y) {{ {text} }}", weights)
    made.graph.node(0).inputs[1].name = "qkv_proj.weight"
    made.graph.node(0).name = "/qkv_proj/MatMul"
    return made


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("apart", APART.values(), ids=APART)
def test_a_part_of_a_packed_weight_that_no_output_depends_on(apart, part, tmp_path):
    weight = random(3 * SIZE, SIZE, seed=6)
    names = ["q", "k", "v"]
    base = save(packed(apart, ", ".join(n for n in names if n != names[part]), weight), tmp_path)
    for number, name in enumerate(names):
        given = adapter(linear(f"{name}_proj", SIZE, SIZE))
        changed = weight.copy()
        changed[number * SIZE : (number + 1) * SIZE] += delta(given.modules[f"{name}_proj.weight"])
        wanted = run(save(packed(apart, ", ".join({*names} - {names[part]}), changed), tmp_path / "c"), x=X)[
            0
        ]
        if number == part:
            assert error(wanted, run(base, x=X)[0]) < 1e-6
            (reason,) = refusals(base, given, tmp_path).values()
            assert reason.startswith(UNUSED)
            for make in (swap, bank):
                with pytest.raises(SiteError) as caught:
                    make(base, given, tmp_path / "out.onnx")
                assert UNUSED in str(caught.value.problems)
        else:
            merge_onnx(base, given, tmp_path / "m.onnx", force=True)
            assert error(wanted, run(base, x=X)[0]) > 1e-2
            assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 1e-5


@pytest.mark.parametrize(
    "reader", ["r = ReduceSum <keepdims = 1> (d, one)", "r = Slice (d, n0, most, one, step)"]
)
def test_columns_that_are_read_in_another_way(reader, tmp_path):
    """A part of the product that nothing takes is used all the same, by what reads all of it."""
    weight, step = random(3 * SIZE, SIZE, seed=6), np.array([3])
    base = save(
        packed(f"q, k, v = Split <axis = -1> (d, sizes) {reader}", "k, v, r", weight, step=step), tmp_path
    )
    given = adapter(linear("q_proj", SIZE, SIZE))
    merge_onnx(base, given, tmp_path / "m.onnx")
    weight[:SIZE] += delta(given.modules["q_proj.weight"])
    product = X.astype(np.float64) @ weight.T
    more = product.sum(1, keepdims=True) if "Reduce" in reader else product[:, ::3]
    wanted = product[:, SIZE : 2 * SIZE] + product[:, 2 * SIZE :] + more + X @ (W + np.float32(0.5)).T
    assert error(run(base, x=X)[0], wanted) > 1e-2
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 1e-5


@pytest.mark.parametrize("mode", ["swap", "bank", "bank of constants"])
def test_a_session_of_a_graph_that_has_lost_a_module(mode, tmp_path):
    """Somebody has changed the graph since: no output depends on the adapter's product."""
    given = adapter(linear("q", SIZE, SIZE))
    base = save(model_of("z = Identity (d)"), tmp_path)
    made = tmp_path / "made.onnx"
    if mode == "swap":
        swap_onnx(base, made, adapter=given)
    else:
        bank_onnx(base, {"one": given}, made, resident="inputs" if mode == "bank" else "initializers")
    model = ir.load(made)
    node = next(node for node in model.graph if node.op_type == "Identity")
    node.replace_input_with(0, next(node for node in model.graph if node.name == "/q/MatMul").outputs[0])
    ir.save(model, tmp_path / "lost.onnx")
    if mode == "swap":
        session = AdapterSession(tmp_path / "lost.onnx")
        with pytest.raises(SiteError) as caught:
            session.load_adapter("one", given)
        assert UNUSED in str(caught.value.problems)
        AdapterSession(made).load_adapter("one", given)
    else:
        with pytest.raises(GraphError) as lost:
            AdapterSession(tmp_path / "lost.onnx")
        assert "no output depends on 1 modules" in str(lost.value)
        assert AdapterSession(made).adapters == ["one"]


def test_each_node_is_walked_once():
    """Every value of a ladder is read twice: a walk along all ways would not end."""
    steps = " ".join(f"v{n + 1} = Add (v{n}, v{n})" for n in range(60))
    model = graph(f"g (float[B,8] x) => (float[B,8] y) {{ v0 = Identity (x) {steps} y = Neg (v60) }}", {})
    reach = Reach(model.graph)
    assert all(reach.reads(node, 0) for node in model.graph)


LIMIT, WIDE, PACKED, BEHIND = 1 << 12, 4000, 60, 100
# How a layer cuts all columns but its last ones and all but its first, and how many these are in each layer.
CUTS = {
    "Slice": ("a{0} = Slice (v{0}, n0, e{0}, last) b{0} = Slice (v{0}, s{0}, most, last)", [1] * 60),
    "Split": (
        "a{0}, c{0} = Split <axis = -1> (v{0}, m{0}) d{0}, b{0} = Split <axis = -1> (v{0}, l{0})",
        [1] * 60,
    ),
    "ever more": (
        "a{0} = Slice (v{0}, n0, e{0}, last) b{0} = Slice (v{0}, s{0}, most, last)",
        [2**n for n in range(11)],
    ),
}


def shifted(cut, shifts):
    """Return a graph of a packed product whose columns meet others layer by layer, and a module."""
    size = 3 * WIDE
    weights = {"qkv_proj.weight": random(SIZE, size, seed=6), **SIZES, "last": np.array([-1])}
    layers = ""
    for number, shift in enumerate(shifts):
        size -= shift
        weights |= {f"m{number}": np.array([size, shift]), f"l{number}": np.array([shift, size])}
        weights |= {f"s{number}": np.array([shift]), f"e{number}": np.array([-shift])}
        layers += f"{cut.format(number)} v{number + 1} = Add (a{number}, b{number}) "
    weights["end"] = np.array([size - 1])
    text = f"v0 = MatMul (x, qkv_proj_weight) {layers} y = Gather <axis = -1> (v{len(shifts)}, end)"
    return graph(f"g (float[8,8] x) => (float y) {{ {text} }}", weights), [linear("k_proj", WIDE, SIZE)]


def long_way():
    """Return a graph of many packed products that go through one long way, and their modules."""
    count = range(PACKED)
    weights = {f"layers.{n}.qkv_proj.weight": random(SIZE, 3 * SIZE, seed=n) for n in count}
    products = " ".join(f"d{n} = MatMul (x, layers_{n}_qkv_proj_weight)" for n in count)
    way = " ".join(f"v{n + 1} = Neg (v{n})" for n in range(BEHIND))
    text = f"{products} v0 = Sum ({', '.join(f'd{n}' for n in count)}) {way}"
    text += f" y = Gather <axis = -1> (v{BEHIND}, n16)"
    made = graph(f"g (float[8,8] x) => (float y) {{ {text} }}", {**weights, **SIZES})
    return made, [linear(f"layers.{n}.q_proj", SIZE, SIZE) for n in count]


@pytest.mark.parametrize(
    "make", [*(partial(shifted, *cut) for cut in CUTS.values()), long_way], ids=[*CUTS, "a long way"]
)
def test_following_columns_has_a_limit(make, tmp_path, monkeypatch):
    """A graph of some kilobytes cuts a product into millions of pieces; the rest counts as used."""
    count, reads = 0, Reach.reads

    def counted(self, node, index):
        nonlocal count
        count += 1
        return reads(self, node, index)

    monkeypatch.setattr(Reach, "reads", counted)
    monkeypatch.setattr("lora_export.sites.doubts.unused.MAX_FOLLOWED", LIMIT)
    model, modules = make()
    base = save(model, tmp_path)
    merge_onnx(base, adapter(*modules), tmp_path / "m.onnx", allow_unmatched=True)
    assert (tmp_path / "m.onnx").exists()
    assert count < LIMIT
