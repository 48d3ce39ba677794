"""Branches beside convolutions: PyTorch's and PEFT's answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from branch_cases import CONTRIB, RANKS, conv_base, relu
from branch_graphs import (
    TOLERANCE,
    bind,
    check_bits,
    check_swap,
    check_values,
    conv_lora,
    convolve,
    effective,
    magnitude,
    reasons,
    refuse_swap,
    swapped,
    unoptimised,
)
from safetensors.numpy import save_file
from small_graphs import adapter, graph, random, run, save

from lora_export import LoraExportError, SiteError, convert_adapter, merge_checkpoint, merge_onnx, swap_onnx

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


def test_a_whole_convolution_is_refused_by_name(tmp_path):
    base, *_ = conv_base(tmp_path, 4, 4, (3,), "")
    given = adapter(extras={"c.weight": random(4, 4, 3, seed=3)})
    assert "replaces this whole convolution" in reasons(refuse_swap(base, given))["c.weight"]


@pytest.mark.parametrize(("groups", "kernel"), [(2, (3, 3)), (4, (3,)), (2, (1, 1))])
def test_dora_on_a_grouped_convolution_is_called_that(groups, kernel, tmp_path):
    """PEFT's factor there is of B·A without the groups: no graph is written that could not be used."""
    weight, axes = random(8, 8 // groups, *kernel, seed=7), ",".join("abc"[: len(kernel)])
    text = f"g (float[n,8,{axes}] x) => (float[n,8,d,e] y) {{ y = Conv <group = {groups}> (x, c_weight) }}"
    base = save(graph(text, {"c.weight": weight}), tmp_path)
    plain = conv_lora("c", 8, 8, *kernel, rank=4, groups=groups)
    given = adapter(replace(plain, magnitude=magnitude(8)))
    caught = refuse_swap(base, given, dora=True)
    assert f"DoRA on a convolution of {groups} groups" in reasons(caught)["c.weight"]
    assert "without DoRA" in caught.hint
    assert "merge" not in caught.hint
    with pytest.raises(SiteError, match=f"DoRA on a convolution of {groups} groups") as merged:
        merge_onnx(base, given, tmp_path / "merged.onnx")
    assert "swap-onnx" not in str(merged.value.hint)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"c.weight": weight}, folder / "model.safetensors")
    with pytest.raises(LoraExportError, match=f"DoRA on a convolution of {groups} groups") as into_folder:
        merge_checkpoint(folder, given, tmp_path / "merged")
    assert "without DoRA" in into_folder.value.hint
    assert "swap-onnx" not in into_folder.value.hint
    # A graph with DoRA's factor that was made by a module's name says the same of such an adapter.
    swap_onnx(base, tmp_path / "swap.onnx", target_modules=["c"], dora=True)
    with pytest.raises(LoraExportError, match=f"DoRA on a convolution of {groups} groups") as refused:
        convert_adapter(given, tmp_path / "swap.onnx", tmp_path / "a.safetensors")
    assert "without DoRA" in refused.value.hint
