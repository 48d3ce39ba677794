"""Adapters in their trainers' names, merged into diffusers folders: the oracle is diffusers' own conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scheme_bases as bases
import torch
from safetensors.torch import load_file, save_file
from scheme_bases import UNETS, Family, State

from lora_export.adapter import Adapter, LoraModule
from lora_export.cli import main
from lora_export.errors import AdapterError, LoraExportError
from lora_export.formats import load_adapter
from lora_export.formats.schemes import translate
from lora_export.modes.merge_checkpoint import merge_checkpoint

FAMILIES: dict[str, Callable[[], Family]] = {
    "flux": bases.flux,
    "flux-schnell": lambda: bases.flux(guidance=False),
    "flux2": bases.flux2,
    "sd3": bases.sd3,
    "wan": bases.wan,
    "hunyuan-video": bases.hunyuan_video,
    **{f"unet-{kind}": (lambda kind=kind: bases.unet(kind)) for kind in UNETS},
}
RANK, ALPHA = 3, 2.0


def modules_of(family: Family, *parts: str) -> list[str]:
    """Return the paths of linear and convolution modules, in original names; all, or those with a part."""
    paths = [name.removesuffix(".weight") for name, shape in family.shapes.items() if len(shape) > 1]
    skipped = ("pos_embed", "head.modulation")
    paths = [path for path in paths if path not in skipped and not path.endswith(".modulation")]
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
        module = LoraModule(f"{prefix}{path}", kind, a.numpy(), b.numpy(), ALPHA, RANK, tensor_names=names)
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
    merged = {name: values.double() for name, values in state.items()}
    for path, (a, b) in pairs.items():
        merged[f"{path}.weight"] = merged[f"{path}.weight"] + delta(a, b)
    compare(tmp_path / "out", converted(family, merged))


def test_dotted_names_behind_diffusion_model(family: Family, tmp_path: Path) -> None:
    state, pairs = family.random(), trained(family, modules_of(family))
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    report = merge_checkpoint(base, dotted(pairs), tmp_path / "out")
    assert "converted" in report.plan.notes[0]
    merged = {name: values.double() for name, values in state.items()}
    for path, (a, b) in pairs.items():
        merged[f"{path}.weight"] = merged[f"{path}.weight"] + delta(a, b)
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


@pytest.mark.parametrize("parts", [("attn",), ("img", "x_block", "output_blocks", "cross_attn")])
def test_some_of_the_modules(family: Family, parts: tuple[str, ...], tmp_path: Path) -> None:
    """What is trained alone is translated alike: attention, one side, one half of a UNet."""
    state, pairs = family.random(), trained(family, modules_of(family, *parts))
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    save_file(kohya(pairs), tmp_path / "style.safetensors")
    merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    merged = {name: values.double() for name, values in state.items()}
    for path, (a, b) in pairs.items():
        merged[f"{path}.weight"] = merged[f"{path}.weight"] + delta(a, b)
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
