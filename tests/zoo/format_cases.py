"""What tests of formats share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.formats.reading.tensors import write_safetensors

RANDOM = np.random.default_rng(0)


def values(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(dtype)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    write_safetensors(path, tensors, metadata or {})
    return path


def loralib_file(tmp_path: Path, content: dict[str, Any]) -> Path:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(inner) for key, inner in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    torch.save(convert(content), tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


PAIR = {"layer.0.q.A.weight": values(2, 4), "layer.0.q.B.weight": values(3, 2)}


def flux(*ranks: int) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for i, rank in enumerate(ranks):
        tensors[f"transformer.b.{i}.q.lora_A.weight"] = values(rank, 4)
        tensors[f"transformer.b.{i}.q.lora_B.weight"] = values(6, rank)
    return tensors


GOOD = {"base_model.model.m.lora_A.weight": values(2, 4), "base_model.model.m.lora_B.weight": values(3, 2)}


def peft_folder(tmp_path: Path, tensors: dict[str, np.ndarray], config: Any = None) -> Path:
    text = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} if config is None else config
    (tmp_path / "adapter_config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    write(tmp_path / "adapter_model.safetensors", tensors)
    return tmp_path
