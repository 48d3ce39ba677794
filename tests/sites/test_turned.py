"""A weight that a model multiplies with from both sides: changed in both, or refused."""

import numpy as np
import onnx
import pytest
import torch
from changed_graphs import EXPORTERS, MODES, TOOLS, error, outcome, run, saved
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.numpy import load_file
from torch import nn

from lora_export import LoraExportError, merge_checkpoint


class Attractor(nn.Module):
    """The weight and its transpose, both outside of the module's own call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(width, 16, bias=False), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(torch.tanh(x @ self.proj.weight.T) @ self.proj.weight))


class Decoder(nn.Module):
    """A module that has a bias and no weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, weight.t(), self.bias)


class Autoencoder(nn.Module):
    """The weight in its module's own call, and its transpose in another module's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.decoder = nn.Linear(width, 16), Decoder(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.proj(x)), self.proj.weight)


class Begun(nn.Module):
    """A decoder of its own that has begun as the transpose of its encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.back = nn.Linear(width, 16), nn.Linear(16, width)
        with torch.no_grad():
            self.back.weight.copy_(self.proj.weight.T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(torch.tanh(self.proj(x)))


def nbits(source, out):
    quantiser = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=16, is_symmetric=True)
    quantiser.process()
    onnx.save(quantiser.model.model, out)


MADE = [
    ("dynamo", "none"),
    ("dynamo-noopt", "none"),
    ("dynamo-noopt", "onnxsim"),
    ("torchscript", "none"),
    ("torchscript", "onnxslim"),
    ("torchscript", "ort-basic"),
]


@pytest.mark.parametrize("by_value", [False, True], ids=["by name", "by value"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("exporter", "tool"), [*MADE, ("torchscript", "nbits"), ("dynamo", "nbits")])
@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("kind", [Attractor, Autoencoder])
def test_both_orientations_are_refused(kind, width, exporter, tool, mode, by_value, tmp_path):
    torch.manual_seed(0)
    model, x = kind(width).eval(), torch.randn(2, 3, width)
    saved(model, x, tmp_path)
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    (nbits if tool == "nbits" else TOOLS[tool])(tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    got = outcome(
        mode,
        tmp_path / "graph.onnx",
        tmp_path / "adapter",
        x.numpy(),
        tmp_path / "out.onnx",
        checkpoint=tmp_path / "base" if by_value else False,
    )
    assert isinstance(got, LoraExportError)
    assert "proj.weight" in str(got)
    assert not (tmp_path / "out.onnx").exists()
    if "both orientations" in str(got):
        assert "lora-export merge" in got.hint


@pytest.mark.parametrize("kind", [Attractor, Autoencoder])
def test_the_hint_on_both_orientations_works(kind, tmp_path):
    """Merged into the checkpoint, the weight is another for both products."""
    torch.manual_seed(0)
    model, x = kind(24).eval(), torch.randn(2, 3, 24)
    saved(model, x, tmp_path)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.proj.lora_{side}.weight"] for side in "AB")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    model.load_state_dict({key: torch.from_numpy(values) for key, values in weights.items()})
    EXPORTERS["torchscript"](model, x, tmp_path / "graph.onnx")
    base = load_file(tmp_path / "base" / "model.safetensors")
    # alpha / r of `saved`: 8 / 2.
    changed = base["proj.weight"].astype(np.float64) + 4 * b.astype(np.float64) @ a
    with torch.no_grad():
        model.double().proj.weight.copy_(torch.from_numpy(changed))
        wanted = model(x.double()).numpy()
    assert error(run(tmp_path / "graph.onnx", {"x": x.numpy()}), wanted) < 1e-5


@pytest.mark.parametrize(("exporter", "tool"), MADE)
@pytest.mark.parametrize("width", [16, 24])
def test_a_module_that_has_begun_as_anothers_transpose(width, exporter, tool, tmp_path):
    torch.manual_seed(0)
    model, x = Begun(width).eval(), torch.randn(2, 3, width)
    wanted = saved(model, x, tmp_path)
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    TOOLS[tool](tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    got = outcome(
        "merge",
        tmp_path / "graph.onnx",
        tmp_path / "adapter",
        x.numpy(),
        tmp_path / "out.onnx",
        checkpoint=tmp_path / "base",
    )
    if tool in ("onnxsim", "onnxslim") and isinstance(got, LoraExportError):
        assert "ambiguous" in str(got)  # nothing in the graph says which of the two is which
        return
    assert not isinstance(got, LoraExportError), str(got)
    assert error(got, wanted) < 1e-5
