"""A module that is called twice may have its weight in a graph twice: merged in both places, or refused."""

import copy

import changed_graphs
import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_export import SiteError, merge_onnx, swap_onnx


class Pooled(nn.Module):
    """One Linear on tokens, in three dimensions, and on their mean, in two."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.proj(x)) * self.proj(x.mean(1)).unsqueeze(1))


class OnConstant(nn.Module):
    """One Linear on tokens and on a table of the model's, which an exporter can compute."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.proj = nn.Parameter(torch.randn(3, 16)), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) @ self.proj(self.table).T


class Twins(nn.Module):
    """Two modules with equal weights: none of them is a call of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.other.load_state_dict(self.proj.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.proj(x)) + self.other(x.mean(1)).unsqueeze(1)


@pytest.fixture(params=[Pooled, OnConstant, Twins])
def case(request, tmp_path):
    """Make a model, its checkpoint and adapter, an input and what PEFT answers."""
    torch.manual_seed(0)
    model, x = request.param().eval(), torch.randn(2, 3, 16)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    config = peft.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return model, x, adapted(x).numpy()


@pytest.mark.parametrize("by_value", [False, True], ids=["by name", "by value"])
@pytest.mark.parametrize("optimize", [True, False], ids=["optimised", "plain"])
def test_both_calls_are_changed_or_none(case, optimize, by_value, tmp_path):
    model, x, wanted = case
    graph = tmp_path / "graph.onnx"
    torch.onnx.export(
        model, (x,), str(graph), input_names=["x"], verbose=False, dynamo=True, optimize=optimize
    )
    options = {"checkpoint": tmp_path / "base"} if by_value else {}
    if optimize and not isinstance(model, Twins):
        for make in (
            lambda: merge_onnx(graph, tmp_path / "adapter", tmp_path / "out.onnx", **options),
            lambda: swap_onnx(graph, tmp_path / "out.onnx", adapter=tmp_path / "adapter", **options),
        ):
            with pytest.raises(SiteError, match=r"optimize=False|found in 2 places") as error:
                make()
            assert "proj" in str(error.value)
            assert not (tmp_path / "out.onnx").exists()
        return
    merge_onnx(graph, tmp_path / "adapter", tmp_path / "out.onnx", **options)
    (got,) = ort.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_two_calls_in_the_older_exporters_graph(case, tmp_path):
    model, x, wanted = case
    graph = tmp_path / "graph.onnx"
    changed_graphs.EXPORTERS["torchscript"](model, x, graph)
    if not isinstance(model, Twins):
        with pytest.raises(SiteError, match="in the graph twice"):
            merge_onnx(graph, tmp_path / "adapter", tmp_path / "out.onnx")
        return
    merge_onnx(graph, tmp_path / "adapter", tmp_path / "out.onnx")
    (got,) = ort.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
