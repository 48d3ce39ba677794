"""Convolutions beside a module that are an adapter, or none."""

from __future__ import annotations

import changed_graphs as changed
import numpy as np
import onnx
import pytest
import torch
from small_graphs import adapter, conv, graph, random, save
from torch import nn

from lora_export import LoraExportError, SiteError, bank_onnx, merge_onnx, swap_onnx


class Shortcut(nn.Module):
    """ResNet's block: two convolutions beside one of size 1."""

    def __init__(self, kind: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.proj, self.act = nn.Conv2d(4, 8, 1), kind()

    def forward(self, x):
        return torch.relu(self.conv2(self.act(self.conv1(x))) + self.proj(x))


@pytest.mark.parametrize("tool", ["ort-extended", "ort-all"])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.Sigmoid, nn.LeakyReLU, nn.Tanh])
def test_a_block_beside_a_shortcut_is_no_adapter(kind, tool, tmp_path):
    """ONNX Runtime puts the activation between the convolutions into a node."""
    torch.manual_seed(0)
    model, x = Shortcut(kind).eval(), torch.randn(2, 4, 6, 6)
    wanted = changed.saved(model, x, tmp_path)
    graph = changed.changed_graph((None, model, x, None), "dynamo", tool, tmp_path)
    checkpoint = tmp_path / "base"
    got = changed.outcome(
        "merge", graph, tmp_path / "adapter", x.numpy(), tmp_path / "m.onnx", checkpoint=checkpoint
    )
    if tool == "ort-extended":
        assert any(node.domain == "com.microsoft" for node in onnx.load(graph).graph.node)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    else:
        assert isinstance(got, LoraExportError)
        assert "adapter already" not in str(got)


def test_an_adapter_that_is_fused_into_the_convolution_beside_it(tmp_path):
    """ONNX Runtime's FusedConv takes what is added as an input of its own."""
    text = """g (float[1,4,N,N] x) => (float[1,4,N,N] y) {
        [a] a = Conv (x, p)
        [z] z = Conv (a, q)
        [n] y = com.microsoft.FusedConv <activation = "Relu"> (x, proj_weight, , z)
    }"""
    sizes = {"p": (2, 4), "q": (4, 2), "proj.weight": (4, 4)}
    model = graph(
        text,
        {name: random(*size, 1, 1, seed=at) for at, (name, size) in enumerate(sizes.items())},
        dict.fromkeys("azn", "proj"),
    )
    with pytest.raises(SiteError, match="contains an adapter already"):
        merge_onnx(save(model, tmp_path), adapter(conv("proj", 4, 4, 1, 1)), tmp_path / "m.onnx")


class Torchtune(nn.Linear):
    """Keeps the layer's own path, and its factors below it."""

    names = "lora_a", "lora_b"

    def __init__(self) -> None:
        super().__init__(8, 8)
        for name, sizes in zip(self.names, ((8, 2), (2, 8)), strict=True):
            self.add_module(name, nn.Linear(*sizes, bias=False))

    def forward(self, x):
        down, up = (getattr(self, name) for name in self.names)
        return super().forward(x) + 2.0 * up(down(x))


class Unknown(Torchtune):
    """Has names that nobody knows as an adapter's."""

    names = "first", "second"


class Wrapped(nn.Module):
    """NeMo's: the layer beside its adapter, one further down."""

    def __init__(self) -> None:
        super().__init__()
        self.to_wrap = nn.Linear(8, 8)
        self.adapter = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))

    def forward(self, x):
        return self.to_wrap(x) + self.adapter(x)


class Around(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj, self.last = proj, nn.Linear(8, 8)

    def forward(self, x):
        return self.last(torch.tanh(self.proj(x)))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("kind", [Torchtune, Unknown, Wrapped])
def test_factors_below_the_layer_are_an_adapter_in_every_verb(kind, exporter, tmp_path):
    torch.manual_seed(0)
    x, plain = torch.randn(2, 3, 8), Around(nn.Linear(8, 8)).eval()
    layer = kind()
    (layer.to_wrap if kind is Wrapped else layer).load_state_dict(plain.proj.state_dict(), strict=False)
    changed.saved(plain, x, tmp_path)
    graph = changed.changed_graph((None, Around(layer).eval(), x, None), exporter, "none", tmp_path)
    given, out = tmp_path / "adapter", tmp_path / "o.onnx"

    def refused(**options):
        for verb in (
            lambda: merge_onnx(graph, given, out, **options),
            lambda: swap_onnx(graph, out, adapter=given, **options),
            lambda: bank_onnx(graph, {"a": given}, out, **options),
        ):
            with pytest.raises(LoraExportError, match="contains an adapter already"):
                verb()

    refused(checkpoint=tmp_path / "base")
    # By names alone NeMo's has no place at all.
    if kind is not Wrapped:
        refused()


class Beside(nn.Module):
    """A layer, and two without an activation beside it: a model's own low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.proj_low = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))

    def forward(self, x):
        return torch.tanh(self.proj(x) + self.proj_low(x))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_models_own_low_rank_beside_a_layer_is_no_adapter(exporter, tmp_path):
    torch.manual_seed(0)
    model, x = Beside().eval(), torch.randn(2, 3, 8)
    wanted = changed.saved(model, x, tmp_path)
    graph = changed.changed_graph((None, model, x, None), exporter, "none", tmp_path)
    for mode in changed.MODES:
        got = changed.outcome(mode, graph, tmp_path / "adapter", x.numpy(), tmp_path / "o.onnx")
        assert changed.error(got, wanted) < 1e-5
