"""Tiny diffusers models in their trainers' original names: diffusers itself says what they become.

Each `Family` has the original state dict's names and shapes, and diffusers' conversion of such a state dict.
A merge in the original names (plain arithmetic), converted, is compared with our merge into the diffusers
folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.adapter import Adapter, LoraModule
from lora_export.cli import main

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]
HIDDEN = 16
RANK, ALPHA = 3, 2.0


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: For the test's id.
        shapes: The original names.
        convert: diffusers' conversion.
        model: Makes the diffusers model, into which the converted state dict has to fit exactly.
    """

    name: str
    shapes: Shapes
    convert: Callable[[State], State]
    model: Callable[[], torch.nn.Module]

    def random(self) -> State:
        """Return random values in the original names."""
        return {name: torch.randn(shape) * 0.3 for name, shape in self.shapes.items()}


def modules_of(family: Family, *parts: str) -> list[str]:
    """Return the paths of linear and convolution modules, in original names; all, or those with a part."""
    weights = [name for name, shape in family.shapes.items() if len(shape) > 1 and name.endswith(".weight")]
    paths = [name.removesuffix(".weight") for name in weights]
    return [path for path in paths if not parts or any(part in path for part in parts)]


def trained(family: Family, paths: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return a random (A, B) for each path."""
    pairs = {}
    for path in paths:
        out, cols, *kernel = family.shapes[f"{path}.weight"]
        ones = [1] * len(kernel)
        pairs[path] = (torch.randn(RANK, cols, *kernel), torch.randn(out, RANK, *ones))
    return pairs


def delta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the scaled product in float64, in the weight's shape."""
    left, right = b.double().reshape(len(b), -1), a.double().reshape(len(a), -1)
    return (ALPHA / RANK * left @ right).reshape(len(b), *a.shape[1:])


def merged_state(state: State, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> State:
    """Return the original model's tensors in float64 with the pairs' products added."""
    merged = {name: values.double() for name, values in state.items()}
    for path, (a, b) in pairs.items():
        merged[f"{path}.weight"] = merged[f"{path}.weight"] + delta(a, b)
    return merged


def kohya(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], prefix: str = "lora_unet_") -> State:
    """Return a kohya file's tensors."""
    tensors = {}
    for path, (a, b) in pairs.items():
        name = prefix + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def dotted(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], prefix: str = "diffusion_model.") -> Adapter:
    """Return what ComfyUI's and ai-toolkit's files hold."""
    modules = {}
    for path, (a, b) in pairs.items():
        names = tuple(f"{prefix}{path}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        kind = "conv" if a.ndim > 2 else "linear"
        module = LoraModule(
            f"{prefix}{path}", kind, a.numpy(), b.numpy(), alpha=ALPHA, rank=RANK, tensor_names=names
        )
        modules[module.key] = module
    names = tuple(name for module in modules.values() for name in module.tensor_names)
    return Adapter("style", "style.safetensors", "plain", modules, tensor_names=names)


def write_base(folder: Path, state: State, model: torch.nn.Module) -> Path:
    """Write converted values as a diffusers folder, after they were seen to fit the model exactly."""
    model.load_state_dict(state, strict=True)
    folder.mkdir()
    values = {name: value.contiguous().clone() for name, value in state.items()}
    save_file(values, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": type(model).__name__}))
    return folder


def converted(family: Family, state: State) -> State:
    """Convert, and leave out what the model does not hold (the conversion of a UNet makes Nones)."""
    kept = set(family.model().state_dict())
    return {name: value for name, value in family.convert(dict(state)).items() if name in kept}


def compare(folder: Path, expected: State) -> None:
    """Compare every tensor with a merge in float64, rounded once."""
    merged = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert set(merged) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(merged[name].double(), values.double(), rtol=2e-6, atol=2e-6, msg=name)


def run(*arguments: object) -> object:
    """Run the command line and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code
