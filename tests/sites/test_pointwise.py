"""A Linear that a tool wrote as a convolution with a kernel of ones, and the other way round."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from branch_graphs import bind
from onnx import helper, numpy_helper
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_graphs import adapter as adapter_of
from small_graphs import conv, graph, linear, random, refusals, run, save
from torch import nn

from lora_export import AdapterSession, bank_onnx, convert_adapter, load_adapter, merge_onnx, swap_onnx
from lora_export.cli import main

TOLERANCE = 2e-6


def as_convolutions(path: Path, out: Path, axes: int) -> Path:
    """Write each Linear of a graph as tools for NPUs do: the features to axis 1, a Conv, and back."""
    model = onnx.load(path)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    shaped = onnx.shape_inference.infer_shapes(model).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in shaped.value_info}
    nodes = []
    for node in model.graph.node:
        name = node.input[1] if node.op_type == "MatMul" and ranks.get(node.input[0]) == 3 else ""
        source = maker.get(name)
        if source is not None and source.op_type == "Transpose" and source.input[0] in weights:
            name, value = source.input[0], weights[source.input[0]]
        else:
            value = weights[name].T if name in weights and weights[name].ndim == 2 else None
        if value is None:
            nodes.append(node)
            continue
        start = f"{node.output[0]}.conv"
        kernel = numpy_helper.from_array(value.reshape(*value.shape, *[1] * axes).copy(), f"{start}.kernel")
        turned = [f"{start}.t", f"{start}.y"]
        if sum(list(other.input).count(name) for other in model.graph.node) == 1:
            # The name stays with the weight, as well as with the node (and its scope).
            kernel.name = name
            (old,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
            model.graph.initializer.remove(old)
            nodes = [other for other in nodes if name not in other.input]
        model.graph.initializer.append(kernel)
        node_x = node.input[0]
        if axes == 2:
            add = numpy_helper.from_array(np.array([2], np.int64), f"{start}.axis")
            model.graph.initializer.append(add)
            perm, back = [0, 3, 2, 1], [0, 3, 2, 1]
            nodes.append(helper.make_node("Unsqueeze", [node_x, add.name], [f"{start}.u"]))
            nodes.append(helper.make_node("Transpose", [f"{start}.u"], [turned[0]], perm=perm))
        else:
            perm, back = [0, 2, 1], [0, 2, 1]
            nodes.append(helper.make_node("Transpose", [node_x], [turned[0]], perm=perm))
        product = helper.make_node("Conv", [turned[0], kernel.name], [turned[1]], node.name)
        product.metadata_props.extend(node.metadata_props)
        nodes.append(product)
        if axes == 2:
            nodes.append(helper.make_node("Transpose", [turned[1]], [f"{start}.b"], perm=back))
            nodes.append(helper.make_node("Squeeze", [f"{start}.b", add.name], [node.output[0]]))
        else:
            nodes.append(helper.make_node("Transpose", [turned[1]], [node.output[0]], perm=back))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out)
    return out


@pytest.mark.parametrize(
    ("arch", "feature", "axes"),
    [
        ("bert", "plain", 1),
        ("bert", "dora", 2),
        ("bert", "lora_bias", 1),
        ("llama", "plain", 2),
        ("llama", "dora", 1),
        ("llama", "patterns", 2),
    ],
)
def test_linears_as_convolutions(arch, feature, axes, tmp_path):
    exporter = "dynamo_noopt"
    base = as_convolutions(tiny.base_onnx(arch, exporter), tmp_path / "base.onnx", axes)
    given = tiny.adapter(arch, feature)
    feeds, wanted = tiny.feeds(arch, base), tiny.reference(arch, given)
    assert tiny.relative_error(tiny.run(base, feeds), tiny.base_reference(arch)) < TOLERANCE
    merge_onnx(base, given, tmp_path / "merged.onnx")
    assert tiny.relative_error(tiny.run(tmp_path / "merged.onnx", feeds), wanted) < TOLERANCE
    # By value, where a checkpoint is given.
    merge_onnx(base, given, tmp_path / "checked.onnx", checkpoint=tiny.checkpoint(arch))
    assert tiny.relative_error(tiny.run(tmp_path / "checked.onnx", feeds), wanted) < TOLERANCE

    swap_onnx(base, tmp_path / "swap.onnx", adapter=given, dora=feature == "dora")
    converted = tmp_path / "a.safetensors"
    convert_adapter(given, tmp_path / "swap.onnx", converted)
    for file in (given, converted):
        with AdapterSession(tmp_path / "swap.onnx") as session:
            session.load_adapter("a", file)
            got = next(iter(session.run(feeds, "a").values()))
        assert tiny.relative_error(got, wanted) < TOLERANCE
    if feature != "dora":
        bank_onnx(base, {"a": given, "b": tiny.adapter(arch, seed=1)}, tmp_path / "bank.onnx")
        rows = np.array([[1, 0], [1, 0]], np.float32)
        got = tiny.run(tmp_path / "bank.onnx", feeds | {"lora.adapter_weights": rows})
        assert tiny.relative_error(got, wanted) < TOLERANCE


# --- Stable Diffusion's proj_in: a convolution or a Linear, by version ------------------------------------


class Spatial(nn.Module):
    """A block of Stable Diffusion's UNet: a projection into tokens, attention, and one back."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.is_linear = linear
        self.norm = nn.GroupNorm(2, 8)
        made = nn.Linear(8, 12) if linear else nn.Conv2d(8, 12, 1)
        self.proj_in = made
        self.to_q, self.to_v = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.proj_out = nn.Linear(12, 8) if linear else nn.Conv2d(12, 8, 1)

    def forward(self, x):
        """Map ``(batch, 8, height, width)`` to the same shape."""
        batch, _, height, width = x.shape
        h = self.norm(x)
        if self.is_linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        h = torch.softmax(self.to_q(h) @ h.transpose(1, 2), -1) @ self.to_v(h)
        if self.is_linear:
            h = self.proj_out(h).transpose(1, 2).reshape(batch, 8, height, width)
        else:
            h = self.proj_out(h.transpose(1, 2).reshape(batch, 12, height, width))
        return x + h


def with_kernels(folder: Path, out: Path, linear: bool) -> Path:
    """Write a PEFT folder's projections in the other form: ``(…, 1, 1)`` or without."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "adapter_model.safetensors")
    for name, value in tensors.items():
        if "proj_" in name and "lora_" in name and "magnitude" not in name:
            tensors[name] = value[:, :, None, None].contiguous() if linear else value.flatten(1).contiguous()
    save_file(tensors, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize("form", ["as it is", "the other form"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
def test_projections_of_stable_diffusion(linear, dynamo, dora, form, tmp_path):
    torch.manual_seed(3)
    model, x = Spatial(linear).eval(), torch.randn(2, 8, 3, 4)
    targets = ["proj_in", "proj_out", "to_v"]
    with tiny.quiet():
        torch.onnx.export(model, (x,), tmp_path / "base.onnx", input_names=["x"], dynamo=dynamo)
        peft = get_peft_model(
            Spatial(linear).eval(), LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora)
        )
    peft.base_model.model.load_state_dict(
        {
            name.replace("proj_in.", "proj_in.base_layer.")
            .replace("proj_out.", "proj_out.base_layer.")
            .replace("to_v.", "to_v.base_layer."): value
            for name, value in model.state_dict().items()
        },
        strict=False,
    )
    for name, value in peft.named_parameters():
        if "lora_" in name:
            value.data = value.data * 0 + torch.randn(value.shape) * 0.3 + ("magnitude" in name)
    peft.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        wanted = peft.eval()(x).numpy()
    given = (
        tmp_path / "peft"
        if form == "as it is"
        else with_kernels(tmp_path / "peft", tmp_path / "other", linear)
    )
    base = tmp_path / "base.onnx"
    merge_onnx(base, given, tmp_path / "merged.onnx")
    (got,) = run(tmp_path / "merged.onnx", x=x.numpy())
    assert tiny.relative_error(got, wanted) < TOLERANCE
    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=given, dora=dora)
    (got,) = run(tmp_path / "swap.onnx", x=x.numpy(), **bind(load_adapter(given), report, base).tensors)
    assert tiny.relative_error(got, wanted) < TOLERANCE
    if not dora:
        bank_onnx(base, {"a": given}, tmp_path / "bank.onnx", batch_input="x")
        feeds = {"x": x.numpy(), "lora.adapter_weights": np.ones((2, 1), np.float32)}
        (got,) = run(tmp_path / "bank.onnx", **feeds)
        assert tiny.relative_error(got, wanted) < TOLERANCE


# --- what is no Linear -----------------------------------------------------------------------------------

CONV = "g (float[B,8,H] x) => (float[B,O,L] y) {{ y = Conv <group = {}> (x, fc_weight) }}"


def test_a_linear_is_no_grouped_or_wider_convolution(tmp_path):
    grouped = save(graph(CONV.format(2), {"fc.weight": random(6, 4, 1)}), tmp_path / "g")
    depthwise = save(graph(CONV.format(8), {"fc.weight": random(8, 1, 1)}), tmp_path / "d")
    wide = save(graph(CONV.format(1), {"fc.weight": random(6, 8, 3)}), tmp_path / "w")
    for base, module in (
        (grouped, linear("fc", 6, 4)),
        (depthwise, linear("fc", 8, 1)),
        (wide, linear("fc", 6, 8)),
    ):
        reason = refusals(base, adapter_of(module), tmp_path / "out")["fc.weight"]
        assert "Conv" in reason or "shapes differ" in reason


def test_a_convolution_is_no_linear_of_another_size(tmp_path):
    text = "g (float[B,8] x) => (float[B,O] y) { y = MatMul (x, fc_weight) }"
    base = save(graph(text, {"fc.weight": random(24, 6)}), tmp_path)
    reason = refusals(base, adapter_of(conv("fc", 6, 8, 3)), tmp_path / "out")["fc.weight"]
    assert reason


def test_parity_finds_the_module_where_a_wrong_adapter_begins(capsys, tmp_path):
    """Values of a convolution lie with their channels first, PyTorch's of the Linear with them last."""
    base = as_convolutions(tiny.base_onnx("bert", "dynamo_noopt"), tmp_path / "base.onnx", 1)
    merge_onnx(base, tiny.adapter("bert", seed=1), tmp_path / "wrong.onnx")
    sides = ["--reference", tiny.checkpoint("bert"), "--candidate", tmp_path / "wrong.onnx"]
    with pytest.raises(SystemExit) as ended:
        main(["parity", *map(str, sides), "--adapter", str(tiny.adapter("bert")), "--samples", "2"])
    assert ended.value.code == 3
    said = capsys.readouterr().out
    (first,) = (line for line in said.splitlines() if line.strip().startswith(">> "))
    assert first.split()[1] == "bert.encoder.layer.0.attention.self.query"
