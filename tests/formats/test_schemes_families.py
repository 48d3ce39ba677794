"""FLUX.1 and Chroma: blocks of the same names and sizes; what tells their adapters from each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scheme_bases import compare, converted, kohya, merged_state, modules_of, trained, write_base
from scheme_transformers import FAMILIES

from lora_export import AdapterError, LoraExportError
from lora_export.modes.merge_checkpoint import merge_checkpoint

OTHER = {"flux": "chroma", "flux-schnell": "chroma", "chroma": "flux"}
# sd-scripts ``library/sai_model_spec.py``; ai-toolkit and others write dots.
STATED = {
    "flux": ["flux-1-dev/lora", "Flux.1-dev/lora", "flux-1/lora"],
    "flux-schnell": ["flux-1-schnell/lora"],
    "chroma": ["chroma/lora"],
}
CASES = [(family, stated) for family, names in STATED.items() for stated in names]


def base_of(name: str, folder: Path, original: bool = False) -> Path:
    torch.manual_seed(0)
    family = FAMILIES[name]()
    state = family.random()
    if original:
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        return folder
    return write_base(folder, converted(family, state), family.model())


def blocks(name: str, folder: Path, **metadata: str) -> Path:
    """Write an adapter of attention and MLP, which both families have."""
    paths = [path for path in modules_of(FAMILIES[name]()) if "blocks" in path and "mod" not in path]
    save_file(kohya(trained(FAMILIES[name](), paths)), folder / "style.safetensors", metadata)
    return folder / "style.safetensors"


@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "original"])
@pytest.mark.parametrize(("name", "stated"), CASES)
def test_what_the_file_says_it_was_trained_on(name: str, stated: str, original: bool, tmp_path: Path) -> None:
    style = blocks(name, tmp_path, **{"modelspec.architecture": stated})
    wrong = base_of(OTHER[name], tmp_path / "wrong", original)
    with pytest.raises(AdapterError) as refused:
        merge_checkpoint(wrong, style, tmp_path / "out", allow_unmatched=True)
    assert "was trained on" in refused.value.message
    assert stated in refused.value.message
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base_of(name, tmp_path / "right", original), style, tmp_path / "out")


@pytest.mark.parametrize("name", OTHER)
def test_modules_that_only_one_of_them_has(name: str, tmp_path: Path) -> None:
    """FLUX.1's blocks have modulations, Chroma an approximator in their place: unmatched in the other."""
    paths = modules_of(FAMILIES[name](), "attn", "mod", "guidance")
    save_file(kohya(trained(FAMILIES[name](), paths)), tmp_path / "style.safetensors")
    wrong = base_of(OTHER[name], tmp_path / "wrong")
    with pytest.raises(LoraExportError) as refused:
        merge_checkpoint(wrong, tmp_path / "style.safetensors", tmp_path / "out")
    lines = str(refused.value.problems)
    assert "guidance" in lines or "mod" in lines


@pytest.mark.parametrize("name", OTHER)
def test_a_file_that_says_nothing_is_taken(name: str, tmp_path: Path) -> None:
    """Other trainers' files: as the blocks are alike, it is merged as diffusers would."""
    torch.manual_seed(0)
    family = FAMILIES[name]()
    state, paths = family.random(), modules_of(family, "attn.")
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    pairs = trained(family, paths)
    save_file(kohya(pairs), tmp_path / "style.safetensors", {"modelspec.title": "chroma"})
    merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    compare(tmp_path / "out", converted(family, merged_state(state, pairs)))
