"""Branches beside quantised weights: they read the activation as it was before any quantisation."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import torch
from branch_graphs import (
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
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from peft import LoraConfig, get_peft_model
from small_graphs import HEAD, adapter, graph, random, run, save
from torch import nn

from lora_export import AdapterSession, merge_onnx, swap_onnx

OUT, IN, BLOCK = 24, 64, 32
W, BIAS, X = random(OUT, IN, seed=7) / 5, random(OUT, seed=8), random(2, 3, IN, seed=9)
CONTRIB = "com.microsoft."
HEAD21 = HEAD.replace('"" : 20', '"" : 21')
# An accumulation in float32 of quantised products: ONNX Runtime's own kernels against float64.
KERNEL = 2e-6


def one(text, axes="a,b", n="n"):
    return f"g (float[{axes},{IN}] x) => (float[{axes},{n}] y) {{ {text} }}"


# --- com.microsoft.MatMulNBits -----------------------------------------------------------------------


def nbits(weight, bits, zero_points, dtype=np.float32):
    """Quantise as ONNX Runtime's ``ContribOperators.md`` says it.

    Returns:
        The packed weight ``(N, blocks, bytes)``, scales, packed zero points or None, and the values that the
        operator computes with.
    """
    n, k = weight.shape
    blocks, top = weight.reshape(n, k // BLOCK, BLOCK), 2**bits - 1
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    if zero_points:
        scale = ((high - low) / top).astype(dtype)
        zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, top)
    else:
        scale = (np.maximum(-low, high) / (top // 2)).astype(dtype)
        zero = np.full_like(low, 2 ** (bits - 1))
    wide = scale.astype(np.float32)
    quantised = np.clip(np.rint(blocks / wide) + zero, 0, top)
    values = ((quantised - zero).astype(np.float64) * scale.astype(np.float64)).reshape(n, k)
    packed = quantised.astype(np.uint8)
    points = zero[..., 0].astype(np.uint8)
    if bits == 4:
        packed = packed[..., ::2] | packed[..., 1::2] << 4
        points = points[..., ::2] | points[..., 1::2] << 4
    return packed, scale[..., 0], points if zero_points else None, values


def nbits_base(folder, bits=4, zero_points=False, bias=False, name="fc", behind="", weight=W):
    packed, scales, points, values = nbits(weight, bits, zero_points)
    n, k = weight.shape
    inputs = [f"{name}_weight_Q", f"{name}_scales", f"{name}_zero" if zero_points else ""]
    inputs += ["", f"{name}_bias"] if bias else []
    attributes = f"K = {k}, N = {n}, bits = {bits}, block_size = {BLOCK}"
    out = "z" if behind else "y"
    text = one(
        f"[n1] {out} = {CONTRIB}MatMulNBits <{attributes}> (x, {', '.join(inputs).rstrip(', ')}) {behind}"
    )
    weights = {f"{name}.weight.Q": packed, f"{name}.scales": scales}
    weights |= {f"{name}.zero": points} if zero_points else {}
    weights |= {f"{name}.bias": random(n, seed=8)} if bias or "fc_bias" in behind else {}
    return save(graph(text, weights, {"n1": name}), folder), values


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits(bits, zero_points, bias, tmp_path):
    base, values = nbits_base(tmp_path, bits, zero_points, bias)

    def answer(modules):
        y = X.astype(np.float64) @ effective(values, modules.get("fc")).T
        return [y + (BIAS if bias else 0)]

    given, *others = (adapter(lora("fc", OUT, IN, rank)) for rank in (2, 1, 5))
    report = check_swap(base, given, answer, {"x": X}, *others, tolerance=KERNEL)
    check_swap(base, given, answer, {"x": X}, *others, tolerance=KERNEL, target_modules=["fc"])
    assert not report.exposed.modules[0].members[0].stored
    # A merge has to refuse what the branch can do, and says so.
    with pytest.raises(Exception, match="quantised") as caught:
        merge_onnx(base, given, tmp_path / "merged.onnx")
    assert "swap-onnx" in caught.value.hint


@pytest.mark.parametrize("behind", ["Add", "Add-Relu"])
def test_matmul_nbits_with_its_bias_behind_it(behind, tmp_path):
    lines = "u = Add (z, fc_bias) y = Relu (u)" if behind == "Add-Relu" else "y = Add (z, fc_bias)"
    base, values = nbits_base(tmp_path, behind=lines)

    def answer(modules):
        y = X.astype(np.float64) @ effective(values, modules.get("fc")).T + BIAS
        return [np.maximum(y, 0) if behind == "Add-Relu" else y]

    check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": X}, tolerance=KERNEL)


@pytest.mark.parametrize("changed", ["qkv", "qv", "k"])
@pytest.mark.parametrize("pack", [False, True], ids=["single", "pack"])
def test_parts_of_a_fused_quantised_weight(changed, pack, tmp_path):
    spans = {"q": (0, 16), "k": (16, 20), "v": (20, 24)}
    base, values = nbits_base(tmp_path, name="a.qkv_proj".replace(".", "_"))
    base = rename(base, "a_qkv_proj", "a.qkv_proj")

    def answer(modules):
        full = values.copy()
        for name, (start, stop) in spans.items():
            full[start:stop] = effective(values[start:stop], modules.get(f"a.{name}_proj"))
        return [X.astype(np.float64) @ full.T]

    modules = [
        lora(f"a.{name}_proj", stop - start, IN, seed=start + 1)
        for name, (start, stop) in spans.items()
        if name in changed
    ]
    check_swap(base, adapter(*modules), answer, {"x": X}, tolerance=KERNEL, pack=pack)


def rename(path, old, new):
    model = ir.load(path)
    for node in model.graph:
        text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props["pkg.torch.onnx.name_scopes"] = text.replace(old, new)
    return save(model, path.parent, "renamed.onnx")


def test_a_converted_dora_factor_leaves_the_bias_of_matmul_nbits_alone(tmp_path):
    """W0 is quantised, so that nobody computes the factor from it; a graph with factors takes a given one."""
    base, values = nbits_base(tmp_path, bias=True)
    plain = adapter(lora("fc", OUT, IN))
    out, report = swapped(base, plain, dora=True)
    module, factor = plain.modules["fc.weight"], np.abs(magnitude(OUT))
    tensors = bind(plain, report, base).tensors | {"fc.lora_scale.weight": factor}
    wanted = X.astype(np.float64) @ (effective(values, module) * factor[:, None]).T + BIAS
    check_bits(run(base, x=X), run(out, x=X))
    check_values(run(out, x=X, **tensors), [wanted], KERNEL)


def test_dora_needs_an_unquantised_weight(tmp_path):
    base, _ = nbits_base(tmp_path)
    given = adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))
    assert "needs W0, which is quantised" in reasons(refuse_swap(base, given, dora=True))["fc.weight"]
    # Nor with a graph that was made like a plain adapter.
    _, report = swapped(base, adapter(lora("fc", OUT, IN)), dora=True)
    with pytest.raises(Exception, match="no place") as caught:
        bind(given, report, base)
    assert "it is quantised" in reasons(caught.value)["fc.weight"]


# --- DequantizeLinear --------------------------------------------------------------------------------


def int8_columns(weight):
    """Stored ``(in, out)``, a scale for each output."""
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    values = np.rint(weight / scale[:, None]).astype(np.int8)
    return values.T.copy(), scale, values.astype(np.float64) * scale.astype(np.float64)[:, None]


def int4_blocks(weight):
    """Stored ``(in, out)``, a scale for each block of 32 inputs."""
    blocks = weight.T.reshape(IN // BLOCK, BLOCK, OUT)
    scale = (np.abs(blocks).max(1, keepdims=True) / 7).astype(np.float32)
    values = np.rint(blocks / scale)
    stored = values.reshape(IN, OUT).astype(ml_dtypes.int4)
    return stored, scale[:, 0], (values * scale.astype(np.float64)).reshape(IN, OUT).T


def fp8_tensor(weight):
    """Stored ``(in, out)``, one scale."""
    scale = np.array(np.abs(weight).max() / 448, np.float32)
    values = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    return values.T.copy(), scale, values.astype(np.float64) * np.float64(scale)


# id: (quantiser, dtype, attributes of DequantizeLinear)
DEQUANTISED = {
    "int8-per-channel": (int8_columns, ir.DataType.INT8, "axis = 1"),
    "int4-blocked": (int4_blocks, ir.DataType.INT4, "axis = 0, block_size = 32"),
    "float8": (fp8_tensor, ir.DataType.FLOAT8E4M3FN, "axis = 1"),
}


def dequantised(case, weight=W):
    quantise, dtype, attributes = DEQUANTISED[case]
    stored, scale, values = quantise(weight)
    tensors = {"fc.weight": ir.tensor(stored, dtype=dtype), "fc.scale": scale}
    return tensors, f"w = DequantizeLinear <{attributes}> (fc_weight, fc_scale)", values


FUSES_BIAS = (
    "ONNX Runtime makes one MatMulNBits of DequantizeLinear, MatMul and Add, and adds the bias inside; the "
    "branch keeps the Add apart: 2e-7"
)


def dequantised_base(case, bias, folder):
    tensors, line, values = dequantised(case)
    behind = "z = MatMul (x, w) y = Add (z, fc_bias)" if bias else "y = MatMul (x, w)"
    tensors |= {"fc.bias": BIAS} if bias else {}
    return save(graph(one(f"{line} {behind}"), tensors, head=HEAD21), folder), values


@pytest.mark.parametrize("case", DEQUANTISED)
def test_dequantize_linear(case, tmp_path):
    """ONNX Runtime makes a MatMulNBits of it, which may round activations: values are those of the nodes."""
    base, values = dequantised_base(case, False, tmp_path)

    def answer(modules):
        return [X.astype(np.float64) @ effective(values, modules.get("fc")).T]

    given, other = (adapter(lora("fc", OUT, IN, rank)) for rank in (2, 3))
    report = check_swap(base, given, answer, {"x": X}, other, evaluate=unoptimised)
    # As ONNX Runtime runs it, the difference to the base is the adapter's.
    out = report.outputs["graph"]
    (plain,), (adapted,) = run(base, x=X), run(out, x=X, **bind(given, report, base).tensors)
    change = answer({"fc": given.modules["fc.weight"]})[0] - answer({})[0]
    check_values([adapted - plain], [change], KERNEL)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=() if case == "float8" else pytest.mark.xfail(strict=True, reason=FUSES_BIAS)
        )
        for case in DEQUANTISED
    ],
)
def test_bits_of_a_dequantised_weight_with_a_bias(case, tmp_path):
    base, _ = dequantised_base(case, True, tmp_path)
    out, _ = swapped(base, adapter(lora("fc", OUT, IN)))
    check_bits(run(base, x=X), run(out, x=X))


@pytest.mark.parametrize("case", DEQUANTISED)
def test_dequantize_linear_with_a_bias(case, tmp_path):
    base, values = dequantised_base(case, True, tmp_path)
    given = adapter(lora("fc", OUT, IN))
    out, report = swapped(base, given)
    check_bits(unoptimised(base, x=X), unoptimised(out, x=X))
    wanted = X.astype(np.float64) @ effective(values, given.modules["fc.weight"]).T + BIAS
    check_values(unoptimised(out, x=X, **bind(given, report, base).tensors), [wanted], KERNEL)


@pytest.mark.parametrize("operator", ["Transpose", "Gemm"])
def test_a_dequantised_weight_as_pytorch_holds_it(operator, tmp_path):
    stored, scale, values = int8_columns(W)
    tensors = {"fc.weight": stored.T.copy(), "fc.scale": scale}
    line = "w = DequantizeLinear <axis = 0> (fc_weight, fc_scale)"
    x = X[0]
    if operator == "Gemm":
        text = one(f"{line} y = Gemm <transB = 1> (x, w, fc_bias)", "a")
        tensors["fc.bias"] = BIAS
    else:
        text = one(f"{line} t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", "a")
    base = save(graph(text, tensors), tmp_path)

    def answer(modules):
        return [x.astype(np.float64) @ effective(values, modules.get("fc")).T + tensors.get("fc.bias", 0)]

    check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": x}, tolerance=KERNEL)


def test_a_dequantised_conv_and_embedding(tmp_path):
    """The table is dequantised whole before Gather; the convolution's kernel per output channel."""
    table, kernel = random(11, 8, seed=3), random(6, 8, 3, seed=4)
    scales = {"e": np.abs(table).max() / 127, "c": np.abs(kernel).max((1, 2)) / 127}
    stored_table = np.rint(table / scales["e"]).astype(np.int8)
    stored_kernel = np.rint(kernel / scales["c"][:, None, None]).astype(np.int8)
    text = (
        "g (int64[a,b] ids) => (float[a,n,b] y) { t = DequantizeLinear (e_weight, e_scale) "
        "h = Gather (t, ids) s = Transpose <perm = [0, 2, 1]> (h) "
        "w = DequantizeLinear <axis = 0> (c_weight, c_scale) y = Conv <pads = [1, 1]> (s, w) }"
    )
    weights = {"e.weight": stored_table, "e.scale": np.float32(scales["e"])[()].reshape(())}
    weights |= {"c.weight": stored_kernel, "c.scale": scales["c"].astype(np.float32)}
    base = save(graph(text, {name: np.asarray(value) for name, value in weights.items()}), tmp_path)
    ids = np.array([[1, 2, 3], [4, 5, -1]])
    values = stored_table * np.float64(np.float32(scales["e"]))
    taps = stored_kernel * scales["c"].astype(np.float32).astype(np.float64)[:, None, None]

    def answer(modules):
        hidden = effective(values, modules.get("e"))[ids].swapaxes(1, 2)
        return [convolve(hidden, effective(taps, modules.get("c")), padding=1)]

    given = adapter(table_lora("e", 11, 8), conv_lora("c", 6, 8, 3))
    check_swap(base, given, answer, {"ids": ids}, adapter(table_lora("e", 11, 8, 3)), tolerance=KERNEL)


# --- quantised activations ---------------------------------------------------------------------------

QDQ = "q = QuantizeLinear (x, x_scale, x_zero) xq = DequantizeLinear (q, x_scale, x_zero)"
SCALES = {"x.scale": np.array(0.03, np.float32), "x.zero": np.array(3, np.int8)}


def qdq(x):
    rounded = np.clip(np.rint(x / SCALES["x.scale"]) + 3, -128, 127) - 3
    return rounded.astype(np.float64) * np.float64(SCALES["x.scale"])


def qdq_base(folder, behind=""):
    tensors, line, values = dequantised("int8-per-channel")
    out = "z" if behind else "y"
    text = one(f"{QDQ} {line} {out} = MatMul (xq, w) {behind}")
    return save(graph(text, tensors | SCALES), folder), values


def test_the_branch_reads_the_unquantised_activation(tmp_path):
    base, values = qdq_base(tmp_path)
    given = adapter(lora("fc", OUT, IN))
    out, report = swapped(base, given)
    change = effective(values, given.modules["fc.weight"]) - values
    wanted = qdq(X) @ values.T + X.astype(np.float64) @ change.T
    check_bits(run(base, x=X), run(out, x=X))
    check_values(unoptimised(base, x=X), [qdq(X) @ values.T], KERNEL)
    check_values(unoptimised(out, x=X, **bind(given, report, base).tensors), [wanted], KERNEL)
    down = next(node for node in ir.load(out).graph if node.name == "fc.lora.down.MatMul")
    assert down.inputs[0].name == "x"


REQUANTISED = "z2 = QuantizeLinear (z, x_scale, x_zero) y = DequantizeLinear (z2, x_scale, x_zero)"


def test_between_quantised_values(tmp_path):
    """The base says the same to the bit, and the range of its result does not cut the branch off."""
    base, values = qdq_base(tmp_path, REQUANTISED)
    given = adapter(lora("fc", OUT, IN))
    out, report = swapped(base, given)
    many = random(8, 30, IN, seed=3)
    check_bits(run(base, x=many), run(out, x=many))
    check_bits(unoptimised(base, x=X), unoptimised(out, x=X))
    change = effective(values, given.modules["fc.weight"]) - values
    wanted = qdq(qdq(X) @ values.T) + X.astype(np.float64) @ change.T
    assert np.abs(wanted).max() > 128 * SCALES["x.scale"]
    (got,) = unoptimised(out, x=X, **bind(given, report, base).tensors)
    # One step where a value lies on the edge.
    assert np.abs(got - wanted).max() < 1.01 * SCALES["x.scale"]
    assert np.mean(np.abs(got - wanted) < 1e-5) > 0.99
    # Nothing behind the sum is quantised.
    assert not report.plan.warnings


# --- integers, quantised while it runs ---------------------------------------------------------------

STORED, COLUMN_SCALES, INT8_VALUES = int8_columns(W)
DYNAMIC = "q, s, p = DynamicQuantizeLinear (x) "
CASTS = "c = Cast <to = 1> (i) f = Mul (s, fc_scale) "
# id: (graph behind x, does ONNX Runtime's own fusion leave the base's bits alone)
INTEGER_PRODUCTS = {
    "MatMulInteger": f"{DYNAMIC} i = MatMulInteger (q, fc_weight, p) {CASTS} y = Mul (c, f)",
    "MatMulInteger-bias": (
        f"{DYNAMIC} i = MatMulInteger (q, fc_weight, p) {CASTS} z = Mul (f, c) y = Add (z, fc_bias)"
    ),
    "MatMulIntegerToFloat": (
        f"{DYNAMIC} y = {CONTRIB}MatMulIntegerToFloat (q, fc_weight, s, fc_scale, p, , fc_bias)"
    ),
    "DynamicQuantizeMatMul": f"y = {CONTRIB}DynamicQuantizeMatMul (x, fc_weight, fc_scale, , fc_bias)",
}


@pytest.mark.parametrize("case", INTEGER_PRODUCTS)
def test_integer_products(case, tmp_path):
    """The branch reads the floats before the quantiser and is added to the float product."""
    text = INTEGER_PRODUCTS[case]
    weights = {"fc.weight": STORED, "fc.scale": COLUMN_SCALES}
    weights |= {"fc.bias": BIAS} if "fc_bias" in text else {}
    base = save(graph(one(text), weights), tmp_path)
    given, other = (adapter(lora("fc", OUT, IN, rank)) for rank in (2, 3))
    out, report = swapped(base, given)
    check_bits(run(base, x=X), run(out, x=X))
    check_bits(unoptimised(base, x=X), unoptimised(out, x=X))
    for one_of_them in (given, other):
        change = effective(INT8_VALUES, one_of_them.modules["fc.weight"]) - INT8_VALUES
        wanted = run(base, x=X)[0] + X.astype(np.float64) @ change.T
        check_values(run(out, x=X, **bind(one_of_them, report, base).tensors), [wanted], KERNEL)


@pytest.mark.parametrize("case", ["MatMulIntegerToFloat", "DynamicQuantizeMatMul"])
def test_a_dora_factor_leaves_the_bias_of_integer_products_alone(case, tmp_path):
    weights = {"fc.weight": STORED, "fc.scale": COLUMN_SCALES, "fc.bias": BIAS}
    base = save(graph(one(INTEGER_PRODUCTS[case]), weights), tmp_path)
    given, factor = adapter(lora("fc", OUT, IN)), np.abs(magnitude(OUT))
    out, report = swapped(base, given, dora=True)
    check_bits(run(base, x=X), run(out, x=X))
    tensors = bind(given, report, base).tensors | {"fc.lora_scale.weight": factor}
    change = X.astype(np.float64) @ (effective(INT8_VALUES, given.modules["fc.weight"]) - INT8_VALUES).T
    wanted = (run(base, x=X)[0] - BIAS + change) * factor + BIAS
    check_values(run(out, x=X, **tensors), [wanted], KERNEL)


# --- what has no branch ------------------------------------------------------------------------------

INT8, SCALE = np.rint(W * 60).astype(np.int8), np.array(1 / 60, np.float32)
# id: (graph, weights, words)
REFUSED = {
    "MatMulInteger": (
        one("q, s, p = DynamicQuantizeLinear (x) i = MatMulInteger (q, fc_weight, p) y = Cast <to = 1> (i)"),
        {"fc.weight": INT8.T.copy()},
        "MatMulInteger without the Cast and Mul",
    ),
    "QLinearMatMul": (
        one(
            "q = QuantizeLinear (x, s, p) i = QLinearMatMul (q, s, p, fc_weight, s, p, s, p) "
            "y = DequantizeLinear (i, s, p)"
        ),
        {"fc.weight": INT8.T.copy(), "s": SCALE, "p": np.array(0, np.int8)},
        "QLinearMatMul: no branch is known for it",
    ),
    "MatMulInteger-static": (
        one(
            "q = QuantizeLinear (x, s, p) i = MatMulInteger (q, fc_weight, p) c = Cast <to = 1> (i) "
            "f = Mul (s, s) y = Mul (c, f)"
        ),
        {"fc.weight": INT8.T.copy(), "s": SCALE, "p": np.array(0, np.int8)},
        "not by both scales at once",
    ),
    "MatMulInteger-two-scales": (
        one(
            "q, s, p = DynamicQuantizeLinear (x) i = MatMulInteger (q, fc_weight, p) c = Cast <to = 1> (i) "
            "h = Mul (c, s) y = Mul (h, w)"
        ),
        {"fc.weight": INT8.T.copy(), "w": SCALE},
        "not by both scales at once",
    ),
    "cast": (
        one("w = Cast <to = 1> (fc_weight) y = MatMul (x, w)"),
        {"fc.weight": INT8.T.copy()},
        "MatMul of INT8 values: no branch is known for it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_operators_without_a_branch(case, tmp_path):
    text, weights, words = REFUSED[case]
    base = save(graph(text, weights), tmp_path)
    caught = refuse_swap(base, adapter(lora("fc", OUT, IN)))
    assert words in reasons(caught)["fc.weight"]
    # Whoever swaps is not told to swap.
    assert "swap-onnx" not in caught.hint
    assert "merged into" not in str(caught)


def test_some_places_are_quantised_beyond_a_branch(tmp_path):
    text, weights, _ = REFUSED["MatMulInteger"]
    text = text.replace("y = Cast", "z = Cast").replace("(i) }", "(i) y = MatMul (z, up_weight) }")
    up = random(8, OUT, seed=4)
    base = save(graph(text, weights | {"up.weight": up.T.copy()}), tmp_path)
    given = adapter(lora("fc", OUT, IN), lora("up", 8, OUT, seed=2))
    assert list(reasons(refuse_swap(base, given))) == ["fc.weight"]
    _, report = swapped(base, given, allow_unmatched=True)
    assert [row.action for row in report.plan.rows] == ["expose", "refused"]


def test_a_whole_copy_of_packed_codes(tmp_path):
    """The hint does not propose what was given; the bias is lost with its weight."""
    base, _ = nbits_base(tmp_path, bias=True)
    extras = {"fc.weight": random(OUT, IN, seed=3), "fc.bias": random(OUT, seed=4)}
    caught = refuse_swap(base, adapter(extras=extras))
    lines = reasons(caught)
    assert "MatMulNBits" in lines["fc.weight"]
    assert lines["fc.bias"] == "it goes with its module's weight, which has no place"
    assert "nodes_to_exclude" in caught.hint
    assert "MatMulNBits" not in caught.hint


class Linears(nn.Module):
    """Two Linears, whose weights ONNX Runtime's quantiser packs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        """Map ``(…, 32)`` to the same shape."""
        return self.down(nn.functional.gelu(self.up(x)))


def test_what_the_bnb4_quantiser_writes(tmp_path):
    """Its weights are one row of bytes, and it has suffixes of its own."""
    torch.manual_seed(1)
    model, x = Linears().eval(), torch.randn(4, 5, 32)
    with tiny.quiet(), torch.no_grad():
        torch.onnx.export(model, (x,), tmp_path / "float.onnx", input_names=["x"], dynamo=False)
        plain = model(x).numpy()
    quantiser = MatMulBnb4Quantizer(onnx.load(tmp_path / "float.onnx"), 1, 32)
    quantiser.process()
    quantiser.model.save_model_to_file(str(tmp_path / "base.onnx"))
    base = tmp_path / "base.onnx"
    assert sum(node.op_type == "MatMulBnb4" for node in onnx.load(base).graph.node) == 2
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["up", "down"]))
    for key, value in peft.named_parameters():
        if "lora_" in key:
            value.data = torch.randn(value.shape) * 0.2
    peft.save_pretrained(tmp_path / "peft")
    swap_onnx(base, tmp_path / "swap.onnx", adapter=tmp_path / "peft")
    session = AdapterSession(tmp_path / "swap.onnx")
    session.load_adapter("a", tmp_path / "peft")
    (got,) = session.run({"x": x.numpy()}, adapter="a").values()
    (zero,) = run(base, x=x.numpy())
    with torch.no_grad():
        effect = peft.eval()(x).numpy() - plain
    assert np.linalg.norm((got - zero) - effect) < 0.2 * np.linalg.norm(effect)
