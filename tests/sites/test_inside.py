"""Modules that do more with a product than add a bias: what PEFT computes beside them, or a refusal."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from changed_graphs import EXPORTERS, MODES, TOOLS, error, outcome, saved
from torch import nn

from lora_export import SiteError, bank_onnx, merge_onnx

D = 8


class Functional(nn.Module):
    """The module's weight beside the module, on the same input: no adapter changes that."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.proj(x)) + F.linear(x, self.proj.weight))


class FunctionalOutput(Functional):
    """The product without the bias is an output's, moved."""

    def forward(self, x):
        return torch.cat([torch.tanh(self.proj(x)), F.linear(x, self.proj.weight).flip(-1)], -1)


class Residual(Functional):
    """Two readers of the module's answer are none of its product."""

    def forward(self, x):
        y = self.proj(x)
        return self.out(torch.tanh(y) * y + x)


class TimesLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) * 0.25


class OverLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 4.0


class TimesConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 0.25


class Answer(nn.Linear):
    """What a module may compute behind its product."""

    def __init__(self, then) -> None:
        super().__init__(D, D)
        self.then, self.gain = then, nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x):
        return self.then(self, super().forward(x))


class Input(Answer):
    """What it may compute before its product."""

    def forward(self, x):
        return F.linear(self.then(self, x), self.weight, self.bias)


class Inside(Answer):
    """A layer inside of the layer."""

    def __init__(self) -> None:
        super().__init__(None)
        self.act = nn.ELU()

    def forward(self, x):
        return self.act(F.linear(x, self.weight, self.bias))


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight, self.bias), self.weight, self.bias)


class Turned(nn.Linear):
    """Moves, casts and a sum with the product are what a branch beside it adds up with."""

    def forward(self, x):
        y = F.linear(x.double().float(), self.weight, self.bias)
        return x.flatten(1).reshape(x.shape) + y.transpose(0, 1).transpose(0, 1) - 3.0


class Equalised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.3, self.bias)


class PerRow(Equalised):
    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(D, 1) + 0.5)

    def forward(self, x):
        return F.linear(x, self.weight * self.gain, self.bias)


class Shifted(nn.Embedding):
    """OPT's positions."""

    def forward(self, ids):
        return super().forward(ids + 2)


class Looked(nn.Embedding):
    def forward(self, ids):
        return torch.tanh(super().forward(ids))


class Factor(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


class Around(nn.Module):
    """A model with something adapted, ``proj``, of a kind that is given."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x):
        return torch.tanh(self.proj(x)) * 3.0


class Replaced(Around):
    """Something that is trained whole, before what has an adapter."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__(proj)
        self.head = nn.Linear(D, D)

    def forward(self, x):
        return self.head(super().forward(x))


class Apart(Around):
    """A factor of the model's own, behind the module."""

    def forward(self, x):
        return self.proj(x) * 0.25


FUNCTIONAL = [
    (Functional, "dynamo", "none"),
    (Functional, "dynamo-noopt", "ort-basic"),
    (Functional, "torchscript", "onnxsim"),
    (FunctionalOutput, "dynamo", "none"),
    (FunctionalOutput, "dynamo-noopt", "ort-basic"),
]
FACTORS = {
    "times": lambda: TimesLinear(D, D, bias=False),
    "over": lambda: OverLinear(D, D),
    "convolution": lambda: TimesConv(D, 4, 3),
}
MORE = {
    "vector": lambda: Answer(lambda own, y: y * own.gain),
    "minus": lambda: Answer(lambda own, y: -y),
    "subtracted": lambda: Answer(lambda own, y: 1 - y),
    "clamp": lambda: Answer(lambda own, y: y.clamp(-1, 1)),
    "square": lambda: Answer(lambda own, y: y * y),
    "doubled": lambda: Answer(lambda own, y: y + y),
    "softmax": lambda: Answer(lambda own, y: y.softmax(-1)),
    "moved first": lambda: Answer(lambda own, y: torch.relu(y.unsqueeze(0)).squeeze(0)),
    "norm": lambda: Answer(lambda own, y: F.layer_norm(y, (D,))),
    "number before": lambda: Input(lambda own, x: x * 2.0),
    "activation before": lambda: Input(lambda own, x: torch.relu(x)),
    "vector before": lambda: Input(lambda own, x: x + own.gain),
    "layer inside": Inside,
    "twice": lambda: Twice(D, D),
    "shifted": lambda: Shifted(D, D),
    "looked": lambda: Looked(D, D),
}
PADDED = {
    "circular": lambda: nn.Conv2d(D, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(D, 4, 3, padding=1, padding_mode="reflect"),
    "dilated": lambda: nn.Conv2d(D, 4, 3, padding="same", dilation=2),
}
PLAIN = {
    "zeros": lambda: nn.Conv2d(D, 4, 3, padding=1),
    "a layer of its own": lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(D, 4, 3)),
    "pointwise": lambda: nn.Conv2d(D, 4, 1, dilation=2),
}


def exported(model, x, exporter, tool, folder, targets=("proj",), saves=None):
    """Save a graph, its checkpoint and an adapter; return what PEFT answers."""
    wanted = saved(model, x, folder, targets, saves)
    EXPORTERS[exporter](model, x, folder / "raw.onnx")
    TOOLS[tool](folder / "raw.onnx", folder / "graph.onnx")
    return wanted


@pytest.mark.parametrize(("kind", "exporter", "tool"), FUNCTIONAL)
def test_a_product_that_is_read_without_its_bias(kind, exporter, tool, tmp_path):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, D)
    wanted = exported(model, x, exporter, tool, tmp_path)
    for mode in MODES:
        for checkpoint in (tmp_path / "base", False):
            graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
            got = outcome(mode, graph, adapter, x.numpy(), out, checkpoint=checkpoint)
            if isinstance(got, SiteError):
                assert not checkpoint or "its bias" in str(got) or "ambiguous" in str(got), got
                assert not out.exists()
            else:
                # The exporter has kept the two products apart.
                assert error(got, wanted) < 1e-5, (mode, checkpoint)


def test_the_exporter_joins_products(tmp_path):
    """What the test above must have seen."""
    torch.manual_seed(0)
    exported(Functional().eval(), torch.randn(2, 3, D), "dynamo", "none", tmp_path)
    with pytest.raises(SiteError, match="has 1 parameters") as caught:
        merge_onnx(tmp_path / "graph.onnx", tmp_path / "adapter", tmp_path / "out.onnx", checkpoint=False)
    assert "read without its bias (by Add)" in str(caught.value)
    assert "optimize=False" in caught.value.hint


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_a_number_in_the_module_is_refused(factor, exporter, tmp_path):
    torch.manual_seed(0)
    model, x = Around(factor()).eval(), torch.randn(2, D, D, D)
    exported(model, x, exporter, "none", tmp_path)
    graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
    for mode in MODES:
        got = outcome(mode, graph, adapter, x.numpy(), out, checkpoint=False)
        assert isinstance(got, SiteError)
        assert "multiplies its product by a number" in str(got)
    with pytest.raises(SiteError, match="has 1 parameters"):
        bank_onnx(graph, {"one": adapter}, out)
    assert not out.exists()


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", MORE)
def test_what_a_module_computes_besides_is_refused(kind, exporter, tmp_path):
    torch.manual_seed(0)
    model, x = Around(MORE[kind]()).eval(), torch.randn(2, 3, D)
    x = torch.randint(0, D - 2, (2, 3)) if isinstance(model.proj, nn.Embedding) else x
    exported(model, x, exporter, "none", tmp_path)
    graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
    for mode in MODES:
        for checkpoint in (tmp_path / "base", False):
            got = outcome(mode, graph, adapter, x.numpy(), out, checkpoint=checkpoint)
            assert isinstance(got, SiteError), (mode, checkpoint)
            assert not out.exists()
    if kind != "twice":
        assert "the module computes" in str(got)
        assert "trainers add the adapter behind" in got.hint


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", [Equalised, PerRow])
def test_a_factor_that_the_exporter_computed_into_the_weight_is_refused(kind, exporter, tmp_path):
    """Without a checkpoint the name alone is a doubt or a warning."""
    torch.manual_seed(0)
    model, x = Around(kind(D, D)).eval(), torch.randn(2, 3, D)
    exported(model, x, exporter, "none", tmp_path)
    graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
    for mode in MODES:
        got = outcome(mode, graph, adapter, x.numpy(), out, checkpoint=tmp_path / "base")
        assert isinstance(got, SiteError), mode
        assert not out.exists()


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
def test_sums_and_moves_inside_a_module_are_right(exporter, tmp_path):
    torch.manual_seed(0)
    model, x = Around(Turned(D, D)).eval(), torch.randn(2, 3, D)
    wanted = exported(model, x, exporter, "none", tmp_path)
    graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
    for mode in MODES:
        got = outcome(mode, graph, adapter, x.numpy(), out, checkpoint=tmp_path / "base")
        assert not isinstance(got, SiteError), got
        assert error(got, wanted) < 1e-5


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", [Answer, Input])
def test_a_module_that_is_replaced_has_its_own_forward(kind, exporter, tmp_path):
    torch.manual_seed(0)
    model, x = Replaced(kind(lambda own, y: torch.relu(y) * own.gain)).eval(), torch.randn(2, 3, D)
    wanted = exported(model, x, exporter, "none", tmp_path, ("head",), saves=["proj"])
    graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
    got = outcome("merge", graph, adapter, x.numpy(), out, checkpoint=tmp_path / "base")
    assert not isinstance(got, SiteError), got
    assert error(got, wanted) < 1e-5


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
def test_a_factor_of_an_embedding_is_warned_of(exporter, tmp_path):
    torch.manual_seed(0)
    for number, made in enumerate((Factor(D, D), nn.Embedding(D, D))):
        model, x, folder = Around(made).eval(), torch.randint(0, D, (2, 3)), tmp_path / str(number)
        folder.mkdir()
        trained = exported(model, x, exporter, "none", folder)
        graph, adapter, out = (folder / name for name in ("graph.onnx", "adapter", "out.onnx"))
        got = outcome("merge", graph, adapter, x.numpy(), out, checkpoint=False)
        assert not isinstance(got, SiteError), got
        report = merge_onnx(graph, adapter, out, checkpoint=False, force=True)
        warned = any("embed_scale" in warning for warning in report.plan.warnings)
        assert warned == (error(got, trained) > 1e-3) == isinstance(made, Factor)


def test_the_hint_leads_to_what_was_trained(tmp_path):
    """A plain layer with the number in its weight."""
    torch.manual_seed(0)
    module = TimesLinear(D, D, bias=False)
    model, x = Around(module).eval(), torch.randn(2, 3, D)
    wanted = saved(model, x, tmp_path)
    plain = nn.Linear(D, D, bias=False)
    plain.weight.data = module.weight.data * 0.25
    graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
    EXPORTERS["dynamo"](Around(plain).eval(), x, graph)
    assert error(outcome("merge", graph, adapter, x.numpy(), out, checkpoint=False), wanted) < 1e-5


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("model", [Residual, lambda: Apart(nn.Linear(D, D))])
def test_what_lies_outside_of_the_module_is_no_obstacle(model, exporter, tmp_path):
    torch.manual_seed(0)
    model, x = model().eval(), torch.randn(2, 3, D)
    wanted = exported(model, x, exporter, "none", tmp_path)
    graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
    for mode in MODES:
        got = outcome(mode, graph, adapter, x.numpy(), out, checkpoint=False)
        assert not isinstance(got, SiteError), got
        assert error(got, wanted) < 1e-5


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", [*PADDED, *PLAIN])
def test_a_convolution_that_trainers_compute_otherwise(name, exporter, tmp_path):
    """The warning comes where PEFT's merge and its branch differ, and only there."""
    if (name, exporter) == ("dilated", "torchscript"):
        pytest.skip("ONNX Runtime does not run dilation with automatic padding")
    torch.manual_seed(0)
    make = {**PADDED, **PLAIN}[name]
    target = "1" if name == "a layer of its own" else "proj"
    model, x = Around(make()).eval(), torch.randn(2, D, 7, 7)
    trained = exported(copy.deepcopy(model), x, exporter, "none", tmp_path, (target,))
    graph, adapter, out = (tmp_path / part for part in ("graph.onnx", "adapter", "out.onnx"))
    got = outcome("merge", graph, adapter, x.numpy(), out, checkpoint=False)
    assert not isinstance(got, SiteError), got
    report = merge_onnx(graph, adapter, out, checkpoint=False, force=True)
    warned = any("padding mode" in warning for warning in report.plan.warnings)
    assert warned == (error(got, trained) > 1e-3)
    assert warned == (name in PADDED)


@pytest.mark.parametrize("tool", ["onnxslim", "ort-extended"])
@pytest.mark.parametrize("name", ["circular", "reflect", "zeros"])
def test_the_warning_needs_no_names(name, tool, tmp_path):
    torch.manual_seed(0)
    model, x = Around({**PADDED, **PLAIN}[name]()).eval(), torch.randn(2, D, 7, 7)
    exported(model, x, "dynamo-noopt", tool, tmp_path)
    report = merge_onnx(
        tmp_path / "graph.onnx", tmp_path / "adapter", tmp_path / "out.onnx", checkpoint=tmp_path / "base"
    )
    warned = any("padding mode" in warning for warning in report.plan.warnings)
    assert warned == (name in PADDED)


class Standardised(nn.Conv2d):
    """BiT's convolution, and NFNet's."""

    def forward(self, x):
        gaps = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, gaps / gaps.std((1, 2, 3), keepdim=True), self.bias)


class Normalised(nn.Linear):
    """A head that compares directions."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", ["standardised", "normalised"])
def test_a_module_that_computes_its_weight(kind, exporter, tmp_path):
    """It is the base that the adapter was trained on: no hint may ask for another."""
    torch.manual_seed(0)
    made = {
        "standardised": (Standardised(D, 4, 3), (2, D, 7, 7)),
        "normalised": (Normalised(D, 4), (2, 3, D)),
    }
    module, shape = made[kind]
    exported(Around(module).eval(), torch.randn(shape), exporter, "none", tmp_path)
    for mode in MODES:
        got = outcome(
            mode,
            tmp_path / "graph.onnx",
            tmp_path / "adapter",
            np.zeros(shape, np.float32),
            tmp_path / "out.onnx",
            checkpoint=tmp_path / "base",
        )
        assert isinstance(got, SiteError)
        # A factor for each row is known as that.
        assert any(why in str(got) for why in ("computes another weight of its own", "multiplies"))
        assert "a plain layer" in got.hint
