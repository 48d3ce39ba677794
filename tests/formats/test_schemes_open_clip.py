"""Text models in OpenCLIP's names, merged into transformers' CLIP; diffusers' conversion is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from scheme_bases import Family, State, dotted, kohya, merged_state, trained

from lora_export import LoraExportError
from lora_export.modes.merge_checkpoint import merge_checkpoint

WIDTH = 16
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the original model's names and shapes (open_clip ``transformer.py``)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(2):
        block = f"transformer.resblocks.{number}"
        shapes |= {f"{block}.attn.in_proj.weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"{block}.attn.out_proj.weight": (WIDTH, WIDTH)}
        shapes |= {
            f"{block}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"{block}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        }
    return shapes


OPEN_CLIP = Family("open-clip", _shapes(), dict, torch.nn.Module)


def text_model(folder: Path, kind: str) -> Path:
    config = transformers.CLIPTextConfig(**SIZES, vocab_size=30, projection_dim=WIDTH)
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def originals(pairs: dict[str, Any]) -> State:
    """Return ΔW in the original names, where in_proj is a parameter of attn."""
    zeros = {name: torch.zeros(shape) for name, shape in OPEN_CLIP.shapes.items()}
    changed = merged_state(zeros, pairs)
    return {name.replace("in_proj.weight", "in_proj_weight"): values for name, values in changed.items()}


@pytest.mark.parametrize("form", ["kohya", "dotted"])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_merged_as_diffusers_converts_it(kind: str, form: str, tmp_path: Path) -> None:
    base = text_model(tmp_path / "base", kind)
    torch.manual_seed(1)
    pairs = trained(OPEN_CLIP, [name.removesuffix(".weight") for name in OPEN_CLIP.shapes])
    adapter: Any = dotted(pairs, "")
    if form == "kohya":
        adapter = tmp_path / "style.safetensors"
        save_file(kohya(pairs, "lora_te_"), adapter)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert "OpenCLIP" in report.plan.notes[0]
    model = getattr(transformers, kind).from_pretrained(base)
    change = convert_open_clip_checkpoint(model, originals(pairs), prefix="")
    stored, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert stored.keys() == merged.keys()
    seen = 0
    for name, values in merged.items():
        key = next(
            (key for key in change if key.removeprefix("text_model.") == name.removeprefix("text_model.")), ""
        )
        seen += bool(key)
        expected = stored[name].double() + (change[key].double() if key else 0)
        torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=2e-6, msg=name)
    assert seen >= 2 * 6


def test_a_model_of_two_towers_is_not_guessed(tmp_path: Path) -> None:
    """Text and vision tower have blocks of the same names: which one is meant, OpenCLIP's names don't say."""
    tower = SIZES | {"projection_dim": WIDTH}
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 30}, vision_config=tower | {"image_size": 8, "patch_size": 4}
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "base")
    pairs = trained(OPEN_CLIP, ["transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.1.mlp.c_fc"])
    with pytest.raises(LoraExportError) as refused:
        merge_checkpoint(tmp_path / "base", dotted(pairs, ""), tmp_path / "out")
    assert "resblocks" in str(refused.value.problems)
    assert not (tmp_path / "out").exists()
