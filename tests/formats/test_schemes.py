"""Adapters in their trainers' names, merged into diffusers folders; the oracle is diffusers' conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scheme_bases import (
    ALPHA,
    RANK,
    Family,
    compare,
    converted,
    delta,
    dotted,
    kohya,
    merged_state,
    modules_of,
    run,
    trained,
    write_base,
)
from scheme_transformers import FAMILIES

from lora_export.formats.schemes import translate
from lora_export.modes.merge_checkpoint import merge_checkpoint


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


def test_every_module_of_a_kohya_file(family: Family, tmp_path: Path) -> None:
    """The whole command, on all linear and convolution modules of the original model."""
    state, pairs = family.random(), trained(family, modules_of(family))
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    save_file(kohya(pairs), tmp_path / "style.safetensors")
    adapter = tmp_path / "style.safetensors"
    assert run("merge", "--base", base, "--adapter", adapter, "-o", tmp_path / "out") == 0
    merged = merged_state(state, pairs)
    compare(tmp_path / "out", converted(family, merged))


def test_dotted_names_behind_diffusion_model(family: Family, tmp_path: Path) -> None:
    state, pairs = family.random(), trained(family, modules_of(family))
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    report = merge_checkpoint(base, dotted(pairs), tmp_path / "out")
    assert "converted" in report.plan.notes[0]
    merged = merged_state(state, pairs)
    compare(tmp_path / "out", converted(family, merged))


def test_dora_and_biases_are_cut_with_the_rows(family: Family, tmp_path: Path) -> None:
    """Rows of fused modules, and those that are swapped, take their norm and their bias along."""
    paths = [p for p in modules_of(family) if len(family.shapes[f"{p}.weight"]) == 2]
    state, pairs = family.random(), trained(family, paths)
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    adapter, modules = dotted(pairs, ""), {}
    merged = {name: values.double() for name, values in state.items()}
    for key, module in adapter.modules.items():
        path, (a, b) = module.path, pairs[module.path]
        magnitude = torch.rand(len(b)) + 0.5
        total = merged[f"{path}.weight"] + delta(a, b)
        merged[f"{path}.weight"] = total * (magnitude.double() / total.norm(dim=1))[:, None]
        bias = None
        names = (*module.tensor_names, f"{path}.dora_scale")
        if f"{path}.bias" in merged:
            bias = torch.randn(len(b))
            merged[f"{path}.bias"] = merged[f"{path}.bias"] + ALPHA / RANK * bias.double()
            names = (*names, f"{path}.lora_B.bias")
        modules[key] = replace(
            module,
            magnitude=magnitude.numpy(),
            lora_bias=None if bias is None else bias.numpy(),
            tensor_names=names,
        )
    names = tuple(name for module in modules.values() for name in module.tensor_names)
    adapter = replace(adapter, modules=modules, tensor_names=names)
    merge_checkpoint(base, adapter, tmp_path / "out")
    compare(tmp_path / "out", converted(family, merged))


@pytest.mark.parametrize(
    "parts",
    [("attn", "attention.qkv"), ("img", "x_block", "output_blocks", "cross_attn", "refiner", "adaln_single")],
)
def test_some_of_the_modules(family: Family, parts: tuple[str, ...], tmp_path: Path) -> None:
    """What is trained alone is translated alike: attention, one side, one half of a UNet."""
    state, pairs = family.random(), trained(family, modules_of(family, *parts))
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    save_file(kohya(pairs), tmp_path / "style.safetensors")
    merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    merged = merged_state(state, pairs)
    compare(tmp_path / "out", converted(family, merged))


def test_every_tensor_of_the_file_has_a_row(family: Family, tmp_path: Path) -> None:
    state, pairs = family.random(), trained(family, modules_of(family))
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    tensors = kohya(pairs)
    save_file(tensors, tmp_path / "style.safetensors")
    report = merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out", dry_run=True)
    assert {name for row in report.plan.rows for name in row.tensors} == set(tensors)
    assert not report.plan.refused


def test_a_base_in_the_original_names_is_left_alone(family: Family) -> None:
    adapter = dotted(trained(family, modules_of(family)), "")
    assert translate(adapter, family.shapes) is None
    behind = {f"model.diffusion_model.{name}" for name in family.shapes}
    assert translate(adapter, behind) is None


def test_the_base_may_have_an_outer_prefix(family: Family) -> None:
    adapter = dotted(trained(family, modules_of(family)))
    known = {f"model.denoiser.{name}" for name in family.model().state_dict()}
    found = translate(adapter, known)
    assert found is not None
    paths = {f"model.denoiser.{module.path}.weight" for module in found[0].modules.values()}
    assert paths <= known


def test_another_base_takes_nothing(family: Family) -> None:
    adapter = dotted(trained(family, modules_of(family)))
    assert translate(adapter, ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]) is None
    assert translate(adapter, []) is None
