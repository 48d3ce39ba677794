"""Branches beside each operator, in small graphs: ONNX Runtime against numpy and torch in float64."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from branch_graphs import (
    TOLERANCE,
    bind,
    check_bits,
    check_swap,
    check_values,
    conv_lora,
    convolve,
    effective,
    lora,
    magnitude,
    reasons,
    refuse_swap,
    swapped,
    table_lora,
    unoptimised,
)
from safetensors.numpy import save_file
from small_graphs import HEAD, adapter, error, graph, random, run, save

from lora_export import AdapterError, GraphError, SiteError, merge_onnx
from lora_export.graph.exposed import exposed_of
from lora_export.modes.swap_onnx import swap_onnx

OUT, IN = 24, 40
W, BIAS = random(OUT, IN, seed=7), random(OUT, seed=8)
X1, X2, X3, X4 = (random(*shape, IN, seed=9) for shape in ((), (5,), (2, 3), (2, 2, 3)))
R = random(2, 3, OUT, seed=10)
CONTRIB = "com.microsoft."
RANKS = (1, 5)


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return torch.nn.functional.gelu(torch.tensor(x)).numpy()


def sizes(x):
    return ",".join(map(str, x.shape))


def one(text, x, out="float[a,b,n] y"):
    """A graph of one input and one output."""
    return f"g (float[{','.join('abcd'[: x.ndim - 1] + 'k')}] x) => ({out}) {{ {text} }}"


def gemm(attributes="transB = 1", more="", c=", fc_bias"):
    product = "y" if not more else "z"
    return one(f"{product} = Gemm <{attributes}> (x, fc_weight{c}) {more}", X2, "float[m,n] y")


# id: (graph, how the canonical (out, in) weight is stored, x, what it computes from it in float64)
T = np.transpose
LINEAR = {
    "vector": (
        "g (float[40] x) => (float[24] y) { y = MatMul (x, fc_weight) }",
        T,
        X1,
        lambda x, w, b: x @ w.T,
    ),
    "2-D": (one("y = MatMul (x, fc_weight)", X2, "float[a,n] y"), T, X2, lambda x, w, b: x @ w.T),
    "3-D": (one("y = MatMul (x, fc_weight)", X3), T, X3, lambda x, w, b: x @ w.T),
    "4-D": (one("y = MatMul (x, fc_weight)", X4, "float[a,b,c,n] y"), T, X4, lambda x, w, b: x @ w.T),
    "static": (
        f"g (float[{sizes(X3)}] x) => (float[2,3,24] y) {{ z = MatMul (x, fc_weight) y = Add (z, fc_bias) }}",
        T,
        X3,
        lambda x, w, b: x @ w.T + b,
    ),
    "transpose": (
        one("t = Transpose <perm = [1, 0]> (fc_weight) y = MatMul (x, t)", X3),
        np.asarray,
        X3,
        lambda x, w, b: x @ w.T,
    ),
    "cast": (
        one("t = Cast <to = 1> (fc_weight) y = MatMul (x, t)", X3),
        lambda w: w.T.astype(np.float16),
        X3,
        lambda x, w, b: x @ w.T,
    ),
    "cast-transpose": (
        one("c = Cast <to = 1> (fc_weight) t = Transpose <perm = [1, 0]> (c) y = MatMul (x, t)", X3),
        lambda w: w.astype(np.float16),
        X3,
        lambda x, w, b: x @ w.T,
    ),
    "bias": (
        one("z = MatMul (x, fc_weight) y = Add (z, fc_bias)", X3),
        T,
        X3,
        lambda x, w, b: x @ w.T + b,
    ),
    "bias-first": (
        one("z = MatMul (x, fc_weight) y = Add (fc_bias, z)", X2, "float[a,n] y"),
        T,
        X2,
        lambda x, w, b: x @ w.T + b,
    ),
    "bias-gelu": (
        one("z = MatMul (x, fc_weight) u = Add (z, fc_bias) y = Gelu (u)", X3),
        T,
        X3,
        lambda x, w, b: gelu(x @ w.T + b),
    ),
    "scale-softmax": (
        one(
            "z = MatMul (x, fc_weight) s = Constant <value_float = 0.3> () u = Mul (z, s) "
            "y = Softmax <axis = -1> (u)",
            X3,
        ),
        T,
        X3,
        lambda x, w, b: torch.softmax(torch.tensor(0.3 * (x @ w.T)), -1).numpy(),
    ),
    "fused-matmul": (
        one(f"y = {CONTRIB}FusedMatMul <transB = 1, alpha = 0.5> (x, fc_weight)", X3),
        np.asarray,
        X3,
        lambda x, w, b: 0.5 * (x @ w.T),
    ),
    "fused-matmul-straight": (
        one(f"y = {CONTRIB}FusedMatMul <alpha = -1.75> (x, fc_weight)", X3),
        T,
        X3,
        lambda x, w, b: -1.75 * (x @ w.T),
    ),
    "gemm": (gemm("transB = 0"), T, X2, lambda x, w, b: x @ w.T + b),
    "gemm-transB": (gemm(), np.asarray, X2, lambda x, w, b: x @ w.T + b),
    "gemm-alpha": (gemm("transB = 1, alpha = 0.3"), np.asarray, X2, lambda x, w, b: 0.3 * (x @ w.T) + b),
    "gemm-beta": (gemm("transB = 1, beta = 0.7"), np.asarray, X2, lambda x, w, b: x @ w.T + 0.7 * b),
    "gemm-alpha-beta": (
        gemm("transB = 1, alpha = -1.75, beta = 0.375"),
        np.asarray,
        X2,
        lambda x, w, b: -1.75 * (x @ w.T) + 0.375 * b,
    ),
    "gemm-no-c": (gemm("transB = 1, alpha = 0.3", c=""), np.asarray, X2, lambda x, w, b: 0.3 * (x @ w.T)),
    "gemm-empty-c": (gemm(c=", "), np.asarray, X2, lambda x, w, b: x @ w.T),
    "gemm-row-c": (gemm(c=", row"), np.asarray, X2, lambda x, w, b: x @ w.T + b),
    "gemm-column-c": (gemm(c=", column"), np.asarray, X2, lambda x, w, b: x @ w.T + X2[:, :1]),
    "gemm-scalar-c": (
        gemm("transB = 1, beta = 2.0", c=", scalar"),
        np.asarray,
        X2,
        lambda x, w, b: x @ w.T + 1,
    ),
    "gemm-relu": (gemm(more="y = Relu (z)"), np.asarray, X2, lambda x, w, b: relu(x @ w.T + b)),
    "gemm-tanh": (gemm(more="y = Tanh (z)"), np.asarray, X2, lambda x, w, b: np.tanh(x @ w.T + b)),
    "gemm-gelu": (gemm(more="y = Gelu (z)"), np.asarray, X2, lambda x, w, b: gelu(x @ w.T + b)),
    "fused-gemm": (
        one(
            f'y = {CONTRIB}FusedGemm <transB = 1, alpha = 0.3, beta = 0.7, activation = "Relu"> '
            "(x, fc_weight, fc_bias)",
            X2,
            "float[m,n] y",
        ),
        np.asarray,
        X2,
        lambda x, w, b: relu(0.3 * (x @ w.T) + 0.7 * b),
    ),
    "loop": (
        "g (float[a,40] x, int64 n) => (float[a,40] y) { on = Constant <value = bool {1}> () "
        "y = Loop (n, on, x) <body = b (int64 i, bool k, float[a,40] u) => (bool k2, float[a,40] v) "
        "{ k2 = Identity (k) s = MatMul (u, fc_weight) v = Tanh (s) }> }",
        T,
        X2,
        lambda x, w, b: np.tanh(np.tanh(np.tanh(x @ w.T) @ w.T) @ w.T),
    ),
}
CONSTANTS = {
    "fc_bias": ("fc.bias", BIAS),
    "row": ("row", BIAS[None]),
    "column": ("column", X2[:, :1]),
    "scalar": ("scalar", np.array(0.5, np.float32)),
}


def linear_base(case, folder, dtype=np.float32, head=HEAD):
    """Return the base, its canonical weight and its inputs."""
    text, store, x, _ = LINEAR[case]
    weight = random(IN, IN, seed=7) / 5 if case == "loop" else W
    stored = np.ascontiguousarray(store(weight))
    weight = weight.astype(stored.dtype)
    weights = {"fc.weight": stored} | dict(value for name, value in CONSTANTS.items() if name in text)
    feeds = {"x": x} | ({"n": np.array(3)} if case == "loop" else {})
    return save(graph(text, weights, head=head), folder), weight, feeds


def linear_answer(case, weight, feeds):
    compute, x = LINEAR[case][3], feeds["x"].astype(np.float64)
    return lambda modules: [compute(x, effective(weight, modules.get("fc")), BIAS)]


@pytest.mark.parametrize("case", LINEAR)
def test_linear(case, tmp_path):
    base, weight, feeds = linear_base(case, tmp_path)
    given, *others = (adapter(lora("fc", *weight.shape, rank, seed=rank)) for rank in (2, *RANKS))
    check_swap(base, given, linear_answer(case, weight, feeds), feeds, *others)


@pytest.mark.parametrize("case", ["3-D", "gemm-alpha-beta", "loop"])
def test_linear_by_the_module_s_name(case, tmp_path):
    """There is no adapter when the graph is made, and any that fits comes later."""
    base, weight, feeds = linear_base(case, tmp_path)
    given, other = (adapter(lora("fc", *weight.shape, rank)) for rank in (3, 7))
    report = check_swap(
        base, given, linear_answer(case, weight, feeds), feeds, other, target_modules=["fc"], max_rank=7
    )
    assert report.exposed.max_rank == 7


@pytest.mark.parametrize("case", [case for case in LINEAR if case != "fused-gemm"])
def test_linear_dora(case, tmp_path):
    """A factor on the product alone, whatever scales it or is added to it; plain adapters have ones."""
    base, weight, feeds = linear_base(case, tmp_path)
    rows = len(weight)
    given, other = (adapter(lora("fc", *weight.shape, r, magnitude=magnitude(rows, r))) for r in (2, 3))
    if case == "loop":
        given = other = adapter(lora("fc", *weight.shape, magnitude=magnitude(rows) / 3))
    plain = adapter(lora("fc", *weight.shape, 5))
    check_swap(base, given, linear_answer(case, weight, feeds), feeds, other, plain, dora=True)


def test_dora_can_t_come_before_an_activation_inside(tmp_path):
    base, weight, _ = linear_base("fused-gemm", tmp_path)
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape, magnitude=magnitude(OUT))), dora=True)
    assert reasons(caught)["fc.weight"].startswith("FusedGemm applies its activation inside")


def test_dora_without_dora_is_refused(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape, magnitude=magnitude(OUT))))
    assert "DoRA" in reasons(caught)["fc.weight"]
    assert "give --dora" in caught.hint


# --- bits of bases whose products are long: ONNX Runtime sums them in pieces ------------------------

LONG = 600
LONG_W = random(48, LONG, seed=7) / LONG**0.5
LONG_X = random(5, LONG, seed=9)
FUSES_ADD = (
    "ONNX Runtime makes a Gemm of MatMul + Add for static shapes too, but not where the bias has rows of its "
    "own, as with a branch in it. Past K = 128 the sums' order shows: 6e-8 relative"
)
FUSES_SCALE = "ONNX Runtime folds a Mul behind MatMul into alpha, which the branch between them prevents"
# id: (rows of x, graph behind x, why the bits differ)
LONG_PRODUCTS = {
    "symbolic-3-D": ("a,b", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", ""),
    "symbolic-3-D-gelu": ("a,b", "z = MatMul (x, fc_weight) u = Add (z, fc_bias) y = Gelu (u)", ""),
    "symbolic-batch": ("a,5", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", ""),
    "no-bias": ("5", "y = MatMul (x, fc_weight)", ""),
    "gemm": ("a", "y = Gemm (x, fc_weight, fc_bias)", ""),
    "gemm-beta": ("a", "y = Gemm <alpha = 0.3, beta = 0.7> (x, fc_weight, fc_bias)", ""),
    "gemm-no-c-relu": ("a", "z = Gemm (x, fc_weight) y = Relu (z)", ""),
    "2-D": ("a", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", ""),
    "2-D-relu": ("a", "z = MatMul (x, fc_weight) u = Add (fc_bias, z) y = Relu (u)", ""),
    "static-3-D": ("1,5", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", FUSES_ADD),
    "scaled": (
        "a,b",
        "s = Constant <value_float = 0.3> () z = MatMul (x, fc_weight) y = Mul (z, s)",
        FUSES_SCALE,
    ),
}


def long_base(case, folder):
    rows, text, _ = LONG_PRODUCTS[case]
    x = LONG_X if "," not in rows else LONG_X[None]
    weights = {"fc.weight": LONG_W.T.copy()} | ({"fc.bias": random(48, seed=8)} if "fc_bias" in text else {})
    text = f"g (float[{rows},{LONG}] x) => (float[{'a,b,c'[: 2 * x.ndim - 1]}] y) {{ {text} }}"
    return save(graph(text, weights), folder), {"x": x}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.xfail(strict=True, reason=why) if why else ())
        for case, (_, _, why) in LONG_PRODUCTS.items()
    ],
)
def test_bits_of_long_products(case, tmp_path):
    base, feeds = long_base(case, tmp_path)
    out, _ = swapped(base, adapter(lora("fc", 48, LONG)))
    check_bits(run(base, **feeds), run(out, **feeds))


@pytest.mark.parametrize("case", LONG_PRODUCTS)
def test_bits_of_long_products_without_fusions(case, tmp_path):
    """What the graph says is the same to the bit; with fusions it is the same to rounding."""
    base, feeds = long_base(case, tmp_path)
    out, _ = swapped(base, adapter(lora("fc", 48, LONG)))
    check_bits(unoptimised(base, **feeds), unoptimised(out, **feeds))
    assert error(run(out, **feeds)[0], run(base, **feeds)[0]) < 2e-7


# --- who reads the result ----------------------------------------------------------------------------


def test_several_readers_and_an_output(tmp_path):
    """The product is an output and has readers: all of them see the sum, under the names that they had."""
    text = one(
        "y = MatMul (x, fc_weight) u = Tanh (y) v = Relu (y) s = Add (u, y)",
        X3,
        "float[a,b,n] y, float[a,b,n] v, float[a,b,n] s",
    )
    base = save(graph(text, {"fc.weight": W.T.copy()}), tmp_path)

    def answer(modules):
        y = X3.astype(np.float64) @ effective(W, modules.get("fc")).T
        return [y, relu(y), np.tanh(y) + y]

    for dora in (False, True):
        check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": X3}, dora=dora)


def test_a_residual_behind_the_product(tmp_path):
    line = "z = MatMul (x, fc_weight) y = Add (r, z)"
    text = f"g (float[a,b,40] x, float[a,b,24] r) => (float[a,b,24] y) {{ {line} }}"
    base = save(graph(text, {"fc.weight": W.T.copy()}), tmp_path)
    check_swap(
        base,
        adapter(lora("fc", OUT, IN)),
        lambda modules: [X3.astype(np.float64) @ effective(W, modules.get("fc")).T + R],
        {"x": X3, "r": R},
    )


# --- subgraphs ---------------------------------------------------------------------------------------

SCOPES = {"n1": "fc", "n2": "fc"}
ZEROS = "float[2,3,24] {" + ",".join(["0"] * 144) + "}"
BRANCHES = (
    "g (float[2,3,40] x, bool c) => (float[2,3,24] y) {{ y = If (c) <"
    "then_branch = t () => (float[2,3,24] p) {{ {then} }}, "
    "else_branch = e () => (float[2,3,24] q) {{ {other} }}> }}"
)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("chosen", [True, False], ids=["then", "else"])
def test_both_branches_of_an_if_call_the_module(chosen, dora, tmp_path):
    """They read one activation, but what one computes the other can't see."""
    text = BRANCHES.format(
        then="[n1] p = MatMul (x, fc_weight)", other="[n2] r = MatMul (x, fc_weight) q = Relu (r)"
    )
    base = save(graph(text, {"fc.weight": W.T.copy()}, SCOPES), tmp_path)

    def answer(modules):
        y = X3.astype(np.float64) @ effective(W, modules.get("fc")).T
        return [y if chosen else relu(y)]

    more = {"magnitude": magnitude(OUT)} if dora else {}
    given = adapter(lora("fc", OUT, IN, **more))
    check_swap(base, given, answer, {"x": X3, "c": np.array(chosen)}, dora=dora)


def test_called_in_an_if_and_behind_it(tmp_path):
    text = BRANCHES.format(
        then="[n1] p = MatMul (x, fc_weight)", other=f"q = Constant <value = {ZEROS}> ()"
    ).replace("y) {", "y, float[2,3,24] z) {", 1)
    text = text[: text.rindex("}")] + " [n2] z = MatMul (x, fc_weight) }"
    base = save(graph(text, {"fc.weight": W.T.copy()}, SCOPES), tmp_path)

    def answer(modules):
        return [X3.astype(np.float64) @ effective(W, modules.get("fc")).T] * 2

    check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": X3, "c": np.array(True)})


def test_siblings_in_both_branches_of_an_if_packed(tmp_path):
    then, other = (f"{{out}} = MatMul (x, a_{name}_proj_weight)" for name in "qk")
    text = BRANCHES.format(then=then.format(out="p"), other=other.format(out="q"))
    weights = {f"a.{name}_proj.weight": random(IN, OUT, seed=ord(name)) for name in "qk"}
    base = save(graph(text, weights), tmp_path)
    given = adapter(*(lora(f"a.{name}_proj", OUT, IN, seed=ord(name)) for name in "qk"))
    for chosen, path in ((True, "a.q_proj"), (False, "a.k_proj")):
        weight = weights[f"{path}.weight"].T

        def answer(modules, path=path, weight=weight):
            return [X3.astype(np.float64) @ effective(weight, modules.get(path)).T]

        check_swap(base, given, answer, {"x": X3, "c": np.array(chosen)}, pack=True)


def test_a_weight_inside_the_subgraph(tmp_path):
    text = BRANCHES.format(then="p = MatMul (x, fc_weight)", other=f"q = Constant <value = {ZEROS}> ()")
    model = graph(text, {"fc.weight": W.T.copy()})
    inner = model.graph[0].attributes["then_branch"].as_graph()
    weight = model.graph.initializers.pop("fc.weight")
    inner.register_initializer(weight)
    base = save(model, tmp_path)

    def answer(modules):
        return [X3.astype(np.float64) @ effective(W, modules.get("fc")).T]

    feeds = {"x": X3, "c": np.array(True)}
    check_swap(base, adapter(lora("fc", OUT, IN)), answer, feeds)
    given = adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))
    check_swap(base, given, answer, feeds, dora=True)


def test_a_weight_in_a_constant_node(tmp_path):
    values = ",".join(map(str, W.T.ravel().tolist()))
    text = one(
        f"fc_weight = Constant <value = float[{IN},{OUT}] {{{values}}}> () [n1] y = MatMul (x, fc_weight)", X3
    )
    base = save(graph(text, {}, SCOPES), tmp_path)

    def answer(modules):
        return [X3.astype(np.float64) @ effective(W, modules.get("fc")).T]

    check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": X3})


def test_dora_beside_a_constant_node(tmp_path):
    """Whoever computes the factor looks W0 up among the initializers."""
    values = ",".join(map(str, W.T.ravel().tolist()))
    text = one(
        f"fc_weight = Constant <value = float[{IN},{OUT}] {{{values}}}> () [n1] y = MatMul (x, fc_weight)", X3
    )
    base = save(graph(text, {}, SCOPES), tmp_path)
    given = adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))
    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=given, dora=True)
    tensors = bind(given, report, base).tensors
    wanted = X3.astype(np.float64) @ effective(W, given.modules["fc.weight"]).T
    check_values(run(tmp_path / "swap.onnx", x=X3, **tensors), [wanted], TOLERANCE)


# --- biases of lora_B --------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True], ids=["single", "pack"])
@pytest.mark.parametrize("changed", ["q", "q v", "q k v", "qkv"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_biases_of_fused_and_split_modules(fused, changed, pack, tmp_path):
    """``lora_bias`` of parts of a fused weight, or of a whole that the exporter split."""
    spans = PARTS["qkv"] | {"qkv": (0, 32)}
    weight, own = random(32, IN, seed=7) / 5, random(32, seed=8)
    if fused:
        text = one("z = MatMul (x, a_qkv_proj_weight) y = Add (z, a_qkv_proj_bias)", X3)
        weights = {"a.qkv_proj.weight": weight.T.copy(), "a.qkv_proj.bias": own}
    else:
        lines = (
            f"z{n} = MatMul (x, a_{n}_proj_weight) {n} = Add (z{n}, a_{n}_proj_bias)" for n in PARTS["qkv"]
        )
        text = one(f"{' '.join(lines)} y = Concat <axis = -1> (q, k, v)", X3)
        weights = {f"a.{n}_proj.weight": weight[slice(*rows)].T.copy() for n, rows in PARTS["qkv"].items()}
        weights |= {f"a.{n}_proj.bias": own[slice(*rows)] for n, rows in PARTS["qkv"].items()}
    base = save(graph(text, weights), tmp_path)

    def made(seed):
        modules = []
        for number, name in enumerate(changed.split()):
            height = spans[name][1] - spans[name][0]
            bias = random(height, seed=seed + number)
            modules.append(lora(f"a.{name}_proj", height, IN, seed, seed + 9 * number, lora_bias=bias))
        return adapter(*modules)

    def answer(modules):
        full, bias = weight.astype(np.float64), own.astype(np.float64)
        for name, span in spans.items():
            module = modules.get(f"a.{name}_proj")
            full[slice(*span)] = effective(full[slice(*span)], module)
            bias[slice(*span)] += module.scaling * module.lora_bias.astype(np.float64) if module else 0
        return [X3.astype(np.float64) @ full.T + bias]

    check_swap(base, made(2), answer, {"x": X3}, made(3), pack=pack)


@pytest.mark.parametrize("case", ["gemm", "conv", "conv-relu"])
def test_biases_of_other_operators(case, tmp_path):
    bias = random(OUT, seed=3)
    if case == "gemm":
        base, weight, feeds = linear_base("gemm", tmp_path)
        given = adapter(lora("fc", OUT, IN, lora_bias=bias))

        def answer(modules):
            more = sum(m.scaling * m.lora_bias.astype(np.float64) for m in modules.values())
            return [feeds["x"].astype(np.float64) @ effective(weight, modules.get("fc")).T + BIAS + more]
    else:
        behind = "y = Relu (z)" if case == "conv-relu" else None
        base, weight, own, x = conv_base(tmp_path, 8, OUT, (3, 3), "pads = [1, 1, 1, 1]", behind=behind)
        given, feeds = adapter(conv_lora("c", OUT, 8, 3, 3, lora_bias=bias)), {"x": x}

        def answer(modules):
            more = sum(m.scaling * m.lora_bias.astype(np.float64) for m in modules.values())
            y = convolve(x, effective(weight, modules.get("c")), own + more, padding=1)
            return [relu(y) if behind else y]

    check_swap(base, given, answer, feeds)


# --- convolutions ------------------------------------------------------------------------------------

# id: (kernel, ONNX attributes, torch's)
CONVS = {
    "1-D": ((3,), "pads = [1, 1]", {"padding": 1}),
    "1-D-stride": ((4,), "strides = [2]", {"stride": 2}),
    "2-D": ((3, 2), "", {}),
    "2-D-pads": ((3, 3), "pads = [1, 2, 1, 2], strides = [2, 1]", {"padding": (1, 2), "stride": (2, 1)}),
    "2-D-dilated": ((3, 3), "dilations = [2, 2], pads = [2, 2, 2, 2]", {"dilation": 2, "padding": 2}),
    "2-D-same": ((3, 3), 'auto_pad = "SAME_UPPER"', {"padding": "same"}),
    "2-D-valid": ((3, 3), 'auto_pad = "VALID"', {"padding": "valid"}),
    "2-D-kernel-shape": ((3, 3), "kernel_shape = [3, 3]", {}),
    "1x1": ((1, 1), "", {}),
    "3-D": ((2, 3, 2), "pads = [1, 1, 1, 1, 1, 1], strides = [1, 2, 1]", {"padding": 1, "stride": (1, 2, 1)}),
}


def conv_base(folder, channels, out_dim, kernel, attributes, groups=1, bias=True, behind=None):
    """Return the base, its weight and bias, and x."""
    if groups > 1:
        attributes = f"group = {groups}, {attributes}".rstrip(", ")
    weight = random(out_dim, channels // groups, *kernel, seed=7)
    values = random(out_dim, seed=8) if bias else None
    x = random(2, channels, *(9, 8, 7)[: len(kernel)], seed=9)
    axes = ",".join("nchwd"[: x.ndim])
    call = f"Conv <{attributes}>" if attributes else "Conv"
    text = f"g (float[{sizes(x)}] x) => (float[{axes}] y) {{ " + (
        f"{'z' if behind else 'y'} = {call} (x, c_weight{', c_bias' if bias else ''}) {behind or ''} }}"
    )
    weights = {"c.weight": weight} | ({"c.bias": values} if bias else {})
    return save(graph(text, weights), folder), weight, values, x


@pytest.mark.parametrize("kind", ["plain", "dora", "relu"])
@pytest.mark.parametrize("case", CONVS)
def test_conv(case, kind, tmp_path):
    """32 channels, so that ONNX Runtime uses its blocked layout for the base's own convolution."""
    kernel, attributes, options = CONVS[case]
    behind = "y = Relu (z)" if kind == "relu" else None
    base, weight, bias, x = conv_base(
        tmp_path, 32, 32, kernel, attributes, bias=kind != "plain", behind=behind
    )

    def answer(modules):
        y = convolve(x, effective(weight, modules.get("c")), bias, **options)
        return [relu(y) if kind == "relu" else y]

    dora = {"magnitude": magnitude(32)} if kind == "dora" else {}
    given, *others = (adapter(conv_lora("c", 32, 32, *kernel, rank=r, **dora)) for r in (2, *RANKS))
    check_swap(base, given, answer, {"x": x}, *others, dora=kind == "dora")


@pytest.mark.parametrize("behind", [None, "y = Relu (z)"], ids=["alone", "relu"])
@pytest.mark.parametrize("channels", [4, 32])
@pytest.mark.parametrize("case", ["1-D", "2-D-pads", "3-D"])
def test_grouped_conv(case, channels, behind, tmp_path):
    """PEFT's A sees all channels, its B has the groups: no merge computes that, the branch does."""
    kernel, attributes, options = CONVS[case]
    out_dim = channels + 4
    base, weight, bias, x = conv_base(tmp_path, channels, out_dim, kernel, attributes, 2, behind=behind)

    def answer(modules):
        y = convolve(x, weight, bias, groups=2, **options)
        if module := modules.get("c"):
            down = convolve(x, module.lora_a, **options)
            y = y + module.scaling * convolve(down, module.lora_b, groups=2)
        return [relu(y) if behind else y]

    given, other = (adapter(conv_lora("c", out_dim, channels, *kernel, rank=r, groups=2)) for r in (4, 6))
    for options_ in ({}, {"target_modules": ["c"]}):
        report = check_swap(base, given, answer, {"x": x}, other, **options_)
        (module,) = report.exposed.modules
        assert (module.in_dim, module.groups, module.kernel) == (channels, 2, kernel)
    with pytest.raises(SiteError) as caught:
        merge_onnx(base, given, tmp_path / "merged.onnx")
    assert "grouped convolution" in reasons(caught.value)["c.weight"]


def test_depthwise_conv_against_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = torch.nn.Sequential()
    layers.add_module("c", torch.nn.Conv2d(8, 8, 3, padding=1, groups=8))
    x = random(2, 8, 6, 6, seed=9)
    torch.onnx.export(
        layers, (torch.tensor(x),), str(tmp_path / "base.onnx"), input_names=["x"], dynamo=False
    )
    options = {"r": 8, "lora_alpha": 12, "target_modules": ["c"], "init_lora_weights": False}
    model = get_peft_model(layers, LoraConfig(**options)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(torch.tensor(x)).numpy()
    from lora_export.formats import load_adapter

    given = load_adapter(tmp_path / "adapter")
    out, report = swapped(tmp_path / "base.onnx", given)
    tensors = bind(given, report, tmp_path / "base.onnx").tensors
    check_bits(run(tmp_path / "base.onnx", x=x), run(out, x=x))
    check_values(run(out, x=x, **tensors), [wanted], TOLERANCE)


def test_a_conv_with_other_groups_than_the_adapter(tmp_path):
    base, *_ = conv_base(tmp_path, 4, 6, (3,), "", 2)
    caught = refuse_swap(base, adapter(conv_lora("c", 6, 2, 3)))
    assert reasons(caught)["c.weight"] == "lora_B has 1 groups, the graph's convolution 2"


LAYOUT = "without Z the base's FusedConv runs in ONNX Runtime's blocked layout, with Z in its plain one: 3e-7"


@pytest.mark.parametrize("channels", [6, 16])
@pytest.mark.parametrize(
    ("residual", "fused"),
    [
        pytest.param(False, True, marks=pytest.mark.xfail(strict=True, reason=LAYOUT)),
        (False, False),
        (True, True),
    ],
    ids=["no-z", "no-z-values", "z"],
)
def test_fused_conv(residual, fused, channels, tmp_path):
    """Z is added before the activation, and so is the branch."""
    weight, bias = random(channels, channels, 3, 3, seed=7), random(channels, seed=8)
    x, z = random(2, channels, 9, 8, seed=9), random(2, channels, 9, 8, seed=4)
    shape = f"float[n,{channels},9,8]"
    text = f"g ({shape} x{f', {shape} z' * residual}) => (float[n,c,h,w] y) {{ " + (
        f'y = {CONTRIB}FusedConv <pads = [1, 1, 1, 1], activation = "Relu"> '
        f"(x, c_weight, c_bias{', z' * residual}) }}"
    )
    base = save(graph(text, {"c.weight": weight, "c.bias": bias}), tmp_path)
    given = adapter(conv_lora("c", channels, channels, 3, 3))

    def answer(modules):
        y = convolve(x, effective(weight, modules.get("c")), bias, padding=1)
        return [relu(y + z if residual else y)]

    feeds = {"x": x} | ({"z": z} if residual else {})
    if fused:
        check_swap(base, given, answer, feeds)
        return
    out, report = swapped(base, given)
    check_values(run(out, **feeds), run(base, **feeds), TOLERANCE)
    tensors = bind(given, report, base).tensors
    check_values(run(out, **feeds, **tensors), answer({"c": given.modules["c.weight"]}), TOLERANCE)


FOLDED = (
    "ONNX Runtime adds a constant behind a convolution to its bias first, which the branch prevents: 2e-7"
)


@pytest.mark.parametrize(
    "behind",
    ["residual", "pool", pytest.param("constant", marks=pytest.mark.xfail(strict=True, reason=FOLDED))],
)
def test_what_onnxruntime_fuses_behind_a_conv(behind, tmp_path):
    weight, bias = random(16, 16, 3, 3, seed=7), random(16, seed=8)
    x, z = random(2, 16, 9, 8, seed=9), random(2, 16, 9, 8, seed=4)
    constant = random(1, 16, 1, 1, seed=3)
    line = {
        "residual": "y = Add (u, z)",
        "constant": "y = Add (u, constant)",
        "pool": "v = Relu (u) y = MaxPool <kernel_shape = [2, 2]> (v)",
    }[behind]
    text = (
        "g (float[n,16,9,8] x, float[n,16,9,8] z) => (float[n,c,h,w] y) { "
        f"u = Conv <pads = [1, 1, 1, 1]> (x, c_weight, c_bias) {line} }}"
    )
    weights = {"c.weight": weight, "c.bias": bias}
    base = save(graph(text, weights | ({"constant": constant} if behind == "constant" else {})), tmp_path)

    def answer(modules):
        y = convolve(x, effective(weight, modules.get("c")), bias, padding=1)
        if behind == "pool":
            return [torch.max_pool2d(torch.tensor(relu(y)), 2, 1).numpy()]
        return [y + (z if behind == "residual" else constant)]

    check_swap(base, adapter(conv_lora("c", 16, 16, 3, 3)), answer, {"x": x, "z": z})


def batch_norm(folder, folded):
    """Return a convolution with a norm behind it, in the graph or folded into the weight; and its answer."""
    weight, bias = random(16, 4, 3, 3, seed=7), random(16, seed=8)
    gamma, beta, mean = (random(16, seed=seed) for seed in (11, 12, 13))
    variance = np.abs(random(16, seed=14)) + 0.5
    x = random(2, 4, 9, 8, seed=9)
    factor = (gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + 1e-5))[:, None, None, None]
    shift = beta + (bias - mean) * factor[:, 0, 0, 0]
    if folded:
        text = "g (float[n,4,9,8] x) => (float[n,c,h,w] y) { [n3] y = Conv (x, c_weight, c_bias) }"
        weights = {"c.weight": (weight * factor).astype(np.float32), "c.bias": shift.astype(np.float32)}
    else:
        text = (
            "g (float[n,4,9,8] x) => (float[n,c,h,w] y) "
            "{ z = Conv (x, c_weight, c_bias) y = BatchNormalization (z, gamma, beta, mean, variance) }"
        )
        weights = {"c.weight": weight, "c.bias": bias}
        weights |= {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
    base = save(graph(text, weights, {"n3": "bn"}), folder)

    def answer(modules):
        return [convolve(x, factor * effective(weight, modules.get("c")), shift)]

    return base, weight, bias, answer, {"x": x}


def test_a_batch_norm_folded_into_the_weight(tmp_path):
    """The checkpoint tells the factor of each channel, by which the branch is multiplied as well."""
    base, weight, bias, answer, feeds = batch_norm(tmp_path, folded=True)
    given, other = (adapter(conv_lora("c", 16, 4, 3, 3, rank=r)) for r in (2, 3))
    assert "--checkpoint" in reasons(refuse_swap(base, given))["c.weight"]
    (tmp_path / "checkpoint").mkdir()
    save_file({"c.weight": weight, "c.bias": bias}, tmp_path / "checkpoint" / "model.safetensors")
    options = {"checkpoint": tmp_path / "checkpoint"}
    check_swap(base, given, answer, feeds, other, **options)
    check_swap(base, given, answer, feeds, other, dora=True, **options)


@pytest.mark.xfail(
    strict=True,
    reason="ONNX Runtime folds the norm into the base's weight; behind the branch's sum it stays a node: "
    "3e-7 relative",
)
def test_bits_of_a_batch_norm_in_the_graph(tmp_path):
    base, _, _, _, feeds = batch_norm(tmp_path, folded=False)
    out, _ = swapped(base, adapter(conv_lora("c", 16, 4, 3, 3)))
    check_bits(run(base, **feeds), run(out, **feeds))


def test_a_batch_norm_in_the_graph(tmp_path):
    base, _, _, answer, feeds = batch_norm(tmp_path, folded=False)
    given = adapter(conv_lora("c", 16, 4, 3, 3))
    out, report = swapped(base, given)
    check_bits(unoptimised(base, **feeds), unoptimised(out, **feeds))
    tensors = bind(given, report, base).tensors
    check_values(run(out, **feeds, **tensors), answer({"c": given.modules["c.weight"]}), TOLERANCE)


# --- embeddings --------------------------------------------------------------------------------------

TABLE = random(11, 8, seed=3)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize(
    "ids", [[1, -2, 10], [[1, 2], [3, -1]], [[[1], [2]], [[3], [-11]]]], ids=["1-D", "2-D", "3-D"]
)
def test_embedding(ids, dora, tmp_path):
    """Indices of any shape, negative ones too; a DoRA factor belongs to a column of the table."""
    ids = np.array(ids)
    axes = "abcd"[: ids.ndim]
    text = (
        f"g (int64[{','.join(axes)}] ids) => (float[{','.join(axes)},n] y) {{ y = Gather (e_weight, ids) }}"
    )
    base = save(graph(text, {"e.weight": TABLE}), tmp_path)

    def answer(modules):
        return [effective(TABLE, modules.get("e"))[ids]]

    more = {"magnitude": magnitude(8)} if dora else {}
    given, *others = (adapter(table_lora("e", 11, 8, rank, **more)) for rank in (2, *RANKS))
    check_swap(base, given, answer, {"ids": ids}, *others, dora=dora)
    check_swap(base, given, answer, {"ids": ids}, *others, dora=dora, target_modules=["e"])


@pytest.mark.parametrize("changed", [("e",), ("head",), ("e", "head")], ids="-".join)
def test_a_tied_embedding(changed, tmp_path):
    """One weight, two modules: each gets its own branch, the weight stays one."""
    text = (
        "g (int64[a,b] ids) => (float[a,b,n] y) { [n1] h = Gather (e_weight, ids) u = Tanh (h) "
        "t = Transpose <perm = [1, 0]> (e_weight) [n2] y = MatMul (u, t) }"
    )
    base = save(graph(text, {"e.weight": TABLE}, {"n1": "e", "n2": "head"}), tmp_path)
    ids = np.array([[1, 2, 3], [4, -1, 0]])

    def answer(modules):
        hidden = np.tanh(effective(TABLE, modules.get("e"))[ids])
        return [hidden @ effective(TABLE, modules.get("head")).T]

    modules = {"e": table_lora("e", 11, 8), "head": lora("head", 11, 8)}
    given = adapter(*(modules[name] for name in changed))
    check_swap(base, given, answer, {"ids": ids})
    assert len(ir.load(tmp_path / "swap.onnx").graph.initializers) == 1 + 2 * len(changed)


# --- fused and split weights -------------------------------------------------------------------------

PARTS = {"qkv": {"q": (0, 16), "k": (16, 24), "v": (24, 32)}, "gate_up": {"gate": (0, 12), "up": (12, 24)}}
FUSED_OPS = {
    "matmul": "z = MatMul (x, a_{0}_proj_weight) y = Tanh (z)",
    "gemm": "f = Reshape (x, flat) z = Gemm <alpha = 0.5> (f, a_{0}_proj_weight, a_{0}_proj_bias) "
    "t = Tanh (z) y = Reshape (t, deep)",
}


def fused_base(folder, fused, operator):
    spans = PARTS[fused]
    height = max(stop for _, stop in spans.values())
    weight = random(height, IN, seed=7) / 5
    weights = {f"a.{fused}_proj.weight": weight.T.copy()}
    bias, factor = 0, 1.0
    if operator == "gemm":
        bias, factor = random(height, seed=8), 0.5
        shapes = {"flat": np.array([-1, IN]), "deep": np.array([2, 3, height])}
        weights |= {f"a.{fused}_proj.bias": bias} | shapes
    base = save(graph(one(FUSED_OPS[operator].format(fused), X3), weights), folder)

    def answer(modules):
        full = weight.astype(np.float64)
        for name, (start, stop) in spans.items():
            full[start:stop] = effective(weight[start:stop], modules.get(f"a.{name}_proj"))
        return [np.tanh(factor * (X3.astype(np.float64) @ full.T) + bias)]

    return base, answer


@pytest.mark.parametrize("operator", FUSED_OPS)
@pytest.mark.parametrize("kind", ["plain", "pack", "dora", "dora-pack"])
@pytest.mark.parametrize("changed", ["q k v", "q v", "k", "v k q", "q k", "gate up", "up"])
def test_parts_of_a_fused_weight(changed, kind, operator, tmp_path):
    """Some parts or all, in any order; what no adapter changes keeps its bits in every run."""
    names = changed.split()
    fused = "gate_up" if names[-1] == "up" else "qkv"
    base, answer = fused_base(tmp_path, fused, operator)

    def made(seed, dora=False, which=names):
        modules = []
        for number, name in enumerate(which):
            start, stop = PARTS[fused][name]
            more = {"magnitude": magnitude(stop - start)} if dora else {}
            modules.append(lora(f"a.{name}_proj", stop - start, IN, 1 + number + seed, seed + number, **more))
        return adapter(*modules)

    dora = kind.startswith("dora")
    others = [made(3), made(5, dora, names[:1])]
    report = check_swap(
        base, made(1, dora), answer, {"x": X3}, *others, pack=kind.endswith("pack"), dora=dora
    )
    packed = kind.endswith("pack") and len(names) > 1
    assert len(report.exposed.modules) == (1 if packed else len(names))


@pytest.mark.parametrize("kind", ["plain", "pack", "dora"])
@pytest.mark.parametrize(("whole", "parts"), [("gate_up", ("gate", "up")), ("qkv", ("q", "k", "v"))])
def test_a_module_that_the_exporter_split(whole, parts, kind, tmp_path):
    rows = {"gate": 12, "up": 12, "q": 16, "k": 8, "v": 8}
    weights = {part: random(rows[part], IN, seed=ord(part[0])) for part in parts}
    outputs = ", ".join(f"float[a,b,{part}s] {part}" for part in parts)
    lines = " ".join(f"{part} = MatMul (x, a_{part}_proj_weight)" for part in parts)
    model = graph(one(lines, X3, outputs), {f"a.{p}_proj.weight": w.T.copy() for p, w in weights.items()})
    base = save(model, tmp_path)
    path, full = f"a.{whole}_proj", np.concatenate(list(weights.values()))
    ends = np.cumsum([rows[part] for part in parts])[:-1]

    def answer(modules):
        y = X3.astype(np.float64) @ effective(full, modules.get(path)).T
        return np.split(y, ends, axis=-1)

    more = {"magnitude": magnitude(len(full))} if kind == "dora" else {}
    given, other = (adapter(lora(path, len(full), IN, rank, **more)) for rank in (2, 4))
    check_swap(base, given, answer, {"x": X3}, other, dora=kind == "dora", pack=kind == "pack")


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_a_split_module_whose_parts_read_two_values(dora, tmp_path):
    """The query and the key read one copy of the activation, the value another: one product for each."""
    weights = {f"a.{name}_proj.weight": random(IN, OUT, seed=ord(name)) for name in "qkv"}
    lines = "q = MatMul (x, a_q_proj_weight) k = MatMul (x, a_k_proj_weight) v = MatMul (x2, a_v_proj_weight)"
    text = one(f"x2 = Tanh (x) {lines}", X3, ", ".join(f"float[a,b,n] {name}" for name in "qkv"))
    base = save(graph(text, weights), tmp_path)
    full = np.concatenate([weight.T for weight in weights.values()])

    def answer(modules):
        changed = effective(full, modules.get("a.qkv_proj"))
        x = X3.astype(np.float64)
        return [
            (np.tanh(x) if part == 2 else x) @ changed[part * OUT : (part + 1) * OUT].T for part in range(3)
        ]

    more = {"magnitude": magnitude(3 * OUT)} if dora else {}
    check_swap(base, adapter(lora("a.qkv_proj", 3 * OUT, IN, **more)), answer, {"x": X3}, dora=dora)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_siblings_packed(kind, tmp_path):
    """Separate q, k, v of several widths in one pair of tensors; an adapter may leave some of them alone."""
    rows = {"q": 16, "k": 8, "v": 8}
    weights = {name: random(rows[name], IN, seed=ord(name)) for name in rows}
    lines = " ".join(f"{name} = MatMul (x, a_{name}_proj_weight)" for name in rows)
    outputs = ", ".join(f"float[a,b,{name}s] {name}" for name in rows)
    model = graph(one(lines, X3, outputs), {f"a.{n}_proj.weight": w.T.copy() for n, w in weights.items()})

    def answer(modules):
        x = X3.astype(np.float64)
        return [x @ effective(w, modules.get(f"a.{n}_proj")).T for n, w in weights.items()]

    def made(names, rank):
        more = {n: {"magnitude": magnitude(rows[n])} if kind == "dora" else {} for n in names}
        return adapter(
            *(lora(f"a.{n}_proj", rows[n], IN, rank + i, i, **more[n]) for i, n in enumerate(names))
        )

    base = save(model, tmp_path)
    report = check_swap(
        base, made("vqk", 2), answer, {"x": X3}, made("qkv", 1), made("k", 3), pack=True, dora=kind == "dora"
    )
    (module,) = report.exposed.modules
    assert [member.path for member in module.members] == ["a.q_proj", "a.k_proj", "a.v_proj"]


# --- shared and repeated weights ---------------------------------------------------------------------


def two_calls(folder, other_x, scopes, second="fc_weight", **weights):
    x2 = "u" if other_x else "x"
    text = one(
        f"u = Tanh (x) [n1] y = MatMul (x, fc_weight) [n2] z = MatMul ({x2}, {second})",
        X3,
        "float[a,b,n] y, float[a,b,n] z",
    )
    return save(
        graph(text, {"fc.weight": W.T.copy(), **weights}, dict(zip(("n1", "n2"), scopes, strict=True))),
        folder,
    )


def two_answers(other_x, paths):
    def answer(modules):
        x = X3.astype(np.float64)
        first, second = (effective(W, modules.get(path)).T for path in paths)
        return [x @ first, (np.tanh(x) if other_x else x) @ second]

    return answer


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("other_x", [False, True], ids=["same-x", "other-x"])
@pytest.mark.parametrize("repeated", [False, True], ids=["one-constant", "two-constants"])
def test_a_module_called_twice(other_x, repeated, dora, tmp_path):
    more = {"second": "copy", "copy": W.T.copy()} if repeated else {}
    base = two_calls(tmp_path, other_x, ("fc", "fc"), **more)
    scale = {"magnitude": magnitude(OUT)} if dora else {}
    given, other = (adapter(lora("fc", OUT, IN, rank, **scale)) for rank in (2, 3))
    check_swap(base, given, two_answers(other_x, ("fc", "fc")), {"x": X3}, other, dora=dora)


@pytest.mark.parametrize("paths", [("one",), ("two",), ("one", "two")], ids="-".join)
def test_equal_weights_of_two_modules(paths, tmp_path):
    """The exporter merged them; a branch goes beside the module that the adapter changes, and no other."""
    base = two_calls(tmp_path, False, ("one", "two"))
    given = adapter(*(lora(path, OUT, IN, seed=len(path) + i) for i, path in enumerate(paths)))
    for pack in (False, True):
        check_swap(base, given, two_answers(False, ("one", "two")), {"x": X3}, pack=pack)


# --- PEFT's own forward ------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(11, 8)
        self.fc = torch.nn.Linear(8, 12)
        self.conv = torch.nn.Conv1d(12, 6, 3, padding=1)
        self.out = torch.nn.Linear(6, 5)

    def forward(self, ids):
        hidden = torch.tanh(self.fc(self.emb(ids)))
        return self.out(torch.relu(self.conv(hidden.transpose(1, 2))).transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_dora_against_peft(exporter, tmp_path):
    """Embedding, MatMul with a bias, convolution and Gemm, all with DoRA; a plain adapter in that graph."""
    from peft import LoraConfig, get_peft_model

    from lora_export.formats import load_adapter

    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    base = tmp_path / "base.onnx"
    dynamo = exporter == "dynamo"
    more = {"verbose": False} if dynamo else {}
    torch.onnx.export(Layers().eval(), (ids,), str(base), input_names=["ids"], dynamo=dynamo, **more)
    generator, wanted = torch.Generator().manual_seed(1), {}
    for name, rank in (("dora", 4), ("plain", 3)):
        targets = ["emb", "fc", "conv", "out"]
        options = {"r": rank, "lora_alpha": 6, "target_modules": targets, "use_dora": name == "dora"}
        model = get_peft_model(Layers(), LoraConfig(**options)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in key else 0.4 * noise)
            wanted[name] = model(ids).numpy()
        model.save_pretrained(tmp_path / name)
    given, plain = (load_adapter(tmp_path / name) for name in ("dora", "plain"))
    out, report = swapped(base, given, dora=True)
    feeds = {"ids": ids.numpy()}
    check_bits(run(base, **feeds), run(out, **feeds))
    for adapted, name in ((given, "dora"), (plain, "plain")):
        got = run(out, **feeds, **bind(adapted, report, base).tensors)
        check_values(got, [wanted[name]], TOLERANCE)


# --- other floats ------------------------------------------------------------------------------------

FLOATS = {"float16": 10, "bfloat16": 16, "double": 11}
# Half a unit in the last place of 11 bits, a few times; sums of 40 products in float64.
TOLERANCES = {"float16": 3e-3, "double": 1e-14}


def typed(text, dtype):
    return text.replace("float[", f"{dtype}[")


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("case", ["3-D", "bias", "gemm-alpha-beta", "gemm-relu"])
@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_floats(dtype, case, dora, tmp_path):
    text, store, x, compute = LINEAR[case]
    kind = np.dtype(dtype)
    weight = (W / 6).astype(kind)
    weights = {"fc.weight": np.ascontiguousarray(store(weight))}
    if "fc_bias" in text:
        weights["fc.bias"] = BIAS.astype(kind)
    base = save(graph(typed(text, dtype), weights), tmp_path)
    x, bias = x.astype(kind), BIAS.astype(kind).astype(np.float64)
    module = lora("fc", OUT, IN, **({"magnitude": magnitude(OUT)} if dora else {}))
    module = replace(module, lora_a=module.lora_a / 4, lora_b=module.lora_b / 4)

    def answer(modules):
        return [compute(x.astype(np.float64), effective(weight, modules.get("fc")), bias)]

    report = check_swap(base, adapter(module), answer, {"x": x}, tolerance=TOLERANCES[dtype], dora=dora)
    assert report.exposed.modules[0].dtype == ("float64" if dtype == "double" else dtype)


def test_bfloat16_is_written_but_not_run(tmp_path):
    """ONNX Runtime's CPU provider has no MatMul of bfloat16: types and names are all that can be checked."""
    text, store, *_ = LINEAR["bias"]
    weights = {
        name: ir.tensor(values.astype(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16)
        for name, values in (("fc.weight", np.ascontiguousarray(store(W))), ("fc.bias", BIAS))
    }
    base = save(graph(typed(text, "bfloat16"), weights), tmp_path)
    given = adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))
    out, report = swapped(base, given, dora=True)
    model = ir.load(out)
    added = [v for v in model.graph.inputs if ".lora_" in str(v.name)]
    assert [v.dtype for v in added] == [ir.DataType.BFLOAT16] * 3
    assert {tensor.dtype.name for tensor in bind(given, report, base).tensors.values()} == {"bfloat16"}
    floats = {v.dtype for node in model.graph for v in node.outputs if ".lora." in str(v.name)}
    assert floats == {ir.DataType.BFLOAT16}


# --- TensorRT's flavour ------------------------------------------------------------------------------


def test_tensorrt_takes_plain_inputs(tmp_path):
    """No LoRA tensor has a default, which a TensorRT parser would build in; a convolution's rank is fixed."""
    text = (
        "g (int64[a,b] ids) => (float[a,n,b] y) { h = Gather (e_weight, ids) z = MatMul (h, fc_weight) "
        "t = Transpose <perm = [0, 2, 1]> (z) y = Conv <pads = [1, 1]> (t, c_weight, c_bias) }"
    )
    fc, kernel = random(12, 8, seed=2), random(6, 12, 3, seed=4)
    weights = {"e.weight": TABLE, "fc.weight": fc.T.copy(), "c.weight": kernel, "c.bias": random(6, seed=5)}
    base = save(graph(text, weights), tmp_path)
    ids = np.array([[1, 2, 3], [4, 5, -1]])

    def answer(modules):
        hidden = effective(TABLE, modules.get("e"))[ids] @ effective(fc, modules.get("fc")).T
        y = convolve(hidden.swapaxes(1, 2), effective(kernel, modules.get("c")), weights["c.bias"], padding=1)
        return [y]

    def made(rank):
        return adapter(
            table_lora("e", 11, 8, rank, magnitude=magnitude(8)),
            lora("fc", 12, 8, rank, magnitude=magnitude(12)),
            conv_lora("c", 6, 12, 3, rank=min(rank, 4), magnitude=magnitude(6)),
        )

    out, report = swapped(base, made(4), flavour="tensorrt", dora=True)
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    inputs = {port.name: port.shape for port in session.get_inputs()}
    assert set(inputs) == {"ids", *report.exposed.tensor_names()}
    assert not set(inputs) & set(ir.load(out).graph.initializers)
    assert not session.get_overridable_initializers()
    assert inputs["c.lora_A.weight"] == [4, 12, 3]
    assert inputs["c.lora_B.weight"] == [6, 4, 1]
    assert inputs["fc.lora_A.weight"] == [8, "fc.rank"]
    for rank in (4, 2, 6):
        bound = bind(made(rank), report, base)
        modules = {module.path: module for module in made(rank).modules.values()}
        check_values(run(out, ids=ids, **bound.tensors), answer(modules), TOLERANCE)


def test_tensorrt_needs_a_convolution_s_rank(tmp_path):
    base, *_ = conv_base(tmp_path, 4, 6, (3,), "")
    caught = refuse_swap(base, target_modules=["c"], flavour="tensorrt")
    assert "TensorRT needs a convolution's rank" in str(caught)


# --- bad input ---------------------------------------------------------------------------------------


def test_an_opset_that_is_too_old(tmp_path):
    head = HEAD.replace('"" : 20', '"" : 12')
    base, weight, _ = linear_base("3-D", tmp_path, head=head)
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape)))
    assert isinstance(caught, GraphError)
    assert "opset 12; branches need 13" in str(caught)


def test_an_ir_version_without_defaults_of_inputs(tmp_path):
    """ONNX Runtime takes its inputs with an initializer for constants: nothing could be swapped."""
    base, weight, _ = linear_base("3-D", tmp_path, head=HEAD.replace("ir_version: 10", "ir_version: 3"))
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape)))
    assert isinstance(caught, GraphError)
    assert "IR version 3" in str(caught)


def test_exposed_twice(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    given = adapter(lora("fc", *weight.shape))
    out, _ = swapped(base, given)
    assert "has exposed LoRA already" in str(refuse_swap(out, given))
    model = ir.load(out)
    model.metadata_props.clear()
    ir.save(model, tmp_path / "foreign.onnx")
    caught = refuse_swap(tmp_path / "foreign.onnx", given)
    assert list(caught.problems) == ["fc.lora_A.weight", "fc.lora_B.weight"]


def test_unknown_module_names(tmp_path):
    base, *_ = linear_base("3-D", tmp_path)
    caught = refuse_swap(base, target_modules=["fc", "q_proj"])
    assert isinstance(caught, SiteError)
    assert list(caught.problems) == ["q_proj"]
    assert "it has: fc" in caught.hint
    caught = refuse_swap(base, adapter(lora("fc", OUT, IN), lora("other", OUT, IN)))
    assert reasons(caught)["other.weight"].startswith("not found")


@pytest.mark.parametrize(
    ("max_rank", "words"),
    [(3, "max_rank is 3, the adapter has rank 4"), (0, "max_rank is 0"), (-1, "max_rank is -1")],
)
def test_max_rank(max_rank, words, tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    given = adapter(lora("fc", *weight.shape, 4))
    caught = refuse_swap(base, given, max_rank=max_rank)
    assert isinstance(caught, AdapterError)
    assert words in str(caught)
    _, report = swapped(base, given, max_rank=4)
    with pytest.raises(SiteError, match="no place"):
        bind(adapter(lora("fc", *weight.shape, 5)), report, base)


def test_neither_adapter_nor_modules_and_both(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    assert "which modules" in str(refuse_swap(base))
    # What both mean is exposed once.
    _, report = swapped(base, adapter(lora("fc", *weight.shape)), target_modules=["fc"])
    assert [module.name for module in report.exposed.modules] == ["fc"]


LEFT = "g (float[40,s] x) => (float[n,s] y) { y = MatMul (fc_weight, x) }"
TRANS_A = "g (float[40,m] x) => (float[m,n] y) { y = Gemm <transA = 1> (x, fc_weight) }"


@pytest.mark.parametrize(
    ("text", "store", "words"),
    [
        (LEFT, np.asarray, "the weight stands on the left"),
        (TRANS_A, T, "reads its activation transposed"),
        (
            one(f"y = {CONTRIB}GemmFastGelu (x, fc_weight, fc_bias)", X2, "float[m,n] y"),
            T,
            "GemmFastGelu applies its activation inside",
        ),
    ],
    ids=["left", "transA", "GemmFastGelu"],
)
def test_operators_without_a_branch(text, store, words, tmp_path):
    weights = {"fc.weight": np.ascontiguousarray(store(W))}
    base = save(graph(text, weights | ({"fc.bias": BIAS} if "fc_bias" in text else {})), tmp_path)
    for options in ({"given": adapter(lora("fc", OUT, IN))}, {"target_modules": ["fc"]}):
        caught = refuse_swap(base, **options)
        assert words in reasons(caught)["fc.weight"]
        # The words are a swap's: nothing is being merged, and nobody is sent in a circle.
        assert "merged into" not in str(caught)
        assert "swap-onnx" not in caught.hint


def test_com_microsoft_attention(tmp_path):
    weight = random(36, 12, seed=7)
    text = (
        "g (float[a,b,12] x) => (float[a,b,12] y) "
        f"{{ y = {CONTRIB}Attention <num_heads = 2> (x, a_qkv_proj_weight, a_qkv_proj_bias) }}"
    )
    weights = {"a.qkv_proj.weight": weight.T.copy(), "a.qkv_proj.bias": random(36, seed=8)}
    base = save(graph(text, weights), tmp_path)
    caught = refuse_swap(base, adapter(lora("a.q_proj", 12, 12)))
    assert "projects and attends in one operator" in reasons(caught)["a.q_proj.weight"]


def test_the_record_is_in_the_file(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    out, report = swapped(base, adapter(lora("fc", *weight.shape)))
    assert exposed_of(ir.load(out).metadata_props, out.name) == report.exposed
    assert report.exposed.base == "base.onnx"
