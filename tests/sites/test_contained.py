"""Convolutions beside a module that are an adapter, or none."""

from __future__ import annotations

import changed_graphs as changed
import numpy as np
import onnx
import pytest
import torch
from small_graphs import adapter, conv, graph, random, save
from torch import nn

from lora_export import LoraExportError, SiteError, merge_onnx


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
