"""Statically quantised graphs: ranges that were calibrated without the adapter must not cut it off unseen."""

import shutil

import numpy as np
import onnx
import pytest
import tiny
import torch
from branch_graphs import bind, unoptimised
from onnxruntime.quantization import QuantFormat, QuantType
from peft import LoraConfig, get_peft_model
from quantised_graphs import static
from quantised_models import Convs, Gelu
from safetensors.numpy import load_file, save_file
from small_graphs import error, run

from lora_export import SiteError, bank_onnx, load_adapter, merge_onnx, swap_onnx
from lora_export.cli import main

STYLES = {
    "uint8": {"activation_type": QuantType.QUInt8},
    "int8 symmetric": {"activation_type": QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}},
    "pairs of their own": {
        "activation_type": QuantType.QInt8,
        "per_channel": True,
        "extra_options": {"DedicatedQDQPair": True},
    },
}


class Relu(Gelu):
    """ONNX Runtime drops the Relu: the range of what is quantised does its work."""

    def forward(self, x):
        """Map ``(…, 32)`` to the same shape."""
        return self.down(torch.relu(self.up(x)))


# id: (module, shape of x, what the adapter changes)
MODELS = {
    "gelu": (Gelu, (4, 5, 32), ["up", "down"]),
    "no bias": (lambda: Gelu(bias=False), (4, 5, 32), ["up", "down"]),
    "matrices": (Gelu, (6, 32), ["up", "down"]),
    "relu": (Relu, (4, 5, 32), ["up", "down"]),
    "convs": (Convs, (2, 3, 10, 10), ["up", "next", "down"]),
}


def made(name, style, folder, size, **more):
    """Return the adapter, the quantised and the float graph, x, and PyTorch's answers with and without it."""
    torch.manual_seed(1)
    make, shape, targets = MODELS[name]
    model, x, path = make().eval(), torch.randn(shape), folder / "float.onnx"
    with tiny.quiet():
        torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=False, opset_version=17)
        plain = model(x).detach().numpy()
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for key, value in peft.named_parameters():
        if "lora_" in key:
            value.data = torch.randn(value.shape) * size
    peft.save_pretrained(folder / "peft")
    feeds = [{"x": torch.randn(shape).numpy()} for _ in range(16)]
    base = static(
        folder / "float.onnx",
        folder / "base.onnx",
        feeds,
        weight_type=QuantType.QInt8,
        **(STYLES[style] | more),
    )
    with torch.no_grad():
        return folder / "peft", base, path, x.numpy(), peft.eval()(x).numpy(), plain


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MODELS)
def test_the_effect_is_there(name, style, tmp_path):
    """Before, 10–40 % of it were lost: the sum was what is quantised."""
    given, base, _, x, wanted, plain = made(name, style, tmp_path, 0.1)
    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=given)
    check_bits(base, tmp_path / "swap.onnx", x)
    tensors = bind(load_adapter(given), report, base).tensors
    # Kernels of integers cut sums off on processors without VNNI: not what is looked at here.
    (got,), (zero,) = unoptimised(tmp_path / "swap.onnx", x=x, **tensors), unoptimised(base, x=x)
    effect = np.linalg.norm(wanted - plain)
    assert effect > 0.1 * np.linalg.norm(wanted)
    assert np.linalg.norm((got - zero) - (wanted - plain)) / effect < 0.15
    assert error(got, wanted) < 3 * error(zero, plain)
    (warning,) = (text for text in report.plan.warnings if "TorchScript" not in text)
    assert "calibrated without the adapter" in warning
    assert "lora-export parity" in warning


def check_bits(base, swap, x):
    plain = unoptimised(base, x=x)[0]
    np.testing.assert_array_equal(plain, unoptimised(swap, x=x)[0])
    # Without VNNI kernels of integers cut sums off, and what is fused into one decides about the bits then.
    got, wanted = run(swap, x=x)[0], run(base, x=x)[0]
    if max(error(got, plain), error(wanted, plain)) < 0.02:
        np.testing.assert_array_equal(wanted, got)


def test_a_bank_in_a_static_graph(tmp_path):
    given, base, _, x, wanted, plain = made("gelu", "uint8", tmp_path, 0.1)
    report = bank_onnx(base, {"a": given}, tmp_path / "bank.onnx", batch_input="x")
    assert report.plan.warnings
    weights = np.array([[1], [0], [1], [0]], np.float32)
    (got,) = run(tmp_path / "bank.onnx", x=x, **{"lora.adapter_weights": weights})
    (zero,) = run(base, x=x)
    np.testing.assert_array_equal(got[1::2], zero[1::2])
    assert error(got[::2], wanted[::2]) < 3 * error(zero, plain)


def test_codes_of_other_values_are_noticed(tmp_path):
    """A tool has folded a factor into the weight, or it is another checkpoint's."""
    path = tiny.base_onnx("bert", "dynamo")
    base = static(path, tmp_path / "base.onnx", [tiny.feeds("bert", path)], weight_type=QuantType.QInt8)
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint("bert"), folder)
    tensors = load_file(folder / "model.safetensors")
    (key,) = (name for name in tensors if name.endswith("layer.1.attention.self.value.weight"))
    tensors[key] = tensors[key] * 1.25
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SiteError) as caught:
        swap_onnx(base, tmp_path / "swap.onnx", adapter=tiny.adapter("bert"), checkpoint=folder)
    (line,) = caught.value.problems
    assert line.startswith("bert.encoder.layer.1.attention.self.value.weight")


@pytest.mark.parametrize("arch", ["bert", "vit"])
def test_transformers(arch, tmp_path):
    given, path = tiny.adapter(arch), tiny.base_onnx(arch, "dynamo")
    feeds = tiny.feeds(arch, path)
    base = static(path, tmp_path / "base.onnx", [feeds], weight_type=QuantType.QInt8)
    wanted, plain = tiny.reference(arch, given), tiny.base_reference(arch)
    # The quantiser drops what the exporter said of its constants: only their values tell.
    with pytest.raises(SiteError, match="--checkpoint"):
        swap_onnx(base, tmp_path / "swap.onnx", adapter=given)
    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=given, checkpoint=tiny.checkpoint(arch))
    assert all("within the quantiser's steps" in row.reason for row in report.plan.rows)
    tensors = dict(bind(load_adapter(given), report, base).tensors)
    zero = tiny.run(tmp_path / "swap.onnx", feeds)
    np.testing.assert_array_equal(zero, tiny.run(base, feeds))
    got = tiny.run(tmp_path / "swap.onnx", feeds | tensors)
    lost = tiny.relative_error(zero, plain)
    assert tiny.relative_error(got, wanted) < 3 * lost
    assert report.plan.warnings


def test_parity_sees_what_is_cut_off_whatever_the_tolerance(capsys, tmp_path):
    """An adapter that is much larger than the base: the GELU's own ranges cut it off."""
    for size, code in ((0.1, 0), (0.4, 3)):
        folder = tmp_path / str(size)
        folder.mkdir()
        given, base, unquantised, x, *_ = made("gelu", "uint8", folder, size)
        swap_onnx(base, folder / "swap.onnx", adapter=given)
        if error(run(folder / "swap.onnx", x=x)[0], unoptimised(folder / "swap.onnx", x=x)[0]) > 0.02:
            pytest.skip(
                "kernels of integers cut sums off on this processor (no VNNI): every graph fails here"
            )
        swap_onnx(unquantised, folder / "reference.onnx", adapter=given)
        sides = ["--reference", folder / "reference.onnx", "--candidate", folder / "swap.onnx"]
        with pytest.raises(SystemExit) as ended:
            main(["parity", *map(str, sides), "--adapter", str(given), "--tolerance", "20,20"])
        assert ended.value.code == code
        assert ("of the adapter's effect is there" in capsys.readouterr().out) == (code == 3)


def test_a_merge_into_floats_between_fixed_ranges_is_warned_of(tmp_path):
    """Activations alone are quantised: the merge works, and its result passes ranges of the base."""
    given, base, *_ = made("gelu", "uint8", tmp_path, 0.1)
    model = onnx.load(base)
    weights = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    unquantised = onnx.load(tmp_path / "float.onnx")
    kept = {tensor.name: tensor for tensor in unquantised.graph.initializer if len(tensor.dims) == 2}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            name = weights[node.input[1]].input[0].removesuffix("_quantized")
            node.input[1] = name
            model.graph.initializer.append(kept[name])
    onnx.save(model, tmp_path / "floats.onnx")
    report = merge_onnx(tmp_path / "floats.onnx", given, tmp_path / "merged.onnx")
    assert "calibrated without the adapter" in report.plan.warnings[0]


@pytest.mark.parametrize(
    ("name", "operators"), [("gelu", ["QLinearMatMul"]), ("convs", ["QGemm", "QLinearConv"])]
)
def test_operators_on_integers_are_named(name, operators, tmp_path):
    given, base, *_ = made(name, "uint8", tmp_path, 0.1, quant_format=QuantFormat.QOperator)
    for command in (swap_onnx, merge_onnx):
        more = {"adapter": given} if command is swap_onnx else {"adapters": given}
        with pytest.raises(SiteError) as caught:
            command(base, output=tmp_path / "out.onnx", **more)
        assert all(operator in str(caught.value) for operator in operators)
        assert "QDQ" in caught.value.hint
