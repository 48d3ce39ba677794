"""List the modules of a PyTorch model that can be searched for in a graph, and read their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_export.adapter import Array
from lora_export.parity.localise.find_modules import ModuleShape
from lora_export.runtimes.torch.products import array_of, tensor_of
from lora_export.sites.target import Target

if TYPE_CHECKING:
    import torch

# Modules that hold stacked matrices (experts) have parameters of as many axes.
_STACKED = 3


def modules_of(model: torch.nn.Module) -> list[ModuleShape]:
    """Return every module with weights of its own, under each of its names.

    Linear modules (GPT-2's ``Conv1D`` among them), convolutions, embeddings, norms, stacked experts.
    """
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        shape = _shape_of(path, module)
        if shape is not None:
            found.append(shape)
    return found


def weight_in(model: torch.nn.Module, target: Target) -> Array | None:
    """Return a module's weight in its canonical shape, see `ModuleShape`; float32."""
    from torch import nn

    weight = getattr(model.get_submodule(target.path), "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    values: Array = weight.detach().float().cpu().numpy()
    # The shape can't tell whether a square weight is transposed.
    return values.T if _is_conv1d(model.get_submodule(target.path)) else values


def bare_output(model: torch.nn.Module, path: str, x: Array) -> Array | None:
    """Return a module's output for an input without any adapter; None if it is more than a product."""
    import torch

    module = model.get_submodule(path)
    shape = _shape_of(path, module)
    # Calls of different shapes come as one flat axis, see `TorchReference.run_with_modules`.
    if shape is None or shape.kind not in ("linear", "conv", "embedding") or x.ndim < 2:
        return None
    with torch.inference_mode():
        return array_of(module(tensor_of(x)))


def _is_conv1d(module: torch.nn.Module) -> bool:
    """Return True for GPT-2's linear module, which stores ``(in_dim, out_dim)``."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None


def _shape_of(path: str, module: torch.nn.Module) -> ModuleShape | None:
    from torch import nn

    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        shape = tuple(weight.shape)
        if isinstance(module, nn.Embedding):
            return ModuleShape(path, "embedding", shape, id(module))
        if isinstance(module, nn.Linear):
            return ModuleShape(path, "linear", shape, id(module))
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return ModuleShape(path, "conv", shape, id(module))
        if _is_conv1d(module):
            return ModuleShape(path, "linear", shape[::-1], id(module))
        if weight.ndim == 1:
            return ModuleShape(path, "vector", shape, id(module))
    if any(parameter.ndim >= _STACKED for parameter in module.parameters(recurse=False)):
        return ModuleShape(path, "parameter", (), id(module))
    return None
