"""A module that is called twice may have its weight in a graph twice: merged in both places, or refused."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import changed_graphs
import numpy as np
import onnx
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from changed_graphs import EXPORTERS, MODES, TOOLS, saved
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers import optimizer
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


class Normed(nn.Module):
    """One convolution at two scales, each with its own norm, as in detectors' heads."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        for norm in self.norms:
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine, coarse = (
            norm(self.proj(part)) for norm, part in zip(self.norms, (x, x[..., ::2]), strict=True)
        )
        return torch.cat([self.out(fine).flatten(1), self.out(coarse).flatten(1)], 1)


class Scaled(nn.Module):
    """One convolution whose second answer has a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 1)
        self.factor = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.proj(x)) + torch.relu(self.proj(x.flip(-1)) * self.factor))


class Thrice(nn.Module):
    """One Linear without a bias, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.proj(x) + torch.tanh(self.proj(x.flip(1))) + self.proj(x * 3))


class Numbered(nn.Module):
    """Modules whose names look like numbered calls of another."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.proj_1 = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.out = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.proj(x)) + self.proj_1(x))


class Beside(nn.Module):
    """A module called twice, beside one whose name is that of a second call."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.proj, self.proj_1 = nn.Linear(16, 16, bias=bias), nn.Linear(16, 16, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_1(torch.tanh(self.proj(torch.tanh(self.proj(x)))))


class Between(nn.Module):
    """The same for a block's path, and three calls around the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mix_1 = Beside(bias=False), Numbered()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix_1(self.mix(self.mix(x)))


def nbits(keep: int) -> Callable[[Path, Path], None]:
    """Return what quantises each MatMul but the first ``keep``."""

    def quantise(source: Path, out: Path) -> None:
        model = onnx.load(source)
        products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
        quantiser = MatMulNBitsQuantizer(
            model, bits=8, block_size=16, is_symmetric=False, nodes_to_exclude=products[:keep]
        )
        quantiser.process()
        onnx.save(quantiser.model.model, out)

    return quantise


def dynamic(kept: int) -> Callable[[Path, Path], None]:
    """Return what quantises each MatMul but one, the activations as they come."""

    def quantise(source: Path, out: Path) -> None:
        products = [node.name for node in onnx.load(source).graph.node if node.op_type == "MatMul"]
        quantize_dynamic(source, out, weight_type=QuantType.QInt8, nodes_to_exclude=products[kept : kept + 1])

    return quantise


IMAGE, ROWS = (2, 4, 6, 6), (2, 3, 16)
PARTED = {
    "norms": (Normed, IMAGE, "torchscript", TOOLS["none"]),
    "norms-sim": (Normed, IMAGE, "dynamo", TOOLS["onnxsim"]),
    "factor-sim": (Scaled, IMAGE, "torchscript", TOOLS["onnxsim"]),
    "factor-slim": (Scaled, IMAGE, "torchscript", TOOLS["onnxslim"]),
    "factor-ort": (Scaled, IMAGE, "dynamo", TOOLS["ort-basic"]),
    # Behind an Identity, the further calls stay floats.
    "nbits": (Thrice, ROWS, "torchscript", nbits(0)),
    "nbits-dynamo": (Thrice, ROWS, "dynamo", nbits(2)),
    "nbits-ranks": (Pooled, ROWS, "dynamo", nbits(0)),
    "dynamic": (Thrice, ROWS, "dynamo", dynamic(0)),
    "dynamic-torchscript": (Thrice, ROWS, "torchscript", dynamic(1)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PARTED)
def test_calls_that_tools_have_told_apart_are_refused(name, mode, tmp_path):
    kind, shape, exporter, tool = PARTED[name]
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(shape)
    saved(model, x, tmp_path)
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    tool(tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    for options in ({}, {"checkpoint": tmp_path / "base"}):
        got = changed_graphs.outcome(
            mode, tmp_path / "graph.onnx", tmp_path / "adapter", x.numpy(), tmp_path / "out.onnx", **options
        )
        assert isinstance(got, SiteError), options
        assert "proj.weight" in str(got)
        assert not (tmp_path / "out.onnx").exists()
        assert "twice" not in str(got) or "optimize=False" in got.hint


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_a_number_in_a_modules_name_is_no_call(exporter, tmp_path):
    torch.manual_seed(0)
    model, x = Numbered().eval(), torch.randn(ROWS)
    wanted = saved(model, x, tmp_path)
    EXPORTERS[exporter](model, x, tmp_path / "graph.onnx")
    merge_onnx(tmp_path / "graph.onnx", tmp_path / "adapter", tmp_path / "out.onnx")
    (got,) = ort.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [2, 3])
def test_a_shared_layer_that_attention_fusion_packs_again(layers, tmp_path):
    """ALBERT has one layer; ONNX Runtime's tools pack q, k and v of its later calls into other weights."""
    config = transformers.AlbertConfig(
        hidden_size=32,
        embedding_size=16,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=64,
    )
    config._attn_implementation = "eager"
    model = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), adapter).save_pretrained(tmp_path / "adapter")
    ids = torch.randint(3, 64, (2, 7))
    torch.onnx.export(
        Hidden(model), (ids, torch.ones_like(ids)), str(tmp_path / "raw.onnx"), dynamo=False, opset_version=17
    )
    fused = optimizer.optimize_model(str(tmp_path / "raw.onnx"), "bert", 4, 32, opt_level=0)
    fused.save_model_to_file(str(tmp_path / "graph.onnx"))
    assert any(node.op_type == "Attention" for node in onnx.load(tmp_path / "graph.onnx").graph.node)
    with pytest.raises(SiteError, match="in the graph twice"):
        merge_onnx(
            tmp_path / "graph.onnx",
            tmp_path / "adapter",
            tmp_path / "out.onnx",
            checkpoint=tmp_path / "base",
        )


@pytest.mark.parametrize("tool", ["none", "onnxslim", "ort-extended"])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", [Beside, lambda: Beside(bias=False), Between])
def test_a_call_with_another_modules_name_is_changed_or_refused(kind, exporter, tool, tmp_path):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(ROWS)
    for target in ("proj", "proj_1"):
        folder = tmp_path / target
        folder.mkdir()
        wanted = saved(model, x, folder, (target,))
        EXPORTERS[exporter](model, x, folder / "raw.onnx")
        TOOLS[tool](folder / "raw.onnx", folder / "graph.onnx")
        for mode, checkpoint in itertools.product(MODES, (folder / "base", False)):
            paths = (folder / name for name in ("graph.onnx", "adapter"))
            out = folder / "out.onnx"
            got = changed_graphs.outcome(mode, *paths, x.numpy(), out, checkpoint=checkpoint)
            assert isinstance(got, SiteError) or changed_graphs.error(got, wanted) < 1e-5, (target, mode)


class Hidden(nn.Module):
    """A model that returns its last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.fixture(params=[Pooled, OnConstant, Twins])
def case(request, tmp_path):
    """Make a model, its checkpoint and adapter, an input and what PEFT answers."""
    torch.manual_seed(0)
    model, x = request.param().eval(), torch.randn(2, 3, 16)
    return model, x, saved(model, x, tmp_path)


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
            with pytest.raises(SiteError) as error:
                make()
            assert "proj" in str(error.value)
            # What the test does for the others, and what works.
            assert "optimize=False" in error.value.hint
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
