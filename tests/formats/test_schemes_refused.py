"""What is not converted: other bases, doubtful structures, several components; and CLIP's text models."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scheme_bases as bases
import scheme_transformers as models
import torch
from safetensors.torch import load_file, save_file
from scheme_bases import (
    Family,
    converted,
    delta,
    dotted,
    kohya,
    modules_of,
    run,
    trained,
    write_base,
)
from scheme_transformers import FAMILIES

from lora_export.adapter import Adapter
from lora_export.base.history.history import MANIFEST
from lora_export.errors import AdapterError, LoraExportError
from lora_export.formats import load_adapter
from lora_export.formats.schemes import translate
from lora_export.modes.merge_checkpoint import merge_checkpoint

pytestmark = pytest.mark.xdist_group("diffusers")
# Their tiny twins differ in nothing that an adapter could tell (a 1×1 convolution is a linear).
ALIKE = [{"unet-sd15", "unet-sd2"}, {"flux", "flux-schnell"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every family."""
    top, made = tmp_path_factory.mktemp("families"), {}
    for name, make in FAMILIES.items():
        family = make()
        made[name] = write_base(top / name, converted(family, family.random()), family.model())
    return made


@pytest.mark.parametrize("trained_on", list(FAMILIES))
def test_the_whole_adapter_fits_no_other_model(
    trained_on: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = dotted(trained(FAMILIES[trained_on](), modules_of(FAMILIES[trained_on]())))
    for name, base in folders.items():
        if name == trained_on or {name, trained_on} in ALIKE:
            continue
        with pytest.raises(LoraExportError):
            merge_checkpoint(base, adapter, tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("trained_on", ["flux", "flux2", "hunyuan-video", "sd3", "wan", "z-image", "lumina2"])
def test_blocks_alone_fit_no_other_family(trained_on: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """FLUX.1's and HunyuanVideo's blocks have the same sizes in truth too; the models around them differ."""
    family = FAMILIES[trained_on]()
    pairs = trained(family, modules_of(family, "blocks.0.", "layers.0.", "blocks.0.img_attn"))
    save_file(kohya(pairs), tmp_path / "style.safetensors")
    for adapter in (dotted(pairs), load_adapter(tmp_path / "style.safetensors")):
        for name, base in folders.items():
            if name == trained_on or {name, trained_on} in ALIKE:
                continue
            with pytest.raises(LoraExportError):
                merge_checkpoint(base, adapter, tmp_path / name, dry_run=True)
            if {name, trained_on} == {"flux", "hunyuan-video"}:
                with pytest.raises(LoraExportError):
                    merge_checkpoint(base, adapter, tmp_path / name, dry_run=True, allow_unmatched=True)


@pytest.mark.parametrize(
    ("trained_on", "base"),
    [("sdxl", "sd15"), ("sd15", "sdxl"), ("sdxl", "one-layer"), ("refiner", "sdxl"), ("three-layers", "sd2")],
)
def test_a_unet_of_another_structure_is_refused_even_in_part(
    trained_on: str, base: str, tmp_path: Path
) -> None:
    """Sgm's numbers mean other layers there: leaving out what does not fit would leave a wrong rest."""
    given, other = models.unet(trained_on), models.unet(base)
    adapter = dotted(trained(given, modules_of(given, "blocks", "middle")))
    folder = write_base(tmp_path / "base", converted(other, other.random()), other.model())
    with pytest.raises(AdapterError, match="no counterpart in the base") as caught:
        merge_checkpoint(folder, adapter, tmp_path / "out", allow_unmatched=True)
    assert "SDXL" in caught.value.hint
    named = {line.split()[0] for line in caught.value.problems}
    assert named <= {module.path for module in adapter.modules.values()} | {"…"}


def test_a_module_that_only_one_base_lacks_can_be_left_out(tmp_path: Path) -> None:
    """FLUX.1 schnell has no guidance: the plan refuses those modules by name, and the rest is right."""
    dev, schnell = models.flux(), models.flux(guidance=False)
    state, pairs = schnell.random(), trained(dev, modules_of(dev))
    folder = write_base(tmp_path / "base", converted(schnell, state), schnell.model())
    save_file(kohya(pairs), tmp_path / "style.safetensors")
    with pytest.raises(LoraExportError) as caught:
        merge_checkpoint(folder, tmp_path / "style.safetensors", tmp_path / "out")
    assert sorted(line.partition(".weight")[0] for line in caught.value.problems) == [
        "guidance_in_in_layer → time_text_embed/guidance_embedder/linear_1",
        "guidance_in_out_layer → time_text_embed/guidance_embedder/linear_2",
    ]
    merge_checkpoint(folder, tmp_path / "style.safetensors", tmp_path / "out", allow_unmatched=True)
    merged = {name: values.double() for name, values in state.items()}
    for path, (a, b) in pairs.items():
        if "guidance" not in path:
            merged[f"{path}.weight"] = merged[f"{path}.weight"] + delta(a, b)
    bases.compare(tmp_path / "out", converted(schnell, merged))


def parameters(family: Family) -> set[str]:
    return set(family.model().state_dict())


@pytest.mark.parametrize(
    "gone",
    [
        r"down_blocks\.1\.resnets\.0\.",
        r"down_blocks\.1\.resnets\.1\.",
        r"up_blocks\.0\.resnets\.2\.",
        r"down_blocks\.0\.downsamplers\.",
        r"down_blocks\.0\.",
        r"up_blocks\.",
    ],
)
def test_a_structure_with_gaps_is_not_guessed(gone: str) -> None:
    """Names that an exporter lost would shift all the numbers behind them."""
    family = models.unet("sdxl")
    adapter = dotted(trained(family, modules_of(family, "blocks.")))
    known = {name for name in parameters(family) if not re.match(gone, name)}
    with pytest.raises(AdapterError, match="how many layers"):
        translate(adapter, known)


@pytest.mark.parametrize("kind", ["sdxl", "sd15", "one-layer", "three-layers"])
def test_exposed_attentions_tell_the_structure(kind: str) -> None:
    family = models.unet(kind)
    adapter = dotted(trained(family, modules_of(family, "attn")))
    whole = translate(adapter, parameters(family))
    exposed = translate(adapter, {n for n in parameters(family) if ".attn" in n}, others=tuple)
    assert whole is not None
    assert exposed is not None
    assert [m.path for m in exposed[0].modules.values()] == [m.path for m in whole[0].modules.values()]
    with pytest.raises(AdapterError, match="how many layers"):
        translate(adapter, {n for n in parameters(family) if "up_blocks" in n and "attn" in n}, others=tuple)


def test_two_unets_of_different_structure_are_ambiguous() -> None:
    family = models.unet("sdxl")
    known = {f"one.{n}" for n in parameters(family)} | {f"two.{n}" for n in parameters(models.unet("sd15"))}
    with pytest.raises(AdapterError, match="several UNets"):
        translate(dotted(trained(family, modules_of(family, "attn"))), known)


@pytest.mark.parametrize(
    ("make", "original", "own"),
    [
        (models.flux, "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_k"),
        (models.wan, "blocks.1.ffn.2", "blocks.1.ffn.net.2"),
        (lambda: models.unet("sdxl"), "middle_block.0.in_layers.2", "mid_block.resnets.0.conv1"),
    ],
)
def test_two_modules_never_become_one(make, original: str, own: str) -> None:
    """A file with both names for one module, as some converters have left them."""
    family = make()
    adapter = dotted(trained(family, [original]), "")
    first = next(iter(adapter.modules.values()))
    second = replace(first, path=own, lora_b=first.lora_b[: len(first.lora_b) // 3])
    both = replace(adapter, modules={first.key: first, second.key: second})
    with pytest.raises(AdapterError, match=f"both the base's {own}"):
        translate(both, parameters(family))
    with pytest.raises(AdapterError, match=f"both the base's {own}"):
        translate(replace(both, modules={second.key: second, first.key: first}), parameters(family))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (models.flux, "double_blocks.0.img_attn.qkv"),
        (models.flux, "single_blocks.0.linear1"),
        (models.flux, "final_layer.adaLN_modulation.1"),
        (models.sd3, "joint_blocks.0.x_block.attn.qkv"),
    ],
)
def test_sizes_that_cannot_be_cut(make, path: str) -> None:
    family = make()
    adapter = dotted(trained(family, [path, *modules_of(family, "blocks.1")]), "")
    module = adapter.modules[f"{path}.weight"]
    odd = replace(module, lora_b=module.lora_b[:31])
    with pytest.raises(AdapterError, match="can't be cut into") as caught:
        translate(replace(adapter, modules={**adapter.modules, odd.key: odd}), parameters(family))
    assert path in caught.value.problems[0]


def test_whole_parameters_are_cut_too() -> None:
    family = models.flux()
    state = family.random()
    names = ["double_blocks.0.img_attn.qkv.bias", "single_blocks.1.linear1.weight"]
    names += ["final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias", "img_in.bias"]
    extras = {name: state[name].numpy() for name in names}
    adapter = replace(dotted(trained(family, ["double_blocks.1.txt_mlp.0"]), ""), extras=extras)
    found = translate(adapter, parameters(family))
    assert found is not None
    expected = converted(family, state)
    assert len(found[0].extras) == 3 + 4 + 3
    for name, values in found[0].extras.items():
        np.testing.assert_array_equal(values, expected[name].numpy())
    assert set(found[0].extra_tensors.values()) == set(names)


# --- several components -----------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_diffusers_files_are_left_alone(component: str) -> None:
    family = models.wan()
    known = [
        n.removesuffix(".weight") for n in parameters(family) if "attn" in n and n.endswith("to_q.weight")
    ]
    adapter = dotted({path: (torch.zeros(3, 16), torch.zeros(16, 3)) for path in known}, "")
    modules = {f"{component}/{key}": replace(m, component=component) for key, m in adapter.modules.items()}
    assert translate(replace(adapter, modules=modules), parameters(family)) is None


def test_flattened_diffusers_names_are_left_alone(tmp_path: Path) -> None:
    """``lora_transformer_single_transformer_blocks_0_attn_to_q``: what other trainers write."""
    family = models.flux()
    state = converted(family, family.random())
    base = write_base(tmp_path / "base", state, family.model())
    paths = [n.removesuffix(".weight") for n in state if n.endswith(("to_q.weight", "proj_mlp.weight"))]
    pairs = {p: (torch.randn(3, 16), torch.randn(len(state[f"{p}.weight"]), 3)) for p in paths}
    save_file(kohya(pairs, "lora_transformer_"), tmp_path / "style.safetensors")
    assert translate(load_adapter(tmp_path / "style.safetensors"), set(state)) is None
    merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    bases.compare(
        tmp_path / "out",
        {
            **state,
            **{f"{p}.weight": state[f"{p}.weight"].double() + delta(*pair) for p, pair in pairs.items()},
        },
    )


def clip(folder: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a text (or vision) model as this transformers does, and return its stored tensors."""
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if "Vision" in kind:
        make = transformers.SiglipVisionConfig if "Siglip" in kind else transformers.CLIPVisionConfig
        config = make(image_size=32, patch_size=16, **sizes)
    elif "Siglip" in kind:
        config = transformers.SiglipTextConfig(vocab_size=30, **sizes)
    else:
        config = transformers.CLIPTextConfig(vocab_size=30, projection_dim=8, **sizes)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def text_pairs(
    original: str = "text_model.encoder.layers.{}.{}",
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    leaves = {
        "self_attn.q_proj": (8, 8),
        "self_attn.out_proj": (8, 8),
        "mlp.fc1": (16, 8),
        "mlp.fc2": (8, 16),
    }
    return {
        original.format(layer, leaf): (torch.randn(3, cols), torch.randn(rows, 3))
        for layer in range(2)
        for leaf, (rows, cols) in leaves.items()
    }


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_te2_", "text_encoder."])
def test_clip_text_models_of_either_transformers(kind: str, prefix: str, tmp_path: Path) -> None:
    base, stored = clip(tmp_path / "base", kind)
    pairs = text_pairs()
    tensors = kohya(pairs, prefix)
    if prefix == "text_encoder.":
        tensors = {}
        for path, (a, b) in pairs.items():
            tensors |= {
                f"{prefix}{path}.lora_A.weight": a,
                f"{prefix}{path}.lora_B.weight": b * ALPHA_OVER_RANK,
            }
    save_file(tensors, tmp_path / "style.safetensors")
    command = ["merge", "--base", base, "--adapter", tmp_path / "style.safetensors", "-o", tmp_path / "out"]
    if prefix == "lora_te2_":
        assert run(*command) == 1  # which of two encoders the base is, its folder doesn't say
        command += ["--component", "text_encoder_2"]
    assert run(*command) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for path, pair in pairs.items():
        name = (
            f"{path}.weight" if f"{path}.weight" in stored else f"{path}.weight".removeprefix("text_model.")
        )
        expected = stored[name].double() + delta(*pair)
        torch.testing.assert_close(merged.pop(name).double(), expected, rtol=1e-6, atol=1e-6)
    assert merged
    assert all(torch.equal(values, stored[name]) for name, values in merged.items())


ALPHA_OVER_RANK = bases.ALPHA / bases.RANK


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel", "SiglipTextModel"])
def test_towers_that_peft_trained_with_transformers_4(kind: str, tmp_path: Path) -> None:
    """PEFT's paths have the tower's name, which files of transformers 5 do not have."""
    base, stored = clip(tmp_path / "base", kind)
    outer = "vision_model" if "Vision" in kind else "text_model"
    pairs = text_pairs(f"{outer}.encoder.layers.{{}}.{{}}")
    tensors = {}
    for path, (a, b) in pairs.items():
        name = f"base_model.model.{path}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    (tmp_path / "style").mkdir()
    save_file(tensors, tmp_path / "style" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": bases.ALPHA,
        "target_modules": ["q_proj", "out_proj"],
    }
    (tmp_path / "style" / "adapter_config.json").write_text(json.dumps(config))
    merge_checkpoint(base, tmp_path / "style", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for path, pair in pairs.items():
        name = f"{path}.weight".removeprefix(f"{outer}.")
        torch.testing.assert_close(
            merged[name].double(), stored[name].double() + delta(*pair), rtol=1e-6, atol=1e-6
        )
    other = {"vision_model": "SiglipTextModel", "text_model": "SiglipVisionModel"}[outer]
    wrong, _ = clip(tmp_path / "other", other)
    with pytest.raises(LoraExportError):
        merge_checkpoint(wrong, tmp_path / "style", tmp_path / "none")


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_"])
def test_t5_needs_no_scheme(prefix: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 2, "vocab_size": 30}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    paths = [n.removesuffix(".weight") for n in stored if n.endswith(("SelfAttention.q.weight", "wo.weight"))]
    pairs = {p: (torch.randn(3, stored[f"{p}.weight"].shape[1]), torch.randn(8, 3)) for p in paths}
    save_file(kohya(pairs, prefix), tmp_path / "style.safetensors")
    component = f"text_encoder_{prefix[7]}"
    merge_checkpoint(tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "out", component=component)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for path, pair in pairs.items():
        expected = stored[f"{path}.weight"].double() + delta(*pair)
        torch.testing.assert_close(merged[f"{path}.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_vision_model_takes_no_text_adapter(tmp_path: Path) -> None:
    """Their layers have the same names where transformers 5 has saved them."""
    base, _ = clip(tmp_path / "base", "CLIPVisionModel")
    save_file(kohya(text_pairs(), "lora_te_"), tmp_path / "style.safetensors")
    assert (
        translate(load_adapter(tmp_path / "style.safetensors"), load_file(base / "model.safetensors")) is None
    )


def test_two_text_encoders_never_land_in_one(tmp_path: Path) -> None:
    base, _ = clip(tmp_path / "base", "CLIPTextModel")
    tensors = kohya(text_pairs(), "lora_te1_") | kohya(text_pairs(), "lora_te2_")
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(AdapterError, match="names text_encoder_2, and nothing says") as caught:
        merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    assert "--component text_encoder or --component text_encoder_2" in caught.value.hint
    adapter = load_adapter(tmp_path / "style.safetensors")
    with pytest.raises(AdapterError, match="both the base's"):
        translate(adapter, load_file(base / "model.safetensors"))


def test_one_component_of_an_sdxl_file(tmp_path: Path) -> None:
    """UNet and text encoder of one kohya file, each merged into its folder; never without being asked for."""
    family = models.unet("sdxl")
    state, pairs, text = family.random(), trained(family, modules_of(family, "attn")), text_pairs()
    unet = write_base(tmp_path / "unet", converted(family, state), family.model())
    encoder, stored = clip(tmp_path / "text_encoder", "CLIPTextModel")
    style = tmp_path / "style.safetensors"
    save_file(kohya(pairs) | kohya(text, "lora_te1_") | kohya(text_pairs(), "lora_te2_"), style)
    for folder in (unet, encoder):
        assert run("merge", "--base", folder, "--adapter", style, "-o", tmp_path / "none") == 1
    of = ["--adapter", style, "--component"]
    assert run("merge", "--base", unet, *of, "unet", "-o", tmp_path / "unet2") == 0
    assert run("merge", "--base", encoder, *of, "text_encoder", "-o", tmp_path / "text2") == 0
    merged = bases.merged_state(state, pairs)
    bases.compare(tmp_path / "unet2", converted(family, merged))
    written = load_file(tmp_path / "text2" / "model.safetensors")
    for path, pair in text.items():
        name = f"{path}.weight".removeprefix("text_model.")
        torch.testing.assert_close(
            written[name].double(), stored[name].double() + delta(*pair), rtol=1e-6, atol=1e-6
        )


def test_text_encoders_beside_names_that_stay(tmp_path: Path) -> None:
    """``context_embedder`` is called so in both namings; a text encoder beside it changes nothing."""
    family = models.sd3()
    state, pairs = family.random(), trained(family, ["context_embedder", *modules_of(family, "blocks.0")])
    base = write_base(tmp_path / "base", converted(family, state), family.model())
    save_file(kohya(pairs) | kohya(text_pairs(), "lora_te1_"), tmp_path / "style.safetensors")
    arguments = ["--base", base, "--adapter", tmp_path / "style.safetensors", "-o", tmp_path / "out"]
    assert run("merge", *arguments) == 1
    assert run("merge", *arguments, "--allow-unmatched") == 0
    merged = bases.merged_state(state, pairs)
    bases.compare(tmp_path / "out", converted(family, merged))


def test_diffusers_loads_and_fuses_it_alike(tmp_path: Path) -> None:
    """The other oracle: diffusers' own loading of a kohya SDXL file (its attention, which it maps right)."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader

    family = models.unet("sdxl")
    state, pairs = family.random(), trained(family, modules_of(family, "attn", "proj_in"))
    unet = family.model()
    base = write_base(tmp_path / "base", converted(family, state), unet)
    save_file(kohya(pairs), tmp_path / "style.safetensors")
    merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    tensors, alphas = Loader.lora_state_dict(dict(kohya(pairs)), unet_config=unet.config)[:2]
    Loader.load_lora_into_unet(tensors, alphas, unet, adapter_name="style")
    unet.fuse_lora()
    unet.unload_lora()
    bases.compare(tmp_path / "out", unet.state_dict())


def test_the_plan_says_what_was_done(tmp_path: Path) -> None:
    family = models.flux()
    base = write_base(tmp_path / "base", converted(family, family.random()), family.model())
    save_file(kohya(trained(family, modules_of(family))), tmp_path / "style.safetensors")
    merge_checkpoint(base, tmp_path / "style.safetensors", tmp_path / "out")
    assert "Black Forest Labs' FLUX.1" in (tmp_path / "out" / MANIFEST).read_text("utf-8")


def test_an_empty_adapter_has_no_scheme() -> None:
    assert translate(Adapter("a", "a", "peft", {}), ["down_blocks.0.resnets.0.conv1.weight"]) is None
