"""Adapters of FLUX.1 as XLabs' trainer writes them, against diffusers' conversion of such files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file
from scheme_bases import HIDDEN, State, converted, write_base
from scheme_transformers import FAMILIES

from lora_export import AdapterError, LoraExportError, load_adapter
from lora_export.modes.merge_checkpoint import merge_checkpoint

PREFIXES = ["", "diffusion_model."]


def xlabs(prefix: str = "", double: int = 2, single: int = 2) -> State:
    """Return every module that XLabs' processors train (x-flux, ``…StreamBlockLoraProcessor``)."""
    sizes = {"qkv": (HIDDEN, 3 * HIDDEN), "proj": (HIDDEN, HIDDEN)}
    tensors: State = {}

    def add(name: str, cols: int, rows: int) -> None:
        tensors[f"{name}.down.weight"] = torch.randn(3, cols)
        tensors[f"{name}.up.weight"] = torch.randn(rows, 3)

    for block in range(double):
        for leaf, size in sizes.items():
            for stream in (1, 2):
                add(f"{prefix}double_blocks.{block}.processor.{leaf}_lora{stream}", *size)
    for block in range(single):
        add(f"{prefix}single_blocks.{block}.processor.qkv_lora", *sizes["qkv"])
        add(f"{prefix}single_blocks.{block}.processor.proj_lora", 5 * HIDDEN, HIDDEN)
    return tensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    family = FAMILIES["flux"]()
    return write_base(tmp_path / "base", converted(family, family.random()), family.model())


@pytest.mark.parametrize("prefix", PREFIXES, ids=["bare", "ComfyUI"])
def test_merged_as_diffusers_converts_it(prefix: str, base: Path, tmp_path: Path) -> None:
    tensors = xlabs(prefix)
    save_file(tensors, tmp_path / "style.safetensors")
    stored = load_file(base / "diffusion_pytorch_model.safetensors")
    wanted = {name: values.double() for name, values in stored.items()}
    pairs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    for name, a in pairs.items():
        if name.endswith("lora_A.weight"):
            b = pairs[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            wanted[f"{path}.weight"] += b.double() @ a.double()
    report = merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    assert {name for row in report.plan.rows for name in row.tensors} == set(tensors)
    merged = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    changed = [name for name, values in merged.items() if not torch.equal(values, stored[name])]
    assert len(changed) == len(pairs) // 2
    for name, values in wanted.items():
        torch.testing.assert_close(merged[name].double(), values, rtol=2e-6, atol=2e-6, msg=name)


def test_the_original_names_of_the_base(tmp_path: Path) -> None:
    """In Black Forest Labs' own names a double block is found; of a single one, linear1 is not cut."""
    family = FAMILIES["flux"]()
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(family.random(), folder / "flux.safetensors")
    double = {name: values for name, values in xlabs().items() if name.startswith("double")}
    save_file(double, tmp_path / "double.safetensors")
    report = merge_checkpoint(folder, tmp_path / "double.safetensors", tmp_path / "out")
    assert {row.place for row in report.plan.rows} == {
        f"double_blocks.{n}.{side}_attn.{leaf}.weight"
        for n in (0, 1) for side in ("img", "txt") for leaf in ("qkv", "proj")
    }  # fmt: skip
    save_file(xlabs(), tmp_path / "all.safetensors")
    with pytest.raises(LoraExportError) as refused:
        merge_checkpoint(folder, tmp_path / "all.safetensors", tmp_path / "none")
    assert "single_blocks.0.qkv" in str(refused.value.problems)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"qkv_lora1", "qkv_lora"),
        (r"single_blocks\.0\.processor\.qkv_lora", "single_blocks.0.processor.qkv_lora2"),
        (r"proj_lora2", "out_lora2"),
        (r"double_blocks\.1\.processor", "double_blocks.1.block.processor"),
    ],
)
def test_other_names_are_refused(pattern: str, name: str, base: Path, tmp_path: Path) -> None:
    tensors = {re.sub(pattern, name, key): values for key, values in xlabs().items()}
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(LoraExportError) as refused:
        merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    assert any(name.rpartition(".")[2].split("_lora")[0] in line for line in refused.value.problems)
    assert not (tmp_path / "out").exists()


def test_a_stream_is_only_of_xlabs(tmp_path: Path) -> None:
    """`to_q_lora1` is no name of diffusers'."""
    save_file(
        {f"unet.a.processor.to_q_lora1.{x}.weight": torch.randn(4, 4) for x in ("down", "up")},
        tmp_path / "style.safetensors",
    )
    with pytest.raises(AdapterError) as refused:
        load_adapter(tmp_path / "style.safetensors")
    assert "XLabs" in str(refused.value.problems)
