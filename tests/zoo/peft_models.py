"""Tiny models of each layer kind, PEFT adapters on them, and our merge of what PEFT saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export.adapter import Adapter, LoraModule
from lora_export.storage.patch import Patch, Placement, patch_from


class Block(nn.Module):
    """Linears, nested twice under the same last name."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(12, 10), nn.Linear(12, 10)
        self.mlp = nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)})


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(12)
        self.score = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 3))


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, (3, 2))
        self.flat = nn.Conv2d(4, 6, 1)
        self.three = nn.Conv3d(4, 6, 2)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(18, 6)


class Experts(nn.Module):
    """Stacked experts as transformers has them: ``(experts, out, in)``, gate_up before down."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * 5, 8))
        self.down_proj = nn.Parameter(torch.empty(experts, 8, 5))


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(), "gate": nn.Linear(8, 3)})])


class TransposedMoe(Moe):
    """GPT-OSS's order, ``(experts, in, out)``."""

    def __init__(self) -> None:
        super().__init__()
        experts = self.layers[0]["experts"]
        experts.gate_up_proj = nn.Parameter(torch.empty(3, 8, 2 * 5))
        experts.down_proj = nn.Parameter(torch.empty(3, 5, 8))
        experts.is_transposed = True


@dataclass
class Case:
    """One feature: a model, the ``LoraConfig`` that uses it."""

    model: Callable[[], nn.Module]
    config: dict[str, Any] = field(default_factory=dict)


def make(model: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = model().to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def adapt(model: nn.Module, **config: Any) -> PeftModel:
    """A PEFT model whose every trained value is random: nothing is the identity by luck."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(
            model, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], **config})
        )
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return peft_model


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: values.detach().numpy().copy() for name, values in model.state_dict().items()}


def saved_and_merged(case: Case, folder: Path, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save the adapter, load it again onto a fresh base as users do, and let PEFT merge it.

    Returns:
        The base's parameters, and the merged model's.
    """
    adapt(make(case.model, dtype), **case.config).save_pretrained(folder)
    base = make(case.model, dtype)
    before = parameters(base)
    loaded = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    return before, parameters(loaded.merge_and_unload())


def merge(base: dict[str, np.ndarray], adapter: Adapter) -> dict[str, np.ndarray]:
    """Merge by the obvious placement: extras first, then each module's patch on the whole stored tensor."""
    merged = {name: values.copy() for name, values in base.items()}
    for name, values in adapter.extras.items():
        assert merged[name].shape == values.shape
        merged[name] = values.astype(merged[name].dtype)
    for module in adapter.modules.values():
        stored = merged[f"{module.path}.{module.parameter}"]
        merged[f"{module.path}.{module.parameter}"] = _patched(stored, module, adapter.fan_in_fan_out)
        if module.lora_bias is not None:
            bias = f"{module.path}.bias"
            merged[bias] = merged[bias] + (module.lora_bias * module.scaling).astype(stored.dtype)
    return merged


def _patched(stored: np.ndarray, module: LoraModule, fan_in_fan_out: bool) -> np.ndarray:
    rows, _ = module.matrix_shape
    if module.kind == "parameter" and stored.ndim == 3:
        transposed = stored.shape[1:] != module.weight_shape
        placements = [
            Placement(rows=(0, rows), row=e * stored.shape[1], transposed=transposed, expert=e)
            for e in range(module.experts)
        ]
        matrix = stored.reshape(-1, stored.shape[-1]).copy()
    else:
        placements = [Placement(rows=(0, rows), transposed=fan_in_fan_out and module.kind == "linear")]
        matrix = stored.reshape(stored.shape[0], -1).copy()
    for placement in placements:
        _apply(matrix, patch_from(module, placement, dtype=stored.dtype.type))
    return matrix.reshape(stored.shape)


def _apply(matrix: np.ndarray, patch: Patch) -> None:
    view = matrix[patch.row : patch.row + patch.height, patch.col : patch.col + patch.width]
    assert patch.left is not None
    assert patch.right is not None
    assert view.shape == (patch.height, patch.width)
    view += patch.left @ patch.right
    if patch.magnitude is not None:
        norm = np.linalg.norm(view, axis=1 - patch.magnitude_axis, keepdims=True)
        magnitude = np.expand_dims(patch.magnitude, 1 - patch.magnitude_axis)
        view *= magnitude / norm


def worst_error(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Largest relative error of any parameter, in the Frobenius norm."""
    assert ours.keys() == theirs.keys()
    return max(
        float(np.linalg.norm(ours[n].astype(np.float64) - theirs[n]) / max(np.linalg.norm(theirs[n]), 1e-30))
        for n in theirs
        if theirs[n].size
    )
