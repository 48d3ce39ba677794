"""Adapters of stacked experts: which axis lora_A acts on, by PEFT's version and the module's own attribute.

The oracles are the two products that `ParamWrapper.get_delta_weight` has had, written with einsum, and for
the installed PEFT its own merge.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_models import Case, Experts, adapt, make, saved_and_merged
from safetensors.torch import load_file, save_file

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats import load_adapter, save_adapter
from lora_export.formats.reading.experts import is_target_module, parameter_names
from lora_export.sites.experts import ExpertLayout, settle_layout, unsettled

EXPERTS, RANK, ALPHA = 3, 2, 6
UP = "layers.0.experts.gate_up_proj"
# PEFT's version, the module is transposed → lora_A acts on the matrices' columns.
ON_COLUMNS = {
    (None, False): False,
    (None, True): False,
    ("0.17.1", False): False,
    ("0.18.1", False): False,
    ("0.18.1", True): False,
    ("0.18.0.dev0@abc", False): False,
    ("0.19.0", False): False,
    ("0.19.0", True): True,
    ("0.19.1", False): True,
    ("0.19.1", True): False,
    ("0.20.0", True): False,
    ("0.21.2", False): True,
    ("0.22.0.dev0@UNKNOWN", False): True,
}


def change(a: torch.Tensor, b: torch.Tensor, on_columns: bool) -> torch.Tensor:
    """Return ΔW as PEFT computes it, from factors as they are in the file."""
    a = a.double().reshape(EXPERTS, RANK, -1)
    b = b.double().reshape(len(b), RANK, EXPERTS)
    product = "o r e, e r i -> e o i" if on_columns else "o r e, e r i -> e i o"
    return torch.einsum(product, b, a) * (ALPHA / RANK)


def write(folder: Path, rows: int, cols: int, version: str | None, on_columns: bool) -> torch.Tensor:
    """Save an adapter of one stacked parameter as that PEFT did; return ΔW."""
    torch.manual_seed(3)
    takes, gives = (cols, rows) if on_columns else (rows, cols)
    a, b = torch.randn(EXPERTS * RANK, takes), torch.randn(gives, RANK * EXPERTS)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj"],
    }
    config |= {"peft_version": version} if version else {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {part: f"base_model.model.layers.0.experts.lora_{part}.weight" for part in "AB"}
    save_file({names["A"]: a, names["B"]: b}, folder / "adapter_model.safetensors")
    return change(a, b, on_columns)


def changes(adapter: Adapter) -> np.ndarray[Any, Any]:
    (module,) = adapter.modules.values()
    return np.stack([np.matmul(*module.factors(expert, np.float64)) for expert in range(module.experts)])


@pytest.mark.parametrize(("rows", "cols"), [(10, 8), (8, 8)], ids=["rectangular", "square"])
@pytest.mark.parametrize(("version", "is_transposed"), ON_COLUMNS)
def test_axis_by_version(
    rows: int, cols: int, version: str | None, is_transposed: bool, tmp_path: Path
) -> None:
    wanted = write(tmp_path, rows, cols, version, ON_COLUMNS[version, is_transposed])
    held = {UP: ExpertLayout((EXPERTS, rows, cols), is_transposed)}
    adapter, notes = settle_layout(load_adapter(tmp_path), held.get)
    np.testing.assert_allclose(changes(adapter), wanted.numpy(), rtol=1e-12)
    # Only where no shape proves it.
    assert bool(notes) == (version is None and rows == cols)
    assert ("the config has no peft_version" in " ".join(adapter.notes)) == (version is None)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2", "0.19.1.dev0@abc", "nonsense"])
@pytest.mark.parametrize("on_columns", [False, True])
def test_shapes_are_believed_before_versions(version: str | None, on_columns: bool, tmp_path: Path) -> None:
    wanted = write(tmp_path, 10, 8, version, on_columns)
    held = {UP: ExpertLayout((EXPERTS, 10, 8), is_transposed=False)}
    adapter, notes = settle_layout(load_adapter(tmp_path), held.get)
    np.testing.assert_allclose(changes(adapter), wanted.numpy(), rtol=1e-12)
    known = {(None, False), ("0.18.1", False), ("0.19.0", False), ("0.21.2", True)}
    silent = (version, on_columns) in known or version in ("0.19.1.dev0@abc", "nonsense")
    assert bool(notes) == (not silent)
    assert all("the base's shapes prove" in note for note in notes)


@pytest.mark.parametrize(
    ("version", "is_transposed", "reason"),
    [
        ("0.19.1.dev0@abc", False, "a development version"),
        ("0.18.2.dev0", False, "a development version"),
        ("0.21.2", None, "its class is not known"),
        ("0.19.0", None, "its class is not known"),
    ],
)
def test_square_and_unknown_stays_unsettled(
    version: str, is_transposed: bool | None, reason: str, tmp_path: Path
) -> None:
    write(tmp_path, 8, 8, version, True)
    held = ExpertLayout((EXPERTS, 8, 8), is_transposed)
    adapter, _ = settle_layout(load_adapter(tmp_path), {UP: held}.get)
    (module,) = adapter.modules.values()
    assert module.layout != "known"
    assert reason in unsettled(module, held).detail


class Square(torch.nn.Module):
    """A square gate_up_proj beside a down_proj that is not: 2·intermediate equals hidden."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        experts = Experts()
        experts.gate_up_proj = torch.nn.Parameter(torch.empty(3, 8, 8))
        experts.down_proj = torch.nn.Parameter(torch.empty(*((3, 4, 8) if transposed else (3, 8, 4))))
        experts.is_transposed = transposed
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"experts": experts})])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("names", [["gate_up_proj"], ["gate_up_proj", "down_proj"]], ids=["alone", "both"])
def test_square_as_the_installed_peft_merges(is_transposed: bool, names: list[str], tmp_path: Path) -> None:
    case = Case(lambda: Square(is_transposed), {"target_parameters": [f"experts.{name}" for name in names]})
    before, theirs = saved_and_merged(case, tmp_path, torch.float64)
    # With both, the sibling's shape is enough; alone, the class has to say it.
    known = is_transposed if len(names) == 1 else None
    adapter, _ = settle_layout(load_adapter(tmp_path), lambda name: ExpertLayout(before[name].shape, known))
    for module in adapter.modules.values():
        name = f"{module.path}.{module.parameter}"
        ours = np.stack([np.matmul(*module.factors(e, np.float64)) for e in range(module.experts)])
        np.testing.assert_allclose(ours, theirs[name] - before[name], atol=1e-12)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2", "0.19.1.dev0@abc"])
def test_written_again_has_the_same_layout(version: str | None, tmp_path: Path) -> None:
    write(tmp_path, 8, 8, version, True)
    adapter = load_adapter(tmp_path)
    save_adapter(adapter, tmp_path / "again")
    (mine,), (again,) = adapter.modules.values(), load_adapter(tmp_path / "again").modules.values()
    assert (mine.turned, mine.layout) == (again.turned, again.layout)
    stated = json.loads((tmp_path / "again/adapter_config.json").read_text())["peft_version"]
    assert stated == (version or "0.18.1")


def test_mixed_layouts_are_not_written(tmp_path: Path) -> None:
    write(tmp_path, 8, 8, "0.18.1", False)
    adapter = load_adapter(tmp_path)
    (module,) = adapter.modules.values()
    other = dataclasses.replace(module, path="layers.1.experts", turned=False, layout="class")
    mixed = dataclasses.replace(adapter, modules={module.key: module, other.key: other})
    with pytest.raises(AdapterError, match="can't be saved in PEFT's format") as raised:
        save_adapter(mixed, tmp_path / "again")
    assert "have a layout of no PEFT version" in str(raised.value.problems)


@pytest.mark.parametrize(
    ("path", "levels", "expected"),
    [
        # What PEFT's all-linear writes: one target with a module, two for every module that has them.
        ("model.layers.0.mlp.gate", 1, ["weight"]),
        ("model.layers.0.mlp.experts", 2, ["gate_up_proj", "down_proj"]),
        ("model.layers.0.self_attn.q_proj", 1, ["gate_up_proj", "down_proj"]),
    ],
)
def test_targets_without_a_module(path: str, levels: int, expected: list[str]) -> None:
    assert parameter_names(path, ["gate_up_proj", "gate.weight", "down_proj"], levels) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["self_attn.q_proj"]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": r".*\.(q|k)_proj"}, True),
        ({"target_modules": "q_proj"}, False),
        ({"target_modules": "("}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, False),
        ({}, False),
    ],
)
def test_target_modules_as_peft_matches_them(config: dict[str, Any], expected: bool) -> None:
    assert is_target_module("layers.0.self_attn.q_proj", config) == expected


def test_exchanged_parameters_are_refused(tmp_path: Path) -> None:
    """The nesting of another order shows in the shapes, in every layout."""
    names = ["gate_up_proj", "down_proj"]
    adapt(make(lambda: Square(False)), target_parameters=names).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    swapped = {
        name.replace("experts.base_layer.", "experts.") if "base_layer" in name
        else name.replace("experts.", "experts.base_layer."): values
        for name, values in tensors.items()
    }  # fmt: skip
    save_file(swapped, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as raised:
        load_adapter(tmp_path)
    assert "nested in an unknown order" in str(raised.value.problems)


def test_a_parameter_that_the_model_lacks_is_taken_out_of_the_config(tmp_path: Path) -> None:
    """Nemotron-H's experts have no gate_up_proj, and PEFT passes over the name."""
    write(tmp_path, 10, 8, "0.21.2", True)
    wanted = changes(load_adapter(tmp_path))
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    listed = ["experts.gate_up_proj", "experts.down_proj"]
    file.write_text(json.dumps({**config, "target_parameters": listed}))
    with pytest.raises(AdapterError) as raised:
        load_adapter(tmp_path)
    assert "take out of the config's target_parameters those" in str(raised.value.problems)
    file.write_text(json.dumps({**config, "target_parameters": listed[:1]}))
    np.testing.assert_array_equal(changes(load_adapter(tmp_path)), wanted)
