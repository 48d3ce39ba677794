"""ONNX Runtime's dynamic quantisation: products of each exporter, with and without a checkpoint."""

from __future__ import annotations

import changed_graphs as changed
import numpy as np
import pytest
import torch
from changed_graphs import EXPORTERS
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from lora_export import LoraExportError

D = 16


class Layer(nn.Module):
    def __init__(self, outputs: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(D, outputs, bias)

    def forward(self, x):
        return self.proj(x)


# A Linear on two axes is a Gemm, which the quantiser turns; on three a MatMul.
MODELS = {
    "Gemm": (Layer, (3, D)),
    "square Gemm": (lambda: Layer(D), (3, D)),
    "Gemm without bias": (lambda: Layer(bias=False), (3, D)),
    "MatMul": (Layer, (2, 3, D)),
}


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_adds_what_it_adds_in_pytorch(name, exporter, kind, by_channel, tmp_path):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    wanted = changed.saved(model, x, tmp_path) - model(x).detach().numpy()
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    graph = tmp_path / "graph.onnx"
    quantize_dynamic(tmp_path / "raw.onnx", graph, weight_type=kind, per_channel=by_channel)
    base = changed.run(graph, {"x": x.numpy()})
    for options in ({}, {"checkpoint": tmp_path / "base"}):
        got = changed.outcome(
            "swap", graph, tmp_path / "adapter", x.numpy(), tmp_path / "out.onnx", **options
        )
        assert isinstance(got, np.ndarray), got
        np.testing.assert_allclose(got - base, wanted, atol=1e-4)


@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
def test_a_table_of_codes_is_refused_by_name(exporter, tmp_path):
    """The quantiser looks rows up first and dequantises them then."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Embedding(11, D)).eval(), torch.arange(6).reshape(2, 3)
    changed.saved(model, x, tmp_path, ("0",))
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    quantize_dynamic(tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    for options in ({}, {"checkpoint": tmp_path / "base"}):
        got = changed.outcome(
            "swap", tmp_path / "graph.onnx", tmp_path / "adapter", x.numpy(), tmp_path / "o.onnx", **options
        )
        assert "Gather of " in str(got)
        assert "has quantised weights (Gather)" in str(got)


@pytest.mark.parametrize("mode", changed.MODES)
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
def test_convolutions_of_integers_are_refused_by_name(exporter, mode, tmp_path):
    """And the hint names what a graph with such convolutions can be quantised to instead."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3)).eval(), torch.randn(2, 4, 5, 5)
    changed.saved(model, x, tmp_path, ("0",))
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    quantize_dynamic(tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    for options in ({}, {"checkpoint": tmp_path / "base"}):
        got = changed.outcome(
            mode, tmp_path / "graph.onnx", tmp_path / "adapter", x.numpy(), tmp_path / "o.onnx", **options
        )
        assert isinstance(got, LoraExportError)
        assert "has quantised weights (ConvInteger)" in str(got)
        assert "QDQ" in got.hint
