"""Matrices that a module holds itself and PEFT targets by name: merged, exposed, converted, however used."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from lora_export.errors import LoraExportError, SiteError
from lora_export.modes.bank_onnx import bank_onnx
from lora_export.modes.convert_adapter import convert_adapter
from lora_export.modes.merge_checkpoint import merge_checkpoint
from lora_export.modes.merge_onnx import merge_onnx
from lora_export.modes.swap_onnx import swap_onnx

ENTRIES, WORDS = 11, torch.tensor([[1, 4, 2, 7], [3, 3, 0, 10], [5, 9, 8, 6]])
EXPORTERS = ("dynamo", "torchscript")


class Times(nn.Module):
    """``x @ W``, as PEFT's own test module MlpUsingParameters."""

    def __init__(self, takes: int, gives: int, name: str = "weight") -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(takes, gives) / takes**0.5))
        self.bias = nn.Parameter(torch.randn(gives))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ getattr(self, self.name) + self.bias


class Router(nn.Module):
    """``x @ Wᵀ``, as the routers of mixtures of experts."""

    def __init__(self, takes: int, gives: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(gives, takes) / takes**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight)


class Table(nn.Module):
    """Rows that are looked up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(ENTRIES, width))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return functional.embedding(words, self.rows)


class Two(nn.Module):
    """Two matrices of one module, of the same shape: a node's module doesn't say which one it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.other = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.other) @ self.weight


class Model(nn.Module):
    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.table, self.lin0 = Table(wide), Times(wide, narrow)
        self.lin1, self.two = Times(narrow, wide, "kernel"), Two(wide)
        self.gate, self.fc = Router(wide, narrow), nn.Linear(narrow, 5)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.lin0(self.table(words)))
        x = self.two(torch.tanh(self.lin1(x)))
        return self.fc(torch.tanh(self.gate(x)))


TARGETS = ["table.rows", "lin0.weight", "lin1.kernel", "two.weight", "gate.weight"]


def make(wide: int, narrow: int) -> nn.Module:
    torch.manual_seed(0)
    return Model(wide, narrow).eval()


@functools.cache
def folder(wide: int, narrow: int) -> Path:
    """Return a folder with the base, its two graphs and two adapters with PEFT's answers."""
    from peft import LoraConfig, get_peft_model

    path = tiny.cache_folder() / f"own-{wide}-{narrow}"
    (path / "base").mkdir(parents=True)
    model = make(wide, narrow)
    save_file(model.state_dict(), path / "base/model.safetensors")
    (path / "base/config.json").write_text("{}")
    rows = torch.export.Dim("rows")
    named: dict[str, Any] = {"input_names": ["words"], "output_names": ["scores"]}
    with tiny.quiet():
        shapes = ({0: rows},)
        torch.onnx.export(
            model,
            (WORDS,),
            str(path / "dynamo.onnx"),
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            **named,
        )
        axes = {"words": {0: "rows"}}
        torch.onnx.export(
            model,
            (WORDS,),
            str(path / "torchscript.onnx"),
            dynamo=False,
            opset_version=17,
            dynamic_axes=axes,
            **named,
        )
    for number in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(r=2 + number, lora_alpha=4, target_modules=["fc"], target_parameters=TARGETS)
            adapted = get_peft_model(make(wide, narrow), config)
        torch.manual_seed(5 + number)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
            adapted.save_pretrained(path / f"adapter-{number}")
            np.save(path / f"scores-{number}.npy", adapted(WORDS).numpy())
    with torch.no_grad():
        np.save(path / "scores.npy", model(WORDS).numpy())
    return path


def run(graph: Path, **feeds: Any) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options)
    return np.asarray(session.run(None, {"words": WORDS.numpy(), **feeds})[0])


def check(path: Path, got: Any, wanted: Any) -> None:
    base = np.load(path / "scores.npy")
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted - base) < 2e-6


SIZES = pytest.mark.parametrize(("wide", "narrow"), [(8, 12), (8, 8)], ids=["rectangular", "square"])


@SIZES
def test_checkpoint(wide: int, narrow: int, tmp_path: Path) -> None:
    path, model = folder(wide, narrow), make(wide, narrow)
    merge_checkpoint(path / "base", [path / "adapter-0"], tmp_path / "merged")
    model.load_state_dict(load_file(tmp_path / "merged/model.safetensors"))
    with torch.no_grad():
        check(path, model(WORDS).numpy(), np.load(path / "scores-0.npy"))


@SIZES
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_graph(wide: int, narrow: int, exporter: str, tmp_path: Path) -> None:
    path, merged = folder(wide, narrow), tmp_path / "merged.onnx"
    merge_onnx(path / f"{exporter}.onnx", [path / "adapter-0"], merged, checkpoint=path / "base")
    check(path, run(merged), np.load(path / "scores-0.npy"))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_shapes_tell_without_a_checkpoint(exporter: str, tmp_path: Path) -> None:
    path, merged = folder(8, 12), tmp_path / "merged.onnx"
    merge_onnx(path / f"{exporter}.onnx", [path / "adapter-0"], merged)
    check(path, run(merged), np.load(path / "scores-0.npy"))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("expose", [False, True])
def test_square_and_computed_is_refused_without_values(exporter: str, expose: bool, tmp_path: Path) -> None:
    """The router's constant is W or its transpose; that of ``x @ W`` kept its name, so it is W."""
    base, adapter = folder(8, 8) / f"{exporter}.onnx", folder(8, 8) / "adapter-0"
    output = tmp_path / "output.onnx"
    act = swap_onnx if expose else merge_onnx
    given = {"adapter": adapter} if expose else {"adapters": adapter}
    with pytest.raises(SiteError) as raised:
        act(base, output=output, **given)
    (line,) = raised.value.problems
    assert line.startswith("gate.weight")
    assert "square" in line
    assert "--checkpoint" in line


def test_the_class_of_a_node_tells(tmp_path: Path) -> None:
    """A square `nn.Linear`, targeted by its weight's name: the dynamo exporter says what the module is."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False)).eval(),
        torch.randn(3, 8, 8),
    )
    with tiny.quiet(), torch.no_grad():
        torch.onnx.export(
            model, (x,), str(tmp_path / "base.onnx"), dynamo=True, input_names=["x"], verbose=False
        )
        base = model(x).numpy()
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=[], target_parameters=["0.weight", "2.weight"])
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        adapted.save_pretrained(tmp_path / "adapter")
        wanted = adapted(x).numpy()
    merge_onnx(tmp_path / "base.onnx", [tmp_path / "adapter"], tmp_path / "merged.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "merged.onnx"))
    got = np.asarray(session.run(None, {"x": x.numpy()})[0])
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted - base) < 2e-6


@SIZES
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_exposed_and_converted(wide: int, narrow: int, exporter: str, tmp_path: Path) -> None:
    """The graph is made with the first adapter; the second one is converted for it as well."""
    path, graph = folder(wide, narrow), tmp_path / "swap.onnx"
    swap_onnx(path / f"{exporter}.onnx", graph, adapter=path / "adapter-0", checkpoint=path / "base")
    for number in range(2):
        file = tmp_path / f"{number}.safetensors"
        convert_adapter(path / f"adapter-{number}", graph, file)
        feeds = {name: values.numpy() for name, values in load_file(file).items()}
        check(path, run(graph, **feeds), np.load(path / f"scores-{number}.npy"))


@SIZES
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_bank(wide: int, narrow: int, exporter: str, tmp_path: Path) -> None:
    path, graph = folder(wide, narrow), tmp_path / "bank.onnx"
    adapters = {f"a{number}": path / f"adapter-{number}" for number in range(2)}
    bank_onnx(path / f"{exporter}.onnx", adapters, graph, checkpoint=path / "base")
    weights = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    wanted = [np.load(path / f"scores-{number}.npy")[row] for row, number in enumerate((0, 1, 0))]
    check(path, run(graph, **{"lora.adapter_weights": weights}), np.stack(wanted))


def test_a_graph_of_other_targets_takes_what_its_shape_tells(tmp_path: Path) -> None:
    """Exposed without an adapter: shapes tell, else the weight that kept its name."""
    for sizes in ((8, 12), (8, 8)):
        path, graph = folder(*sizes), tmp_path / f"swap-{sizes[1]}.onnx"
        swap_onnx(path / "dynamo.onnx", graph, target_modules=["lin0", "fc"])
        file = tmp_path / f"{sizes[1]}.safetensors"
        report = convert_adapter(path / "adapter-0", graph, file, allow_unmatched=True)
        assert {row.parameter for row in report.plan.placed} == {"lin0.weight", "fc.weight"}
        tensors = load_file(path / "adapter-0/adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.lin0.lora_{part}.weight"] for part in "AB")
        made = load_file(file)
        product = made["lin0.lora_A.weight"].double() @ made["lin0.lora_B.weight"].double()
        torch.testing.assert_close(product, 2 * (b.double() @ a.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", ["lin0.bias", "lin0.weight"])
def test_what_does_not_fit_is_refused(target: str, tmp_path: Path) -> None:
    """A vector has no low-rank change, and a matrix of another shape is another model's."""
    path = folder(8, 12)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], "peft_version": "0.21.2",
              "target_parameters": [target]}  # fmt: skip
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    names = {part: f"base_model.model.lin0.lora_{part}.weight" for part in "AB"}
    tensors = {names["A"]: torch.ones(2, 7), names["B"]: torch.ones(12, 2)}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(LoraExportError) as raised:
        merge_checkpoint(path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    wanted = "one of 2 dimensions" if target == "lin0.bias" else "the adapter fits (12, 7)"
    assert wanted in str(raised.value.problems)
    for exporter in EXPORTERS:
        with pytest.raises(LoraExportError):
            merge_onnx(path / f"{exporter}.onnx", [tmp_path / "adapter"], tmp_path / "merged.onnx")
