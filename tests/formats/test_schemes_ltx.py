"""LTX's names: those of LTX-2 against diffusers' own conversion of adapters, and blocks that need none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_ltx2_lora_to_diffusers,
    _convert_non_diffusers_ltxv_lora_to_diffusers,
)
from safetensors.torch import load_file, save_file
from scheme_bases import RANK, converted, write_base
from scheme_transformers import FAMILIES

from lora_export.formats.schemes.ltx import SCHEME
from lora_export.modes.merge_checkpoint import merge_checkpoint


@pytest.mark.parametrize("path", [path for path in SCHEME.table if "single" in path or "proj" in path])
def test_names_of_ltx_2(path: str) -> None:
    name = f"diffusion_model.{path}.lora_A.weight"
    (wanted,) = _convert_non_diffusers_ltx2_lora_to_diffusers({name: torch.zeros(1)})
    assert wanted == f"transformer.{SCHEME.table[path]}.lora_A.weight"


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_blocks_have_the_same_names(prefix: str, tmp_path: Path) -> None:
    """What LTX's trainer and ComfyUI write for attention and MLP, as diffusers reads it."""
    torch.manual_seed(0)
    family = FAMILIES["ltx"]()
    base = write_base(tmp_path / "base", converted(family, family.random()), family.model())
    stored = load_file(base / "diffusion_pytorch_model.safetensors")
    paths = [
        n.removesuffix(".weight")
        for n in stored
        if "blocks" in n and stored[n].ndim == 2 and "table" not in n
    ]
    tensors = {}
    for path in paths:
        rows, cols = stored[f"{path}.weight"].shape
        tensors[f"{prefix}{path}.lora_A.weight"] = torch.randn(RANK, cols)
        tensors[f"{prefix}{path}.lora_B.weight"] = torch.randn(rows, RANK)
    save_file(tensors, tmp_path / "style.safetensors")
    read = _convert_non_diffusers_ltxv_lora_to_diffusers(dict(tensors), prefix.removesuffix("."))
    merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    for path in paths:
        a, b = (read[f"transformer.{path}.lora_{x}.weight"].double() for x in "AB")
        expected = stored[f"{path}.weight"].double() + b @ a
        torch.testing.assert_close(merged[f"{path}.weight"].double(), expected, rtol=2e-6, atol=2e-6)
