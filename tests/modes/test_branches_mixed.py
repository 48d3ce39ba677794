"""One module, two calls, one of them left in another float type by a tool: each branch follows its call.

So onnxconverter-common's ``float16`` with a ``node_block_list``.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from branch_graphs import (
    banked,
    bind,
    check_bits,
    check_values,
    conv_lora,
    convolve,
    effective,
    lora,
    magnitude,
    run_bank,
    swapped,
    table_lora,
)
from onnxconverter_common import float16
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from small_graphs import adapter, graph, random, run, save
from torch import nn

import lora_export
from lora_export.adapter import Adapter, LoraModule

OUT, IN, BATCH = 6, 8, 3
X, IMAGE = random(BATCH, 4, IN, seed=9), random(BATCH, 4, 6, 5, seed=9)
IDS = np.array([[0, 3, 1], [4, 2, 2], [1, 0, 4]])
WEIGHTS = {
    "linear": random(OUT, IN, seed=7),
    "gemm": random(OUT, IN, seed=7),
    "conv": random(OUT, 4, 3, 3, seed=7),
    "embedding": random(5, OUT, seed=7),
}
BIAS = random(OUT, seed=8)
TYPES = {name: ir.DataType[name] for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")}
WORDS = {"FLOAT": "float", "FLOAT16": "float16", "DOUBLE": "double", "BFLOAT16": "bfloat16"}
# Kind → one call in the low type, another in the high type, which reads the constants through a Cast.
CALLS = {
    "linear": (
        "[once] u0 = MatMul (x, fc_weight) [once_more] u = Add (u0, fc_bias)",
        "[again] z0 = MatMul (x2, wide) [again_more] z = Add (z0, bias)",
        f"b,s,{IN}",
        "b,s,n",
    ),
    "gemm": (
        "[once] u = Gemm (x, fc_weight, fc_bias)",
        "[again] z = Gemm (x2, wide, bias)",
        f"b,{IN}",
        "b,n",
    ),
    "conv": (
        "[once] u = Conv (x, fc_weight, fc_bias)",
        "[again] z = Conv (x2, wide, bias)",
        "b,4,h,w",
        "b,n,h2,w2",
    ),
    "embedding": ("[once] u = Gather (fc_weight, x)", "[again] z = Gather (wide, x)", "b,s", "b,s,n"),
}
# ONNX Runtime has no convolution of doubles.
CELLS = [
    (kind, low, high)
    for low, high in (("FLOAT16", "FLOAT"), ("FLOAT", "DOUBLE"))
    for kind in CALLS
    if (kind, high) != ("conv", "DOUBLE")
]


def base_of(kind, folder, low, high):
    """Return a graph of ``f(x) + f(2·x)``, an embedding's of ``2·f(x)``, and its input."""
    first, second, axes, result = CALLS[kind]
    lower, to = TYPES[low].numpy(), f"Cast <to = {TYPES[high].value}>"
    entry, more = "int64", ""
    weights = {"fc.weight": WEIGHTS[kind].T.copy() if kind in ("linear", "gemm") else WEIGHTS[kind]}
    x = {"conv": IMAGE, "embedding": IDS, "gemm": X[:, 0]}.get(kind, X)
    if kind != "embedding":
        entry, more = WORDS[low], f"xh = {to} (x) x2 = Add (xh, xh) bias = {to} (fc_bias)"
        weights["fc.bias"], x = BIAS, x.astype(lower)
    text = (
        f"g ({entry}[{axes}] x) => ({WORDS[high]}[{result}] y) "
        f"{{ {first} v = {to} (u) wide = {to} (fc_weight) {more} {second} y = Add (v, z) }}"
    )
    tensors = {name: ir.tensor(values.astype(lower)) for name, values in weights.items()}
    names = dict.fromkeys(("once", "once_more", "again", "again_more"), "fc")
    return save(graph(text, tensors, names), folder), x


def made(kind, seed=1, rank=2, **more) -> Adapter:
    if kind == "conv":
        return adapter(conv_lora("fc", OUT, 4, 3, 3, rank=rank, seed=seed, **more))
    if kind == "embedding":
        return adapter(table_lora("fc", 5, OUT, rank, seed=seed, **more))
    return adapter(lora("fc", OUT, IN, rank, seed=seed, **more))


def answer_of(kind, x, *modules: tuple[float, LoraModule]) -> np.ndarray:
    """Compute the definition in float64, with shares of some modules."""
    weight, bias = WEIGHTS[kind].astype(np.float64), BIAS.astype(np.float64)
    for share, module in modules:
        weight = weight + share * (effective(WEIGHTS[kind], module) - WEIGHTS[kind])
        if module.lora_bias is not None:
            bias = bias + share * module.scaling * module.lora_bias
    if kind == "embedding":
        return 2 * weight[x]
    if kind == "conv":
        return 3 * convolve(x, weight) + 2 * bias.reshape(-1, 1, 1)
    return 3 * x.astype(np.float64) @ weight.T + 2 * bias


def tolerance_of(low):
    # Of 11 bits, a few times, or of 24.
    return 5e-3 if low == "FLOAT16" else 2e-6


@pytest.mark.parametrize("extra", ["", "bias", "DoRA"])
@pytest.mark.parametrize(("kind", "low", "high"), CELLS)
def test_swap(kind, extra, low, high, tmp_path):
    if (kind, extra) == ("embedding", "bias"):
        pytest.skip("an embedding has no bias")
    base, x = base_of(kind, tmp_path, low, high)
    factors = {"bias": {"lora_bias": random(OUT, seed=3)}, "DoRA": {"magnitude": magnitude(OUT)}}
    given = made(kind, **factors.get(extra, {}))
    out, report = swapped(base, given, dora=extra == "DoRA")
    assert report.exposed.modules[0].dtype == TYPES[high].numpy().name
    if (kind, extra) == ("conv", "DoRA"):  # in float32 where ONNX Runtime removes casts to float16 and back
        check_values(run(out, x=x), run(base, x=x), tolerance_of(low))
    else:
        check_bits(run(base, x=x), run(out, x=x))
    wanted = answer_of(kind, x, (1, next(iter(given.modules.values()))))
    check_values(run(out, x=x, **bind(given, report, base).tensors), [wanted], tolerance_of(low))


@pytest.mark.parametrize("resident", ["initializers", "inputs"])
@pytest.mark.parametrize("extra", ["", "bias"])
@pytest.mark.parametrize(("kind", "low", "high"), CELLS)
def test_bank(kind, extra, resident, low, high, tmp_path):
    if (kind, extra) == ("embedding", "bias"):
        pytest.skip("an embedding has no bias")
    base, x = base_of(kind, tmp_path, low, high)
    biases = [{"lora_bias": random(OUT, seed=seed)} if extra else {} for seed in (3, 4)]
    given = {"a": made(kind, **biases[0]), "b": made(kind, 2, 3, **biases[1])}
    out, _ = banked(base, given, resident=resident)
    check_bits(run(base, x=x), run_bank(out, np.zeros((BATCH, 2)), {"x": x}))
    shares = np.array([[1, 0], [0, 1], [0.7, -0.5]])
    factors = [next(iter(one.modules.values())) for one in given.values()]
    rows = [answer_of(kind, x, *zip(row, factors, strict=True))[number] for number, row in enumerate(shares)]
    check_values(run_bank(out, shares, {"x": x}), [np.stack(rows)], tolerance_of(low))


@pytest.mark.parametrize("kind", ["linear", "gemm", "embedding"])
def test_bfloat16_is_written_but_not_run(kind, tmp_path):
    """ONNX Runtime's CPU provider lacks its kernels: the checker's inference of types is what can be had."""
    base, _ = base_of(kind, tmp_path, "BFLOAT16", "FLOAT")
    swapped(base, made(kind))
    banked(base, {"a": made(kind), "b": made(kind, 2, 3)})


# --- what a tool makes -------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, OUT)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.shared(x)) - self.shared(x.flip(1)))


class Siamese(nn.Module):
    """One tower of convolutions for two images."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Conv2d(4, 5, 3), nn.Conv2d(5, OUT, 1)

    def forward(self, x):
        return self.last(torch.relu(self.shared(x)) - torch.relu(self.shared(x.flip(-1))))


# The converter writes graphs that can't be loaded for the other calls.
@pytest.mark.parametrize(
    ("model", "x", "operator", "exporter", "number"),
    [
        (Twice, X, "MatMul", "dynamo", 2),
        (Twice, X, "MatMul", "torchscript", 2),
        (Siamese, IMAGE, "Conv", "dynamo", 1),
    ],
)
def test_float16_but_for_one_call(model, x, operator, exporter, number, tmp_path):
    """A call of the shared module that stays in float32, against PEFT in float32."""
    torch.manual_seed(0)
    module, given = model().eval(), torch.tensor(x)
    options = {"dynamo": True, "optimize": False} if exporter == "dynamo" else {"dynamo": False}
    with torch.no_grad():
        torch.onnx.export(module, (given,), tmp_path / "raw.onnx", input_names=["x"], **options)
        peft = get_peft_model(module, LoraConfig(r=2, lora_alpha=3, target_modules=["shared"])).eval()
        for name, values in peft.named_parameters():
            if "lora_" in name:
                values.normal_(0, 0.3)
        expected = peft(given).numpy()
        peft.save_pretrained(tmp_path / "adapter")
    raw = onnx.load(tmp_path / "raw.onnx")
    calls = [node.name for node in raw.graph.node if node.op_type == operator]
    half = float16.convert_float_to_float16(raw, keep_io_types=True, node_block_list=[calls[number]])
    onnx.save(half, tmp_path / "base.onnx")
    base = tmp_path / "base.onnx"
    (before,) = run(base, x=x)
    lora_export.swap_onnx(base, tmp_path / "swap.onnx", adapter=tmp_path / "adapter", checkpoint=False)
    lora_export.convert_adapter(
        tmp_path / "adapter", tmp_path / "swap.onnx", tmp_path / "adapter.safetensors"
    )
    lora_export.bank_onnx(base, {"a": tmp_path / "adapter"}, tmp_path / "bank.onnx", checkpoint=False)
    tensors = load_file(tmp_path / "adapter.safetensors")
    (swap,) = run(tmp_path / "swap.onnx", x=x, **tensors)
    (bank,) = run_bank(tmp_path / "bank.onnx", np.ones((BATCH, 1)), {"x": x})
    effect = np.abs(expected - before).max()
    for actual in (swap, bank):
        assert np.abs(actual - expected).max() < 2e-2 * effect
    check_bits([before], run_bank(tmp_path / "bank.onnx", np.zeros((BATCH, 1)), {"x": x}))
