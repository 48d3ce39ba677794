"""mlx-lm's adapters: its own formulas (``fuse`` in ``lora.py`` and ``dora.py``) in float64 are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft_models import merge, parameters, worst_error
from safetensors.torch import save_file
from tiny_models import build
from torch import nn

from lora_export.errors import AdapterError
from lora_export.formats import load_adapter, save_adapter

CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 16,
    "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    "model": "mlx-community/some-model",
    "optimizer": "adam",
    "lr_schedule": None,
}
MODELS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["v_proj", "o_proj"],
    "phi3": ["qkv_proj", "embed_tokens"],
}
State = dict[str, torch.Tensor]


def _modules(model: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.endswith(tuple(targets))}


def _tensors(model: nn.Module, targets: list[str], dora: bool = False) -> State:
    torch.manual_seed(1)
    made: State = {}
    for path, module in _modules(model, targets).items():
        rows, cols = module.weight.shape
        embedding = isinstance(module, nn.Embedding)
        made[f"{path}.lora_a"] = torch.randn(rows if embedding else cols, 4)
        made[f"{path}.lora_b"] = torch.randn(4, cols if embedding else rows)
        if dora:
            made[f"{path}.m"] = torch.rand(rows) + 0.5
    return made


def _fused(model: nn.Module, tensors: State, scale: float) -> dict[str, np.ndarray]:
    """What mlx-lm's fuse makes of each layer."""
    merged = parameters(model)
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a")
        a, b = tensors[f"{path}.lora_a"].double(), tensors[f"{path}.lora_b"].double()
        weight = torch.from_numpy(merged[f"{path}.weight"]).double()
        if isinstance(model.get_submodule(path), nn.Embedding):
            weight = weight + (scale * a) @ b
        else:
            weight = weight + (scale * b.T) @ a.T
        if (m := tensors.get(f"{path}.m")) is not None:
            weight = (m.double() / torch.linalg.norm(weight, dim=1))[:, None] * weight
        merged[f"{path}.weight"] = weight.float().numpy()
    return merged


def _write(folder: Path, tensors: State, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("scale", [20.0, 0.7, 1])
@pytest.mark.parametrize("arch", MODELS)
def test_merges_as_mlx_fuses(arch: str, scale: float, tmp_path: Path) -> None:
    model = build(arch)
    tensors = _tensors(model, MODELS[arch])
    config = {**CONFIG, "lora_parameters": {**CONFIG["lora_parameters"], "scale": scale}}
    adapter = load_adapter(_write(tmp_path / "a", tensors, config))
    assert (adapter.format, adapter.name) == ("mlx", "a")
    assert set(adapter.tensor_names) == set(tensors)
    assert worst_error(merge(parameters(model), adapter), _fused(model, tensors, scale)) < 2e-6


@pytest.mark.parametrize("kind", [{"fine_tune_type": "dora"}, {"fine_tune_type": None, "use_dora": True}])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_dora(arch: str, kind: dict[str, Any], tmp_path: Path) -> None:
    model = build(arch)
    tensors = _tensors(model, MODELS[arch], dora=True)
    config = {key: value for key, value in {**CONFIG, **kind}.items() if value is not None}
    adapter = load_adapter(_write(tmp_path, tensors, config))
    assert worst_error(merge(parameters(model), adapter), _fused(model, tensors, 20.0)) < 2e-6


def test_written_as_peft_it_is_the_same(tmp_path: Path) -> None:
    model = build("llama")
    tensors = _tensors(model, MODELS["llama"])
    save_adapter(load_adapter(_write(tmp_path / "mlx", tensors, CONFIG)), tmp_path / "peft")
    theirs = parameters(PeftModel.from_pretrained(build("llama"), tmp_path / "peft").merge_and_unload())
    assert worst_error(_fused(model, tensors, 20.0), theirs) < 2e-6


def test_earlier_steps_are_left_aside_by_name(tmp_path: Path) -> None:
    model = build("llama")
    folder = _write(tmp_path / "a", _tensors(model, ["q_proj"]), CONFIG)
    save_file(_tensors(model, ["k_proj"]), folder / "0000100_adapters.safetensors")
    adapter = load_adapter(folder)
    assert all(module.path.endswith("q_proj") for module in adapter.modules.values())
    assert any("0000100_adapters.safetensors" in note for note in adapter.notes)
    step = load_adapter(folder / "0000100_adapters.safetensors")
    assert {module.scaling for module in step.modules.values()} == {20.0}


def test_without_its_config(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", _tensors(build("llama"), ["q_proj"]))
    with pytest.raises(
        AdapterError, match=r"scale: mlx-lm's adapter_config\.json is missing beside .*or give --alpha"
    ):
        load_adapter(folder)
    assert {module.scaling for module in load_adapter(folder, alpha=6).modules.values()} == {1.5}


def _parameters_with(**change: Any) -> dict[str, Any]:
    return {**CONFIG, "lora_parameters": {**CONFIG["lora_parameters"], **change}}


GOOD = {"model.layers.0.q.lora_a": torch.ones(6, 4), "model.layers.0.q.lora_b": torch.ones(4, 3)}
WRONG: dict[str, tuple[State, dict[str, Any], str]] = {
    "full fine-tuning": (GOOD, {**CONFIG, "fine_tune_type": "full"}, "fine_tune_type 'full', not a low-rank"),
    "old alpha": (GOOD, _parameters_with(alpha=16), "old versions of mlx-lm multiply scale"),
    "no scale": (GOOD, _parameters_with(scale=None), r"lora_parameters\.scale: None, wanted a number"),
    "scale is text": (GOOD, _parameters_with(scale="20"), r"lora_parameters\.scale: '20', wanted a number"),
    "another rank": (GOOD, _parameters_with(rank=8), "rank 8 is stated, but"),
    "a list": (GOOD, {**CONFIG, "lora_parameters": [1]}, r"lora_parameters: \[1\], wanted an object"),
    "no m": (GOOD, {**CONFIG, "fine_tune_type": "dora"}, "has no m, but the config's fine_tune_type is dora"),
    "an m": ({**GOOD, "model.layers.0.q.m": torch.ones(3)}, CONFIG, "has an m .DoRA., but"),
    "half a pair": ({"model.q.lora_a": torch.ones(6, 4)}, CONFIG, "lora_B is missing"),
    "experts": (
        {"m.switch_mlp.up.lora_a": torch.ones(2, 4, 6), "m.switch_mlp.up.lora_b": torch.ones(2, 3, 4)},
        CONFIG,
        r"experts of mlx-lm \(switch_mlp\) are not supported",
    ),
    "NaN": ({**GOOD, "model.layers.0.q.lora_a": torch.full((6, 4), torch.nan)}, CONFIG, "are NaN"),
    "PEFT's layout": ({n: v.T.contiguous() for n, v in GOOD.items()}, CONFIG, "have no common rank"),
    "other tensors": ({**GOOD, "model.norm.weight": torch.ones(3)}, CONFIG, r"norm\.weight: not lora_a"),
    "both spellings": (
        {**GOOD, "model.layers.0.q.lora_A": torch.ones(4, 6), "model.layers.0.q.lora_B": torch.ones(3, 4)},
        CONFIG,
        "looks like several formats: loralib, mlx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    tensors, config, message = WRONG[case]
    with pytest.raises(AdapterError, match=message):
        load_adapter(_write(tmp_path, tensors, config))


@pytest.mark.parametrize("option", [{"alpha": 4}, {"rslora": True}, {"rank": 8}])
def test_options_that_contradict_the_config(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="omit"):
        load_adapter(_write(tmp_path, GOOD, CONFIG), **option)


def test_pefts_config_is_not_mlxs(tmp_path: Path) -> None:
    folder = _write(tmp_path, GOOD, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    with pytest.raises(AdapterError, match=r"scale: mlx-lm's adapter_config\.json is missing"):
        load_adapter(folder)
