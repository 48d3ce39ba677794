"""An adapted module's answer folded into another layer: refused; what is the model's own: no obstacle."""

from __future__ import annotations

import changed_graphs as changed
import pytest
import torch
from changed_graphs import EXPORTERS, MODES, TOOLS
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lora_export import LoraExportError, SiteError, merge_onnx

D, C = 16, 16


class Layer(nn.Module):
    """A layer, something behind it, and adapted modules that read the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.g, self.out = self.layer(), nn.Linear(D, self.answers()), nn.Linear(C, D)
        self.table = nn.Parameter(torch.randn(1, D))
        self.more()

    def layer(self) -> nn.Module:
        return nn.Conv2d(4, C, 3, padding=1)

    def answers(self) -> int:
        return C

    def more(self) -> None: ...

    def behind(self, y):
        return y

    def forward(self, x):
        y = torch.relu(self.behind(self.conv(x)))
        return self.g(self.out(y.mean((2, 3)) if y.ndim == 4 else y))


class Times(Layer):
    """FiLM's factor."""

    def behind(self, y):
        return y * self.g(self.table)[:, :, None, None]


class Plus(Layer):
    def behind(self, y):
        return y + self.g(self.table)[:, :, None, None]


class Both(Layer):
    def behind(self, y):
        factor = self.g(self.table)[:, :, None, None]
        return y * torch.sigmoid(factor) + factor


class PlusBare(Plus):
    def layer(self):
        return nn.Conv2d(4, C, 3, padding=1, bias=False)


class TimesTurned(Times):
    def layer(self):
        return nn.ConvTranspose2d(4, C, 3)


class PlusTurned(Plus):
    def layer(self):
        return nn.ConvTranspose2d(4, C, 3)


class TimesDepthwise(Times):
    def layer(self):
        return nn.Conv2d(4, C, 3, groups=4)


class TimesSingle(Times):
    """Each row of the weight is one number, so that any weight is a multiple of it."""

    def layer(self):
        return nn.Conv2d(4, C, 1, groups=4)


class Normed(Layer):
    """A batch norm, of which there is more behind it."""

    def more(self):
        self.norm = norm(nn.BatchNorm2d(C))


class TimesNorm(Normed):
    def behind(self, y):
        return self.norm(y) * self.g(self.table)[:, :, None, None]


class PlusNorm(Normed):
    def behind(self, y):
        return self.norm(y) + self.g(self.table)[:, :, None, None]


class PlusFlat(Layer):
    """A MatMul that becomes a Gemm, whose bias is the answer."""

    def layer(self):
        return nn.Linear(D, C, bias=False)

    def behind(self, y):
        return y + self.g(self.table[0])


class Gate(Layer):
    """One number for all rows."""

    def answers(self):
        return 1

    def behind(self, y):
        return y * torch.sigmoid(self.g(self.table))[:, :, None, None]


def norm(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
        for values in module.parameters():
            values.normal_()
    return module


class NormOnly(Normed):
    def behind(self, y):
        return self.norm(y)


class NormOfNothing(Layer):
    """Without parameters, with an epsilon of its own, and of a layer without a bias."""

    def layer(self):
        return nn.Conv2d(4, C, 3, bias=False)

    def more(self):
        self.norm = norm(nn.BatchNorm2d(C, eps=0.3, affine=False))

    def behind(self, y):
        return self.norm(y)


class Scaled(Layer):
    def more(self):
        self.gamma, self.beta = (nn.Parameter(torch.randn(C, 1, 1)) for _ in range(2))

    def behind(self, y):
        return y * self.gamma


class Shifted(Scaled):
    def behind(self, y):
        return y + self.beta


class ShiftedTurned(Shifted):
    def layer(self):
        return nn.ConvTranspose2d(4, C, 3)


class ScaledAndShifted(Scaled):
    def behind(self, y):
        return (y + self.beta) * self.gamma


class NormScaled(Scaled):
    def more(self):
        super().more()
        self.norm = norm(nn.BatchNorm2d(C))

    def behind(self, y):
        return self.norm(y) * self.gamma


class LearnedGate(Scaled):
    def behind(self, y):
        return y * torch.sigmoid(self.gamma) + torch.exp(self.beta)


class RisingGate(Scaled):
    """A function that is not known here."""

    def behind(self, y):
        return y * (2 + torch.erf(self.gamma))


class Number(Layer):
    def behind(self, y):
        return y * 24**-0.5 + 0.3


class LearnedNumber(Layer):
    def more(self):
        self.log_scale = nn.Parameter(torch.randn(1))

    def behind(self, y):
        return y * self.log_scale.exp()


class RowOfTable(Layer):
    """A class embedding, looked up for a fixed class."""

    def more(self):
        self.classes = nn.Embedding(7, C)

    def behind(self, y):
        return y + self.classes(torch.tensor([3]))[:, :, None, None]


class WeightNorm(Scaled):
    def layer(self):
        layer = weight_norm(nn.Conv2d(4, C, 3))
        with torch.no_grad():
            layer.parametrizations.weight.original0.uniform_(0.5, 2)
        return layer


ANSWERS = (Times, Plus, Both, PlusBare, TimesTurned, PlusTurned, TimesDepthwise, TimesSingle, TimesNorm)
ANSWERS += (PlusNorm, PlusFlat)
OWN = (NormOnly, NormOfNothing, ShiftedTurned, Scaled, Shifted, ScaledAndShifted, NormScaled, LearnedGate)
OWN += (RisingGate, Number, LearnedNumber, RowOfTable, WeightNorm, Layer)
FOLDING = ("onnxsim", "onnxslim", "ort-basic", "ort-all")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return what makes a model, its checkpoint, its adapter, an input and PEFT's answer."""
    cases = {}

    def make(kind, targets=("g", "out")):
        if (kind, targets) not in cases:
            folder = tmp_path_factory.mktemp(kind.__name__)
            torch.manual_seed(0)
            model, x = kind().eval(), torch.randn(*((3, D) if kind is PlusFlat else (2, 4, 5, 5)))
            cases[kind, targets] = folder, model, x, changed.saved(model, x, folder, targets)
        return cases[kind, targets]

    return make


@pytest.mark.parametrize("tool", FOLDING)
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_folded_answer_is_refused(kind, exporter, tool, made, tmp_path):
    folder, _, x, _ = case = made(kind)
    graph = changed.changed_graph(case, exporter, tool, tmp_path)
    for mode in MODES:
        got = changed.outcome(
            mode, graph, folder / "adapter", x.numpy(), tmp_path / "out.onnx", checkpoint=folder / "base"
        )
        assert isinstance(got, SiteError), mode
        assert "computed" in str(got)
        assert "its exporter wrote it" in got.hint
        assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("tool", ["onnxslim", "ort-basic"])
def test_a_folded_answer_is_refused_where_the_layer_is_adapted_as_well(tool, made, tmp_path):
    folder, _, x, _ = case = made(Times, ("conv", "g"))
    graph = changed.changed_graph(case, "torchscript", tool, tmp_path)
    got = changed.outcome(
        "merge", graph, folder / "adapter", x.numpy(), tmp_path / "out.onnx", checkpoint=folder / "base"
    )
    assert isinstance(got, SiteError)
    assert "computed" in str(got)


def test_the_reason_names_constant_node_and_tool(made, tmp_path):
    folder, _, _, _ = case = made(Plus)
    graph = changed.changed_graph(case, "dynamo-noopt", "ort-basic", tmp_path)
    with pytest.raises(SiteError) as refused:
        merge_onnx(graph, folder / "adapter", tmp_path / "out.onnx", checkpoint=folder / "base")
    line = refused.value.problems[0]
    assert "'ConvAddFusion_B_conv.bias' [16], which Conv reads" in line
    assert "plus a shift" in line
    assert "ONNX Runtime's optimiser" in line


def test_one_number_is_refused_if_an_adapted_module_gives_one(made, tmp_path):
    folder, _, x, _ = case = made(Gate)
    graph = changed.changed_graph(case, "torchscript", "onnxsim", tmp_path)
    got = changed.outcome(
        "merge", graph, folder / "adapter", x.numpy(), tmp_path / "out.onnx", checkpoint=folder / "base"
    )
    assert isinstance(got, SiteError)
    assert "g.weight" in str(got.problems)
    assert "out.weight" not in str(got.problems)


def test_the_hint_leads_to_the_right_answer(made, tmp_path):
    """Merge into the exporter's graph first, then let the tool compute."""
    folder, model, x, wanted = made(Both)
    EXPORTERS["dynamo-noopt"](model, x, tmp_path / "raw.onnx")
    merge_onnx(tmp_path / "raw.onnx", folder / "adapter", tmp_path / "merged.onnx")
    TOOLS["onnxslim"](tmp_path / "merged.onnx", tmp_path / "out.onnx")
    assert changed.error(changed.run(tmp_path / "out.onnx", {"x": x.numpy()}), wanted) < 1e-5


@pytest.mark.parametrize("tool", [*FOLDING[:3], "onnxslim+anonymous", "onnxslim+fp16"])
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", OWN)
def test_what_the_model_has_there_is_no_obstacle(kind, exporter, tool, made, tmp_path):
    folder, _, x, wanted = case = made(kind)
    graph = changed.changed_graph(case, exporter, tool, tmp_path)
    for mode in MODES:
        got = changed.outcome(
            mode, graph, folder / "adapter", x.numpy(), tmp_path / "out.onnx", checkpoint=folder / "base"
        )
        assert not isinstance(got, LoraExportError), got.problems
        assert changed.error(got, wanted) < (5e-3 if "fp16" in tool else 1e-5)


class Trained(nn.Module):
    """A layer that is no target, whose bias PEFT trains (``bias="all"``); of 3-D input a node adds that."""

    def __init__(self, answers: bool) -> None:
        super().__init__()
        self.k, self.out, self.table = nn.Linear(D, C), nn.Linear(C, D), nn.Parameter(torch.randn(1, 1, D))
        self.g = nn.Linear(D, C) if answers else None

    def forward(self, x):
        y = self.k(x)
        return self.out(torch.tanh(y if self.g is None else y + self.g(self.table)))


@pytest.mark.parametrize("tool", ["stripped", "version"])
@pytest.mark.parametrize("answers", [False, True])
def test_a_bias_that_the_adapter_replaces_is_no_shift(answers, tool, tmp_path):
    torch.manual_seed(0)
    model, x = Trained(answers).eval(), torch.randn(2, 3, D)
    targets = ("g", "out") if answers else ("out",)
    wanted = changed.saved(model, x, tmp_path, targets, bias="all")
    graph = changed.changed_graph((None, model, x, None), "dynamo", tool, tmp_path)
    given, checkpoint = tmp_path / "adapter", tmp_path / "base"
    got = changed.outcome("merge", graph, given, x.numpy(), tmp_path / "out.onnx", checkpoint=checkpoint)
    if answers:
        # What is added behind the product may still be an answer.
        assert isinstance(got, SiteError)
        assert "computed" in str(got)
        return
    assert not isinstance(got, LoraExportError), got.problems
    assert changed.error(got, wanted) < 1e-5
