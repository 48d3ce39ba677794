"""Codes of a quantised bias or head stand for values: those are what an adapter's copy is held against."""

import copy

import numpy as np
import onnx
import pytest
import tiny
import torch
from branch_graphs import unoptimised
from onnxruntime.quantization import QuantType
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_graphs import static
from safetensors.numpy import load_file, save_file
from small_graphs import HEAD, adapter, delta, error, graph, linear, random, run, save
from torch import nn

from lora_export import AdapterSession, SiteError, bank_onnx, convert_adapter, swap_onnx

STYLES = {
    "uint8": {"activation_type": QuantType.QUInt8},
    "channels": {"activation_type": QuantType.QInt8, "per_channel": True},
}


class Linears(nn.Module):
    """Of 2-D input its biases are a Gemm's (int32 codes), of 3-D input an Add's (8-bit codes)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 24), nn.Linear(24, 6)

    def forward(self, x):
        """Map ``(…, 16)`` to ``(…, 6)``."""
        return self.head(nn.functional.gelu(self.up(x)))


class Convs(nn.Module):
    """A convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 6)

    def forward(self, x):
        """Map pixels to labels."""
        return self.head(torch.tanh(self.up(x)).mean((2, 3)))


MODELS = {"gemm": (Linears, (8, 16)), "add": (Linears, (4, 5, 16)), "conv": (Convs, (4, 3, 8, 8))}
CHANGES = {
    "bias": {"target_modules": ["up", "head"], "bias": "lora_only"},
    "head": {"target_modules": ["up"], "modules_to_save": ["head"]},
}


class Case:
    """A quantised base, an adapter, and PyTorch's answers with and without it."""

    def __init__(self, name, style, change, folder, dynamo=False):
        make, shape = MODELS[name]
        torch.manual_seed(2)
        self.module, x = make().eval(), torch.randn(shape)
        self.adapter, self.folder, self.feeds = folder / "peft", folder, {"x": x.numpy()}
        given = {"dynamo": True, "optimize": False} if dynamo else {"dynamo": False, "opset_version": 17}
        with tiny.quiet(), torch.no_grad():
            torch.onnx.export(self.module, (x,), folder / "float.onnx", input_names=["x"], **given)
            self.plain = self.module(x).numpy()
        feeds = [{"x": torch.randn(shape).numpy() * 1.5} for _ in range(8)]
        self.base = static(folder / "float.onnx", folder / "base.onnx", feeds, **STYLES[style])
        config = LoraConfig(r=2, lora_alpha=4, **CHANGES[change])
        model = get_peft_model(copy.deepcopy(self.module), config)
        for value in model.parameters():
            if value.requires_grad:
                value.data += torch.randn(value.shape) * 0.15
        model.save_pretrained(self.adapter)
        with torch.no_grad():
            loaded = PeftModel.from_pretrained(copy.deepcopy(self.module), self.adapter).eval()
            self.wanted = loaded(x).numpy()

    def check(self, got):
        """The adapter's effect is there, up to what the ranges of activations lose."""
        (zero,) = run(self.base, **self.feeds)
        effect = self.wanted - self.plain
        assert np.linalg.norm(effect) > 0.2 * np.linalg.norm(self.plain)
        assert np.linalg.norm((got - zero) - effect) < 0.15 * np.linalg.norm(effect)


def dequantised(path, name):
    """Return what ONNX Runtime computes of a bias's codes."""
    model = onnx.load(path)
    (node,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and name in n.input[0])
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    alone = path.parent / "alone.onnx"
    onnx.save(model, alone)
    return alone, node.input[0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MODELS)
def test_swap_session_bank_and_converted_file(name, style, change, tmp_path):
    """Before, the difference to the codes was taken: 1e5 times the effect."""
    case = Case(name, style, change, tmp_path)
    swap = tmp_path / "swap.onnx"
    swap_onnx(case.base, swap, adapter=case.adapter)
    plain = unoptimised(case.base, **case.feeds)[0]
    np.testing.assert_array_equal(unoptimised(swap, **case.feeds)[0], plain)
    # Without VNNI kernels of integers cut sums off, and what is fused into one decides about the bits then.
    got, wanted = run(swap, **case.feeds)[0], run(case.base, **case.feeds)[0]
    if max(error(got, plain), error(wanted, plain)) < 0.02:
        np.testing.assert_array_equal(got, wanted)
    session = AdapterSession(swap)
    session.load_adapter("a", case.adapter)
    case.check(next(iter(session.run(case.feeds, adapter="a").values())))
    convert_adapter(case.adapter, swap, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    case.check(run(swap, **case.feeds, **tensors)[0])
    only, codes = dequantised(case.base, "head.bias")
    kept = {tensor.name: tensor for tensor in onnx.load(case.base).graph.initializer}
    assert kept[codes].data_type != onnx.TensorProto.FLOAT
    (values,) = run(only, **case.feeds)
    trained = load_file(case.adapter / "adapter_model.safetensors")
    (bias,) = (value for key, value in trained.items() if "head" in key and key.endswith("bias"))
    np.testing.assert_allclose(tensors["head.lora_B.bias"], bias - values, atol=1e-7)
    bank_onnx(case.base, {"a": case.adapter}, tmp_path / "bank.onnx", batch_input="x")
    one = np.ones((len(case.wanted), 1), np.float32)
    case.check(run(tmp_path / "bank.onnx", **case.feeds, **{"lora.adapter_weights": one})[0])


def test_a_float_head_with_a_quantised_bias(tmp_path):
    """The quantiser skips a weight behind a Transpose, as torch.onnx without optimisation writes it."""
    case = Case("add", "uint8", "head", tmp_path, dynamo=True)
    swap_onnx(case.base, tmp_path / "swap.onnx", adapter=case.adapter)
    session = AdapterSession(tmp_path / "swap.onnx")
    session.load_adapter("a", case.adapter)
    case.check(next(iter(session.run(case.feeds, adapter="a").values())))


def test_a_bank_whose_slots_are_replaced(tmp_path):
    case = Case("gemm", "channels", "bias", tmp_path)
    bank = tmp_path / "bank.onnx"
    bank_onnx(case.base, {"a": case.adapter}, bank, batch_input="x", resident="inputs")
    session = AdapterSession(bank)
    session.load_adapter("a", case.adapter, replace=True)
    case.check(next(iter(session.run(case.feeds, adapters=["a"] * 8).values())))


def test_codes_are_held_against_the_checkpoint(tmp_path):
    """Codes of another bias have its name, too."""
    case = Case("gemm", "uint8", "bias", tmp_path)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    values = {key: value.detach().numpy() for key, value in case.module.state_dict().items()}
    save_file(values, folder / "model.safetensors")
    report = swap_onnx(case.base, tmp_path / "a.onnx", adapter=case.adapter, checkpoint=folder)
    assert [row.proof for row in report.plan.rows] == ["values"] * 4
    values["head.bias"] = -values["head.bias"]
    save_file(values, folder / "model.safetensors")
    with pytest.raises(SiteError) as caught:
        swap_onnx(case.base, tmp_path / "b.onnx", adapter=case.adapter, checkpoint=folder)
    (line,) = caught.value.problems
    assert line.startswith("head.bias  the vector 'head.bias_quantized'")


OUT, IN = 24, 64
W, X = random(OUT, IN, seed=7), random(3, IN, seed=9)
CODES = np.arange(-12, 12, dtype=np.int8)
TENSORS = {"fc.weight": W, "fc.bias": CODES, "s": np.float32(0.05), "p": np.int8(3)}
B0 = (CODES.astype(np.float64) - 3) * 0.05
READ = "b = DequantizeLinear (fc_bias, s, p)"


def made(folder, lines, more=None, weight="z = MatMul (x, w)"):
    text = f"g (float[b,{IN}] x) => (float[b,n] y) {{ w = Transpose (fc_weight) {weight} {lines} }}"
    head = HEAD.replace('"" : 20', '"" : 21')
    return save(graph(text, {**TENSORS, **(more or {})}, head=head), folder)


def replaced(bias):
    return adapter(linear("fc", OUT, IN), extras={"fc.bias": bias})


@pytest.mark.parametrize(
    "lines",
    [
        f"{READ} y = Add (z, b)",
        "i = Identity (fc_bias) b = DequantizeLinear (i, s, p) y = Add (z, b)",
        f"{READ} h = Cast <to = 10> (b) f = Cast <to = 1> (h) y = Add (z, f)",
    ],
    ids=["plain", "identity before", "casts behind"],
)
def test_ways_of_codes(lines, tmp_path):
    base, bias = made(tmp_path, lines), random(OUT, seed=4)
    (before,) = run(base, x=X)
    swap_onnx(base, tmp_path / "swap.onnx", adapter=replaced(bias))
    session = AdapterSession(tmp_path / "swap.onnx")
    session.load_adapter("a", replaced(bias))
    (got,) = session.run({"x": X}, adapter="a").values()
    wanted = X @ (W + delta(linear("fc", OUT, IN))).T + bias
    assert error(before, X @ W.T + B0) < 1e-3
    assert error(got, wanted) < 1e-3


def test_codes_that_cannot_be_read_are_refused(tmp_path):
    """The scale is computed by the graph."""
    lines = "t = ReduceMax <keepdims = 0> (x) b = DequantizeLinear (fc_bias, t, p) y = Add (z, b)"
    base = made(tmp_path, lines)
    with pytest.raises(SiteError) as caught:
        swap_onnx(base, tmp_path / "swap.onnx", adapter=replaced(random(OUT, seed=4)))
    (line,) = caught.value.problems
    assert line.startswith("fc.bias  the adapter replaces it, and the graph stores codes of it (INT8")
    # What is added to it needs no values.
    given = adapter(linear("fc", OUT, IN, lora_bias=random(OUT, seed=4)))
    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=given)
    assert [row.action for row in report.plan.rows] == ["expose", "expose"]
    with pytest.raises(SiteError, match=r"fc\.bias"):
        convert_adapter(replaced(random(OUT, seed=4)), tmp_path / "swap.onnx", tmp_path / "a.safetensors")


@pytest.mark.parametrize("behind", ["q = QuantizeLinear (z, s, p) r = DequantizeLinear (q, s, p)", ""])
def test_no_second_bias_beside_a_nameless_quantised_one(behind, tmp_path):
    """A bias that is not found by its name, behind codes and roundings, is no dropped bias of zeros."""
    lines = f"{behind} c = DequantizeLinear (other, s, p) y = Add ({'r' if behind else 'z'}, c)"
    base = made(tmp_path, lines, {"other": CODES})
    with pytest.raises(SiteError, match=r"fc\.bias"):
        swap_onnx(base, tmp_path / "swap.onnx", adapter=replaced(random(OUT, seed=4)))


def test_a_dropped_bias_of_a_quantised_weight_is_a_float(tmp_path):
    """Its type is that of the product, not that of the codes."""
    codes = {"fc.weight": CODES[:, None].repeat(IN, 1)}
    base = made(tmp_path, "y = Identity (z)", codes, "d = DequantizeLinear (w, s, p) z = MatMul (x, d)")
    (before,) = run(base, x=X)
    bias = random(OUT, seed=4)
    swap_onnx(base, tmp_path / "swap.onnx", adapter=replaced(bias))
    session = AdapterSession(tmp_path / "swap.onnx")
    session.load_adapter("a", replaced(bias))
    (got,) = session.run({"x": X}, adapter="a").values()
    # ONNX Runtime has other kernels for the two graphs.
    assert error(got, before + X @ delta(linear("fc", OUT, IN)).T + bias) < 5e-3


def test_equal_codes_with_two_scales_are_two_weights(tmp_path):
    """Times a factor, a weight has the same codes and another scale."""
    text = f"""g (float[b,{IN}] x) => (float[b,n] y) {{
        v = DequantizeLinear (fc_weight, s, p) w = Transpose (v) [n1] z = MatMul (x, w)
        v2 = DequantizeLinear (two, s2, p) w2 = Transpose (v2) [n2] u = MatMul (x, w2) y = Add (z, u) }}"""
    codes = CODES[:, None].repeat(IN, 1)
    head = HEAD.replace('"" : 20', '"" : 21')
    for factor, refused in ((1, False), (2, True)):
        tensors = {**TENSORS, "fc.weight": codes, "two": codes, "s2": np.float32(0.05 * factor)}
        base = save(graph(text, tensors, {"n1": "fc", "n2": "fc"}, head=head), tmp_path)
        if refused:
            with pytest.raises(SiteError, match="ambiguous"):
                swap_onnx(base, tmp_path / f"{factor}.onnx", adapter=adapter(linear("fc", OUT, IN)))
        else:
            swap_onnx(base, tmp_path / f"{factor}.onnx", adapter=adapter(linear("fc", OUT, IN)))


def test_one_bank_of_an_adapter_with_lora_on_a_head_and_one_that_replaces_it(tmp_path):
    case = Case("gemm", "uint8", "head", tmp_path)
    model = get_peft_model(copy.deepcopy(case.module), LoraConfig(r=2, target_modules=["head"]))
    model.save_pretrained(tmp_path / "lora")
    bank = tmp_path / "bank.onnx"
    adapters = {"lora": tmp_path / "lora", "head": case.adapter}
    bank_onnx(case.base, adapters, bank, batch_input="x", resident="inputs")
    session = AdapterSession(bank)
    session.load_adapter("head", case.adapter, replace=True)
    case.check(next(iter(session.run(case.feeds, adapters=["head"] * 8).values())))


def test_a_float_bias_that_the_graph_rounds(tmp_path):
    """Fake-quantised: the change is the difference of the floats."""
    lines = "q = QuantizeLinear (fc_bias, s, p) b = DequantizeLinear (q, s, p) y = Add (z, b)"
    old, bias = random(OUT, seed=3) / 3, random(OUT, seed=4) / 3
    base = made(tmp_path, lines, {"fc.bias": old})
    (before,) = run(base, x=X)
    swap_onnx(base, tmp_path / "swap.onnx", adapter=replaced(bias))
    session = AdapterSession(tmp_path / "swap.onnx")
    session.load_adapter("a", replaced(bias))
    (got,) = session.run({"x": X}, adapter="a").values()
    assert error(got - before, X @ delta(linear("fc", OUT, IN)).T + bias - old) < 1e-5
