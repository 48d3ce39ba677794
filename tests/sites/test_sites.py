"""Each operator that a weight can be read by: merged graphs in ONNX Runtime against numpy in float64."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graphs import (
    adapter,
    constants,
    conv,
    delta,
    embedding,
    error,
    graph,
    linear,
    random,
    refusals,
    run,
    save,
)

from lora_export import merge_onnx

OUT, IN = 6, 4
X = random(2, 3, IN, seed=9)
ROWS = random(5, IN, seed=9)
BIAS = random(OUT, seed=8)
CONTRIB = "com.microsoft."


def gemm(attributes):
    return f"g (float[M,K] x) => (float[M2,N] y) {{ y = Gemm <{attributes}> (x, fc_weight, fc_bias) }}"


def matmul(line, inputs="float[B,S,4] x", outputs="float[B,S,N] y"):
    return f"g ({inputs}) => ({outputs}) {{ {line} }}"


# id: (graph, how the canonical (out, in) weight is stored, x, what it computes in float64)
LINEAR = {
    "matmul": (matmul("y = MatMul (x, fc_weight)"), lambda w: w.T, X, lambda x, w, b: x @ w.T),
    "matmul-left": (
        matmul("y = MatMul (fc_weight, x)", "float[4,S] x", "float[N,S] y"),
        lambda w: w,
        ROWS.T.copy(),
        lambda x, w, b: w @ x,
    ),
    "gemm": (gemm("transB = 0"), lambda w: w.T, ROWS, lambda x, w, b: x @ w.T + b),
    "gemm-transB": (gemm("transB = 1"), lambda w: w, ROWS, lambda x, w, b: x @ w.T + b),
    "gemm-transA-alpha-beta": (
        gemm("transA = 1, transB = 1, alpha = 0.5, beta = 0.25"),
        lambda w: w,
        ROWS.T.copy(),
        lambda x, w, b: 0.5 * (x.T @ w.T) + 0.25 * b,
    ),
    "gemm-weight-first": (
        "g (float[4,S] x) => (float[N,S] y) { y = Gemm <transA = 1> (fc_weight, x) }",
        lambda w: w.T,
        ROWS.T.copy(),
        lambda x, w, b: w @ x,
    ),
    "transpose": (
        matmul("t = Transpose <perm = [1, 0]> (fc_weight) y = MatMul (x, t)"),
        lambda w: w,
        X,
        lambda x, w, b: x @ w.T,
    ),
    "transpose-without-perm": (
        matmul("t = Transpose (fc_weight) y = MatMul (x, t)"),
        lambda w: w,
        X,
        lambda x, w, b: x @ w.T,
    ),
    "transpose-twice-identity-and-straight-perm": (
        matmul(
            "a = Transpose <perm = [1, 0]> (fc_weight) b = Identity (a) c = Transpose <perm = [1, 0]> (b) "
            "d = Transpose <perm = [0, 1]> (c) y = MatMul (x, d)"
        ),
        lambda w: w.T,
        X,
        lambda x, w, b: x @ w.T,
    ),
    "fused-matmul": (
        matmul(f"y = {CONTRIB}FusedMatMul <transB = 1, alpha = 0.5> (x, fc_weight)"),
        lambda w: w,
        X,
        lambda x, w, b: 0.5 * (x @ w.T),
    ),
    "fused-gemm": (
        f'g (float[M,K] x) => (float[M2,N] y) {{ y = {CONTRIB}FusedGemm <transB = 1, activation = "Relu"> '
        "(x, fc_weight, fc_bias) }",
        lambda w: w,
        ROWS,
        lambda x, w, b: np.maximum(x @ w.T + b, 0),
    ),
}


@pytest.mark.parametrize("square", [False, True], ids=["wide", "square"])
@pytest.mark.parametrize("case", LINEAR)
def test_linear(case, square, tmp_path):
    """Square weights fit in both orientations: only the operator tells which one is right."""
    text, store, x, answer = LINEAR[case]
    out_dim = IN if square else OUT
    bias = BIAS[:out_dim]
    weight, module = random(out_dim, IN, seed=7), linear("fc", out_dim, IN)
    weights = {"fc.weight": np.ascontiguousarray(store(weight))}
    if "fc_bias" in text:
        weights["fc.bias"] = bias
    base = save(graph(text, weights), tmp_path)
    report = merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    assert report.plan.rows[0].place == "fc.weight"
    wanted = answer(x.astype(np.float64), weight + delta(module), bias)
    (got,) = run(tmp_path / "m.onnx", x=x)
    assert error(got, wanted) < 2e-6
    assert error(run(base, x=x)[0], wanted) > 1e-2


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv(rank, tmp_path):
    kernel, size = (3, 2, 2)[:rank], (7, 6, 5)[:rank]
    weight, module = random(OUT, IN, *kernel, seed=7), conv("c", OUT, IN, *kernel)
    dims = ",".join(["B", "C", *"HWD"[:rank]])
    text = f"g (float[{dims}] x) => (float[{dims.lower()}] y) {{ y = Conv (x, c_weight, c_bias) }}"
    base = save(graph(text, {"c.weight": weight, "c.bias": BIAS}), tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    x = random(2, IN, *size, seed=9)
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    wanted = convolve(*(torch.tensor(v, dtype=torch.float64) for v in (x, weight + delta(module), BIAS)))
    assert error(run(tmp_path / "m.onnx", x=x)[0], wanted.numpy()) < 2e-6
    assert error(run(base, x=x)[0], wanted.numpy()) > 1e-2


def test_embedding(tmp_path):
    table, module = random(10, IN, seed=7), embedding("emb", 10, IN)
    text = "g (int64[N] i) => (float[N,D] y) { y = Gather <axis = 0> (emb_weight, i) }"
    base = save(graph(text, {"emb.weight": table}), tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    ids = np.array([3, 0, 9, 3])
    assert error(run(tmp_path / "m.onnx", i=ids)[0], (table + delta(module))[ids]) < 2e-6


REFUSED = {
    "conv-transpose": (
        "g (float[B,4,H] x) => (float[B,O,L] y) { y = ConvTranspose (x, fc_weight) }",
        {"fc.weight": random(IN, IN, 3)},
        conv("fc", IN, IN, 3),
        "ConvTranspose",
    ),
    "gather-axis-1": (
        "g (int64[N] i) => (float[D,N] y) { y = Gather <axis = 1> (fc_weight, i) }",
        {"fc.weight": random(IN, IN)},
        embedding("fc", IN, IN),
        "Gather",
    ),
    "einsum": (
        matmul('y = Einsum <equation = "bsi,oi->bso"> (x, fc_weight)'),
        {"fc.weight": random(OUT, IN)},
        linear("fc", OUT, IN),
        "Einsum",
    ),
    "reshape": (
        matmul("r = Reshape (fc_weight, shape) y = MatMul (x, r)"),
        {"fc.weight": random(OUT, IN), "shape": np.array([IN, OUT])},
        linear("fc", OUT, IN),
        "Reshape",
    ),
    "scaled-by-a-constant": (
        matmul("s = Mul (fc_weight, two) t = Transpose <perm = [1, 0]> (s) y = MatMul (x, t)"),
        {"fc.weight": random(OUT, IN), "two": np.float32(2)},
        linear("fc", OUT, IN),
        "Mul",
    ),
    "conv-through-a-transpose": (
        "g (float[B,3,H] x) => (float[B,O,L] y) "
        "{ t = Transpose <perm = [0, 2, 1]> (fc_weight) y = Conv (x, t) }",
        {"fc.weight": random(9, 3, 3)},
        conv("fc", 9, 3, 3),
        "Transpose",
    ),
    "matmulnbits": (
        f"g (float[B,32] x) => (float[B,N] y) "
        f"{{ y = {CONTRIB}MatMulNBits <K = 32, N = 6, bits = 4, block_size = 32> (x, fc_weight, scales) }}",
        {"fc.weight": np.zeros((6, 1, 16), np.uint8), "scales": random(6)},
        linear("fc", OUT, 32),
        "MatMulNBits",
    ),
    "dequantize-int8": (
        matmul("w = DequantizeLinear (fc_weight, scale) y = MatMul (x, w)"),
        {"fc.weight": np.ones((IN, OUT), np.int8), "scale": np.float32(0.1)},
        linear("fc", OUT, IN),
        "DequantizeLinear",
    ),
    "dequantize-int8-transposed": (
        matmul("w = DequantizeLinear (fc_weight, scale) t = Transpose (w) y = MatMul (x, t)"),
        {"fc.weight": np.ones((OUT, IN), np.int8), "scale": np.float32(0.1)},
        linear("fc", OUT, IN),
        "DequantizeLinear",
    ),
    "cast-from-int8": (
        matmul("w = Cast <to = 1> (fc_weight) y = MatMul (x, w)"),
        {"fc.weight": np.ones((IN, OUT), np.int8)},
        linear("fc", OUT, IN),
        "INT8",
    ),
    "matmul-integer": (
        "g (uint8[B,4] x) => (int32[B,N] y) { y = MatMulInteger (x, fc_weight) }",
        {"fc.weight": np.ones((IN, OUT), np.int8)},
        linear("fc", OUT, IN),
        "MatMulInteger",
    ),
    "qlinear-matmul": (
        "g (uint8[B,4] x) => (uint8[B,N] y) { y = QLinearMatMul (x, s, z, fc_weight, s, z, s, z) }",
        {"fc.weight": np.ones((IN, OUT), np.uint8), "s": np.float32(0.1), "z": np.uint8(0)},
        linear("fc", OUT, IN),
        "QLinearMatMul",
    ),
    "qgemm": (
        f"g (uint8[B,4] x) => (float[B,N] y) {{ y = {CONTRIB}QGemm (x, s, z, fc_weight, s, z) }}",
        {"fc.weight": np.ones((IN, OUT), np.uint8), "s": np.float32(0.1), "z": np.uint8(0)},
        linear("fc", OUT, IN),
        "QGemm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(case, tmp_path):
    text, weights, module, named = REFUSED[case]
    base = save(graph(text, weights), tmp_path)
    reason = refusals(base, adapter(module), tmp_path)["fc.weight"]
    assert named in reason
    if isinstance(weights["fc.weight"], np.ndarray) and weights["fc.weight"].dtype != np.float32:
        assert "quantised" in reason
        assert "can't be merged into" in reason


def test_int4_weights_are_refused_by_name(tmp_path):
    tensor = ir.Tensor(np.ones((IN, OUT), ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)
    text = matmul("w = DequantizeLinear (fc_weight, scale) y = MatMul (x, w)")
    base = save(graph(text, {"fc.weight": tensor, "scale": np.float32(0.1)}), tmp_path)
    assert "DequantizeLinear" in refusals(base, adapter(linear("fc", OUT, IN)), tmp_path)["fc.weight"]


def test_a_bias_behind_beta_is_not_the_modules(tmp_path):
    base = save(
        graph(gemm("transB = 1, beta = 0.5"), {"fc.weight": random(OUT, IN), "fc.bias": BIAS}), tmp_path
    )
    given = adapter(linear("fc", OUT, IN, lora_bias=random(OUT, seed=4)))
    assert "beta=0.5" in refusals(base, given, tmp_path)["fc.bias"]


BIASED = {
    "gemm": gemm("transB = 1"),
    "add": "g (float[M,K] x) => (float[M2,N] y) "
    "{ t = Transpose (fc_weight) m = MatMul (x, t) y = Add (m, fc_bias) }",
    "add-left": "g (float[M,K] x) => (float[M2,N] y) "
    "{ t = Transpose (fc_weight) m = MatMul (x, t) y = Add (fc_bias, m) }",
}


@pytest.mark.parametrize("case", BIASED)
def test_lora_bias_and_saved_bias(case, tmp_path):
    weight, module = random(OUT, IN, seed=7), linear("fc", OUT, IN, lora_bias=random(OUT, seed=4))
    base = save(graph(BIASED[case], {"fc.weight": weight, "fc.bias": BIAS}), tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    x64 = ROWS.astype(np.float64)
    wanted = x64 @ (weight + delta(module)).T + BIAS + 1.5 * module.lora_bias.astype(np.float64)
    assert error(run(tmp_path / "m.onnx", x=ROWS)[0], wanted) < 2e-6
    saved = random(OUT, seed=5)
    merge_onnx(base, adapter(linear("fc", OUT, IN), extras={"fc.bias": saved}), tmp_path / "s.onnx")
    wanted = x64 @ (weight + delta(module)).T + saved
    assert error(run(tmp_path / "s.onnx", x=ROWS)[0], wanted) < 2e-6


def test_whole_parameters_are_replaced(tmp_path):
    """modules_to_save: a matrix, a convolution's kernel, a norm's weight and bias; a delta comes on top."""
    text = """g (float[B,4,8] x) => (float[B,6,8] y) {
        c = Conv <pads = [1, 1]> (x, c_weight)
        n = LayerNormalization <axis = -1> (c, ln_weight, ln_bias)
        t = Transpose (fc_weight)
        y = MatMul (n, t) }"""
    before = {
        "c.weight": random(6, 4, 3),
        "ln.weight": random(8),
        "ln.bias": random(8, seed=1),
        "fc.weight": random(8, 8),
    }
    base = save(graph(text, before), tmp_path)
    after = {name: random(*values.shape, seed=20 + at) for at, (name, values) in enumerate(before.items())}
    module = linear("fc", 8, 8)
    merge_onnx(base, adapter(module, extras=after), tmp_path / "m.onnx")
    x = random(2, 4, 8, seed=9)
    v = {name: torch.tensor(values, dtype=torch.float64) for name, values in after.items()}
    hidden = torch.conv1d(torch.tensor(x, dtype=torch.float64), v["c.weight"], padding=1)
    hidden = torch.nn.functional.layer_norm(hidden, (8,), v["ln.weight"], v["ln.bias"])
    wanted = hidden @ (v["fc.weight"] + torch.tensor(delta(module))).T
    assert error(run(tmp_path / "m.onnx", x=x)[0], wanted.numpy()) < 2e-6


def test_a_replacement_of_another_shape_is_refused(tmp_path):
    text = "g (float[B,C,H] x) => (float[B,N,L] y) { y = Conv (x, c_weight) }"
    base = save(graph(text, {"c.weight": random(6, 4, 3)}), tmp_path)
    # As many values, in another shape.
    given = adapter(extras={"c.weight": random(6, 3, 4)})
    assert "shapes differ" in refusals(base, given, tmp_path)["c.weight"]


def test_every_shape_mismatch_is_listed(tmp_path):
    text = matmul("h = MatMul (x, a_weight) y = MatMul (h, b_weight)")
    base = save(graph(text, {"a.weight": random(IN, OUT), "b.weight": random(OUT, OUT)}), tmp_path)
    found = refusals(base, adapter(linear("a", OUT, IN + 1), linear("b", OUT + 2, OUT)), tmp_path)
    assert found.keys() == {"a.weight", "b.weight"}
    assert "(6, 4)" in found["a.weight"]
    assert "(6, 5)" in found["a.weight"]
    assert "(6, 6)" in found["b.weight"]
    assert "(8, 6)" in found["b.weight"]


def test_a_batched_constant_is_no_linear_weight(tmp_path):
    base = save(graph(matmul("y = MatMul (x, fc_weight)"), {"fc.weight": random(2, IN, OUT)}), tmp_path)
    assert "shapes differ" in refusals(base, adapter(linear("fc", OUT, IN)), tmp_path)["fc.weight"]


# --- how a weight is stored ---------------------------------------------------------------------------

FLOATS = {
    "float16": (ir.DataType.FLOAT16, torch.float16),
    "bfloat16": (ir.DataType.BFLOAT16, torch.bfloat16),
    "float32": (ir.DataType.FLOAT, torch.float32),
    "float64": (ir.DataType.DOUBLE, torch.float64),
}


@pytest.mark.parametrize("name", FLOATS)
def test_rounded_once_into_the_stored_type(name, tmp_path):
    """The stored bits are torch's rounding of the sum; rank 1 with exact products leaves no other freedom."""
    kind, torch_type = FLOATS[name]
    stored = torch.tensor(random(IN, OUT, seed=7)).to(torch_type)
    bits = stored.view(torch.int16 if stored.element_size() == 2 else stored.dtype).numpy()
    tensor = ir.Tensor(bits.view(kind.numpy()), dtype=kind)
    text = matmul("w = Cast <to = 1> (fc_weight) y = MatMul (x, w)")
    base = save(graph(text, {"fc.weight": tensor}), tmp_path)
    # Few mantissa bits in the factors: their products are exact in float32.
    module = linear("fc", OUT, IN)
    a, b = (
        torch.tensor(m).to(torch.bfloat16).float().numpy() for m in (module.lora_a[:1], module.lora_b[:, :1])
    )
    module = type(module)("fc", "linear", a, b, alpha=2.0, rank=1)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    work = torch.float64 if name == "float64" else torch.float32
    wanted = (stored.to(work) + torch.tensor(delta(module).T).to(work)).to(torch_type)
    got = constants(tmp_path / "m.onnx")["fc.weight"]
    assert got.dtype == kind.numpy()
    assert torch.equal(torch.tensor(got.astype(np.float64)), wanted.double())
    x64 = X.astype(np.float64)
    assert error(run(tmp_path / "m.onnx", x=X)[0], x64 @ wanted.double().numpy()) < 2e-6


@pytest.mark.parametrize("name", ["float32", "float16", "float64"])
def test_values_in_the_typed_fields_of_the_protobuf(name, tmp_path):
    """`float_data`, `int32_data` and `double_data` instead of `raw_data`."""
    import onnx

    kind = {"float32": 1, "float16": 10, "float64": 11}[name]
    values = random(IN, OUT, seed=7).astype(name)
    tensor = onnx.helper.make_tensor("fc.weight", kind, values.shape, values.reshape(-1).tolist())
    assert not tensor.raw_data
    text = matmul("w = Cast <to = 1> (fc_weight) y = MatMul (x, w)")
    proto = ir.to_proto(graph(text, {"fc.weight": values}))
    proto.graph.initializer[0].CopyFrom(tensor)
    base = tmp_path / "base.onnx"
    onnx.save(proto, base)
    module = linear("fc", OUT, IN)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = values.astype(np.float64) + delta(module).T
    got = constants(tmp_path / "m.onnx")["fc.weight"]
    assert got.dtype == name
    assert error(got, wanted) < {"float32": 1e-7, "float16": 1e-3, "float64": 1e-15}[name]


@pytest.mark.parametrize("square", [False, True], ids=["wide", "square"])
def test_weight_in_a_constant_node(square, tmp_path):
    out_dim = IN if square else OUT
    weight, module = random(out_dim, IN, seed=7), linear("fc", out_dim, IN)
    numbers = ", ".join(repr(float(v)) for v in weight.reshape(-1))
    text = (
        "g (float[B,S,4] x) => (float[B,S,N] y) { "
        f"w = Constant <value = float[{out_dim},{IN}] {{{numbers}}}> () "
        "t = Transpose (w) [n] y = MatMul (x, t) }"
    )
    model = graph(text, {}, {"n": "fc"})
    model.graph[0].outputs[0].name = "fc.weight"
    base = save(model, tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (weight + delta(module)).T
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6
