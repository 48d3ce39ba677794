"""Constants that a tool has smoothed, permuted or exchanged; the nodes no longer say their modules.

Each change keeps what the graph computes: with the right placement the merge is PEFT's model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from onnx import helper, numpy_helper
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from lora_export import LoraExportError, SiteError, bank_onnx, merge_onnx, swap_onnx

D = 8
Weights = dict[str, np.ndarray]
X = np.random.default_rng(3).standard_normal((2, 5, D)).astype(np.float32)


class Mlp(nn.Module):
    """OPT's: two products around a ReLU."""

    NODES = (
        ("MatMul", "x", "fc1", "a"),
        ("Relu", "a", None, "b"),
        ("MatMul", "b", "fc2", "y"),
    )
    HIDDEN, LAST = ("fc1",), "fc2"
    EXCHANGED = ("fc1", "fc2")

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(D, D, bias=False) for _ in range(2))

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Gated(nn.Module):
    """Llama's: two products of the same input, one of them with an activation."""

    NODES = (
        ("MatMul", "x", "gate_proj", "a"),
        ("MatMul", "x", "up_proj", "b"),
        ("Relu", "a", None, "c"),
        ("Mul", "c", "b", "d"),
        ("MatMul", "d", "down_proj", "y"),
    )
    HIDDEN, LAST = ("gate_proj", "up_proj"), "down_proj"
    EXCHANGED = ("gate_proj", "up_proj")

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.mlp = inner

    def forward(self, x):
        return self.mlp(x)


def scaled(kind: type[nn.Module], weights: Weights) -> None:
    """Multiply hidden channels of one product, and divide the next one's: SmoothQuant (arXiv:2211.10438)."""
    factor = np.float32(2.0) ** np.arange(-3, D - 3, dtype=np.float32)
    weights[kind.HIDDEN[-1]] = weights[kind.HIDDEN[-1]] * factor
    weights[kind.LAST] = weights[kind.LAST] / factor[:, None]


def permuted(kind: type[nn.Module], weights: Weights) -> None:
    order = np.roll(np.arange(D), 3)
    for name in kind.HIDDEN:
        weights[name] = weights[name][:, order]
    weights[kind.LAST] = weights[kind.LAST][order]


def kept(kind: type[nn.Module], weights: Weights) -> None:
    pass


MODELS = {"mlp": Mlp, "gated": Gated}
CHANGES: dict[str, Callable[[type[nn.Module], Weights], None]] = {
    "scaled": scaled,
    "permuted": permuted,
    "exchanged": kept,
    "kept": kept,
}


class Case:
    """A checkpoint, an adapter, PEFT's answer, and the graph after the tool."""

    def __init__(self, model: str, change: str, folder: Path, names: bool = False) -> None:
        kind = MODELS[model]
        torch.manual_seed(0)
        base = Block(kind()).eval()
        self.checkpoint, self.adapter, self.graph = folder / "base", folder / "adapter", folder / "g.onnx"
        self.checkpoint.mkdir()
        save_file(base.state_dict(), self.checkpoint / "model.safetensors")
        weights = {
            name: module.weight.detach().numpy().T.copy() for name, module in base.mlp.named_children()
        }
        CHANGES[change](kind, weights)
        names_of = {name: name for name in weights}
        if change == "exchanged":
            one, two = kind.EXCHANGED
            names_of |= {one: two, two: one}
        self._write(kind, weights, names_of, names)
        with torch.no_grad():
            answer = base(torch.from_numpy(X)).numpy()
        # What the tool did keeps what the graph computes.
        np.testing.assert_allclose(run(self.graph), answer, rtol=1e-4, atol=1e-5)
        with tiny.quiet():
            targets = [*kind.HIDDEN, kind.LAST]
            tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
            with torch.no_grad():
                for path, parameter in tuned.named_parameters():
                    if "lora_" in path:
                        parameter.copy_(torch.randn(parameter.shape) * 0.5)
                self.wanted = tuned(torch.from_numpy(X)).numpy()
            tuned.save_pretrained(self.adapter)

    def _write(self, kind: type[nn.Module], weights: Weights, names_of: dict[str, str], names: bool) -> None:
        nodes = []
        for operator, first, second, output in kind.NODES:
            constant = f"mlp.{names_of[second]}.weight" if second in weights else second
            name = f"/mlp/{second}/{operator}" if names and second in weights else ""
            nodes.append(helper.make_node(operator, [first, *filter(None, [constant])], [output], name))
        shape = ["batch", "sequence", D]
        ports = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)] for name in "xy"]
        constants = [
            numpy_helper.from_array(v, f"mlp.{names_of[name]}.weight") for name, v in weights.items()
        ]
        graph = helper.make_graph(nodes, "g", *ports, constants)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), self.graph
        )


def run(graph: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]).run(None, {"x": X})[
        0
    ]


@pytest.mark.parametrize(("model", "change"), itertools.product(MODELS, CHANGES))
def test_without_the_checkpoint_it_is_refused(model, change, tmp_path):
    case = Case(model, change, tmp_path)
    for write in (
        lambda: merge_onnx(case.graph, case.adapter, tmp_path / "m.onnx"),
        lambda: swap_onnx(case.graph, tmp_path / "s.onnx", adapter=case.adapter),
    ):
        with pytest.raises(LoraExportError) as refused:
            write()
        assert len(refused.value.problems) == len(MODELS[model].HIDDEN) + 1
        assert all("neither metadata nor a name" in line for line in refused.value.problems)
        assert all("--checkpoint" in line for line in refused.value.problems)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(("model", "change"), itertools.product(MODELS, CHANGES))
def test_with_the_checkpoint_it_is_refused_or_right(model, change, tmp_path):
    case = Case(model, change, tmp_path)
    refused: list[str] = []
    try:
        merge_onnx(case.graph, case.adapter, tmp_path / "m.onnx", checkpoint=case.checkpoint)
    except LoraExportError as error:
        refused = list(error.problems)
    if not (tmp_path / "m.onnx").exists():
        assert change in ("scaled", "permuted"), refused
        assert refused
        return
    assert tiny.relative_error(run(tmp_path / "m.onnx"), case.wanted) < 2e-6


@pytest.mark.parametrize("model", MODELS)
def test_nodes_that_say_their_modules_are_believed(model, tmp_path):
    case = Case(model, "kept", tmp_path, names=True)
    merge_onnx(case.graph, case.adapter, tmp_path / "m.onnx")
    assert tiny.relative_error(run(tmp_path / "m.onnx"), case.wanted) < 2e-6


class Scaled(nn.Linear):
    """Has a factor on its weight, as StyleGAN's equalised learning rate: TorchScript computes the product."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.25, self.bias)


VERBS = {
    "merge-onnx": lambda base, given, out, **more: merge_onnx(base, given, output=out, **more).plan,
    "swap-onnx": lambda base, given, out, **more: swap_onnx(base, adapter=given, output=out, **more).plan,
    "bank-onnx": lambda base, given, out, **more: bank_onnx(base, {"a": given}, output=out, **more).plan,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("layer", [Scaled, nn.Linear])
def test_what_torchscript_computed_is_said_or_compared(layer, verb, tmp_path):
    model, x = nn.Sequential(layer(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval(), torch.randn(2, 3, 8)
    base = tmp_path / "base.onnx"
    with tiny.quiet():
        torch.onnx.export(model, (x,), base, dynamo=False)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        tuned.save_pretrained(tmp_path / "adapter")
    run, out = VERBS[verb], tmp_path / "out" / "o.onnx"
    plan = run(base, tmp_path / "adapter", out, checkpoint=False)
    assert any("TorchScript" in warning and "--checkpoint" in warning for warning in plan.warnings)
    if layer is Scaled:
        # PEFT adds B·A·x without the factor, and merges with it.
        with pytest.raises(SiteError) as refused:
            run(base, tmp_path / "adapter", out, checkpoint=tmp_path, force=True)
        assert "multiplies its weight by a number of its own" in str(refused.value)
        return
    plan = run(base, tmp_path / "adapter", out, checkpoint=tmp_path, force=True)
    assert not plan.warnings
    assert len(plan.placed) == 1
