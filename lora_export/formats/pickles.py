"""Tensors of a torch checkpoint (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), read without running its code.

People save a bare state dict, or a dict that holds one beside alpha, rank and bookkeeping. Both become the
same: tensors, and the few numbers that say how to scale them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import AdapterError, BackendUnavailable

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# Where a dict keeps its tensors, and how it spells the numbers that we need.
_NESTS = (
    "state_dict",
    "model_state_dict",
    "lora_state_dict",
    "model",
    "lora",
    "adapter",
    "weights",
    "module",
)
_CONFIGS = ("config", "lora_config", "hparams", "hyper_parameters", "args")
_SPELLINGS = {
    "alpha": "alpha", "lora_alpha": "alpha",
    "r": "rank", "rank": "rank", "lora_r": "rank", "lora_rank": "rank",
    "scaling": "scaling", "scale": "scaling", "lora_scaling": "scaling",
    "rslora": "rslora", "use_rslora": "rslora",
    "enable_lora": "enable_lora",
}  # fmt: skip
# Settings that change what the factors mean, which these formats can't say.
_MEANINGFUL = ("use_dora", "dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication")
_BOOKKEEPING = ("optim", "sched", "epoch", "step", "rng", "loss", "callbacks", "loops", "version", "metric")


@dataclass
class Checkpoint:
    """What a torch checkpoint holds.

    Attributes:
        tensors: Name → values.
        settings: Of ``alpha``, ``rank``, ``scaling``, ``rslora``, ``enable_lora`` what the file states.
        ignored: Keys that are bookkeeping of a training run.
        problems: Keys that we don't understand, or settings that contradict each other.
    """

    tensors: dict[str, Array] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a torch checkpoint with ``weights_only=True``.

    Raises:
        BackendUnavailable: torch is not installed.
        AdapterError: The file is damaged, holds other objects than tensors and plain values, or is no dict.
    """
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(
            f"reading {path.name} needs torch, which is not installed",
            "pip install 'lora-export[hf]', or save the adapter as .safetensors",
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error}", "check the path and its permissions") from error
    # torch raises whatever its zip reader or unpickler met: RuntimeError, EOFError, UnpicklingError, …
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"{path} can't be loaded with weights_only=True: {first}",
            "it is damaged, or holds Python objects (refused: loading them would run their code); "
            "save the state dict alone, best as .safetensors",
        ) from error
    if not isinstance(content, Mapping):
        raise AdapterError(
            f"{path} holds a {type(content).__name__}, wanted a dict of tensors",
            "save it with torch.save(model.state_dict(), path)",
        )
    checkpoint = Checkpoint()
    _collect(content, "", checkpoint, torch.Tensor)
    if checkpoint.problems:
        raise AdapterError(
            f"{path} holds entries that are neither tensors nor settings we know",
            "save only the LoRA tensors, alpha and r",
            checkpoint.problems,
        )
    return checkpoint


def _collect(content: Mapping[Any, Any], where: str, into: Checkpoint, tensor_type: type) -> None:
    for key, value in content.items():
        name = f"{where}{key}"
        spelling = _SPELLINGS.get(str(key))
        # A one-element tensor under such a key is the number; under "lora_unet….alpha" the key differs.
        one: Any = value
        number = one.item() if isinstance(value, tensor_type) and one.numel() == 1 else value
        if spelling and isinstance(number, (bool, int, float, list, tuple)):
            _set(into, spelling, number, name)
        elif isinstance(value, tensor_type):
            if str(key) in into.tensors:
                into.problems.append(f"{name}: a second tensor of this name")
            try:
                into.tensors[str(key)] = _array(value)
            # A sparse, quantised or meta tensor: torch says so in one of these.
            except (RuntimeError, TypeError, NotImplementedError) as error:
                into.problems.append(f"{name}: {str(error).splitlines()[0]}")
        elif isinstance(value, Mapping) and key in _NESTS:
            _collect(value, f"{name}/", into, tensor_type)
        elif isinstance(value, Mapping) and key in _CONFIGS:
            for setting, stated in value.items():
                if setting in _MEANINGFUL and stated:
                    into.problems.append(f"{name}/{setting}: {stated!r} is not supported in this format")
                if (known := _SPELLINGS.get(str(setting))) and isinstance(stated, (bool, int, float, list)):
                    _set(into, known, stated, f"{name}/{setting}")
        elif key in _MEANINGFUL:
            if value:
                into.problems.append(f"{name}: {value!r} is not supported in this format")
        elif any(word in str(key).lower() for word in _BOOKKEEPING) or isinstance(value, (str, type(None))):
            into.ignored.append(name)
        else:
            into.problems.append(f"{name}: {type(value).__name__}")


def _set(into: Checkpoint, key: str, value: Any, name: str) -> None:
    if into.settings.setdefault(key, value) != value:
        into.problems.append(f"{name}: {value}, but {key} is {into.settings[key]} elsewhere in the file")


def _array(tensor: Any) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    kind = str(tensor.dtype)
    # numpy has no bfloat16 or float8: take the bits over under ml_dtypes' names.
    for torch_name, bits, dtype in (
        ("torch.bfloat16", "int16", ml_dtypes.bfloat16),
        ("torch.float8_e4m3fn", "int8", ml_dtypes.float8_e4m3fn),
        ("torch.float8_e5m2", "int8", ml_dtypes.float8_e5m2),
    ):
        if kind == torch_name:
            import torch

            raw: Array = tensor.view(getattr(torch, bits)).numpy()
            return raw.view(dtype)
    array: Array = np.asarray(tensor.numpy())
    return array
