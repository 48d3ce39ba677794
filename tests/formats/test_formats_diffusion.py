"""Files of diffusion tools: what diffusers itself makes of them is the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats import load_adapter

State = dict[str, torch.Tensor]


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1, cross_attn_norm=True,
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unet": (_unet, "unet"),
    "flux": (_flux, "transformer"),
    "wan": (_wan, "transformer"),
}


def _make(model: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model][0]().eval()


def _attention(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".to_" in f".{n}"]


def _factors(model: nn.Module, ranks: tuple[int, ...]) -> State:
    torch.manual_seed(1)
    tensors: State = {}
    for i, path in enumerate(_attention(model)):
        out_dim, in_dim = model.get_submodule(path).weight.shape
        rank = ranks[i % len(ranks)]
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, in_dim)
        tensors[f"{path}.lora_B.weight"] = torch.randn(out_dim, rank)
    return tensors


def _fused(model: str, tensors: State, **options: Any) -> dict[str, np.ndarray]:
    """What the weights change by when diffusers loads the tensors and fuses them."""
    loaded = _make(model)
    before = {name: values.clone() for name, values in loaded.state_dict().items()}
    loaded.load_lora_adapter(dict(tensors), **options)  # type: ignore[operator]
    loaded.fuse_lora()  # type: ignore[operator]
    after = {name.replace(".base_layer", ""): values for name, values in loaded.state_dict().items()}
    return {
        name.removesuffix(".weight"): (after[name].double() - values.double()).numpy()
        for name, values in before.items()
        if not torch.equal(after[name], values)
    }


def _changes(adapter: Adapter) -> dict[str, np.ndarray]:
    made = {}
    for module in adapter.modules.values():
        left, right = module.factors(dtype=np.float64)
        made[module.path] = left @ right
    return made


def _assert_same(adapter: Adapter, theirs: dict[str, np.ndarray]) -> None:
    ours = _changes(adapter)
    assert ours.keys() == theirs.keys()
    for path, change in theirs.items():
        assert np.linalg.norm(ours[path] - change) < 1e-5 * np.linalg.norm(change), path


@pytest.mark.parametrize("ranks", [(2,), (2, 4), (4, 2, 2), (1, 3, 5)])
@pytest.mark.parametrize("model", MODELS)
def test_without_alpha_every_module_has_scaling_one(
    model: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    component = MODELS[model][1]
    tensors = {f"{component}.{name}": v for name, v in _factors(_make(model), ranks).items()}
    save_file(tensors, tmp_path / "l.safetensors")
    adapter = load_adapter(tmp_path / "l.safetensors")
    assert {module.component for module in adapter.modules.values()} == {component}
    assert any("scaling 1" in note for note in adapter.notes)
    _assert_same(adapter, _fused(model, tensors, prefix=component))


@pytest.mark.parametrize("model", MODELS)
def test_names_without_any_component_are_known_by_the_model(model: str, tmp_path: Path) -> None:
    """A model's own save_lora_adapter wrote these names, for some time without a word on alpha."""
    tensors = _factors(_make(model), (2, 3))
    save_file(tensors, tmp_path / "l.safetensors")
    adapter = load_adapter(tmp_path / "l.safetensors")
    assert adapter.format == "diffusers"
    _assert_same(adapter, _fused(model, tensors, prefix=None))


@pytest.mark.parametrize("alphas", [(3.0,), (3.0, 1.0), (0.5, 2.0, 8.0)])
@pytest.mark.parametrize("model", MODELS)
def test_alpha_tensors(model: str, alphas: tuple[float, ...], tmp_path: Path) -> None:
    component = MODELS[model][1]
    base = _make(model)
    tensors = {f"{component}.{name}": v for name, v in _factors(base, (2, 4)).items()}
    stated = {f"{component}.{path}.alpha": alphas[i % len(alphas)] for i, path in enumerate(_attention(base))}
    save_file({**tensors, **{n: torch.tensor(v) for n, v in stated.items()}}, tmp_path / "l.safetensors")
    theirs = _fused(model, tensors, prefix=component, network_alphas=stated)
    _assert_same(load_adapter(tmp_path / "l.safetensors"), theirs)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("model", MODELS)
def test_comfyui_calls_every_denoiser_diffusion_model(
    model: str, alpha: float | None, spelling: tuple[str, str], prefix: str, tmp_path: Path
) -> None:
    """Oracle: diffusers with its own component in front, told the same alphas."""
    component, base = MODELS[model][1], _make(model)
    tensors = _factors(base, (2, 4))
    stated = {path: alpha for path in _attention(base) if alpha is not None}
    renamed = {
        prefix + name.replace("lora_A", spelling[0]).replace("lora_B", spelling[1]): values
        for name, values in tensors.items()
    }
    renamed |= {f"{prefix}{path}.alpha": torch.tensor(value) for path, value in stated.items()}
    save_file(renamed, tmp_path / "l.safetensors")
    adapter = load_adapter(tmp_path / "l.safetensors")
    assert {module.component for module in adapter.modules.values()} == {component}
    assert not adapter.flattened
    theirs = _fused(
        model,
        {f"{component}.{name}": v for name, v in tensors.items()},
        prefix=component,
        network_alphas={f"{component}.{path}.alpha": v for path, v in stated.items()} or None,
    )
    _assert_same(adapter, theirs)


def test_diffusion_pipe_writes_a_peft_config_beside_comfyuis_names(tmp_path: Path) -> None:
    base = _make("wan")
    tensors = _factors(base, (4,))
    save_file({f"diffusion_model.{n}": v for n, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    first = _attention(base)[0]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "alpha_pattern": {f"^{first}": 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = load_adapter(tmp_path)
    assert {module.component for module in adapter.modules.values()} == {"transformer"}
    wanted = {path: 12 if path == first else 2 for path in _attention(base)}
    assert {module.path: module.alpha for module in adapter.modules.values()} == wanted


# --- alpha in the header's metadata ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_alpha": "8"},
        {"alpha": "8.0", "rank": "4"},
        {"network_alpha": "8", "network_dim": "4"},
        {"ss_network_alpha": "8", "ss_network_dim": "4"},
        {"transformer.lora_alpha": "8", "transformer.r": "4"},
        {"transformer.lora_alpha": "8", "text_encoder.lora_alpha": "99"},
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_alpha_of_the_metadata(metadata: dict[str, str], prefix: str, tmp_path: Path) -> None:
    """Oracle: diffusers, told the alpha as network_alphas."""
    base = _make("flux")
    tensors = _factors(base, (4, 2))
    save_file({prefix + n: v for n, v in tensors.items()}, tmp_path / "l.safetensors", metadata)
    adapter = load_adapter(tmp_path / "l.safetensors")
    assert any("from the file's metadata" in note for note in adapter.notes)
    theirs = _fused(
        "flux",
        {f"transformer.{n}": v for n, v in tensors.items()},
        prefix="transformer",
        network_alphas={f"transformer.{path}.alpha": 8.0 for path in _attention(base)},
    )
    _assert_same(adapter, theirs)


def _flux_file(tmp_path: Path, metadata: dict[str, str], **more: torch.Tensor) -> Path:
    tensors = {f"transformer.{n}": v for n, v in _factors(_make("flux"), (4,)).items()}
    save_file(tensors | more, tmp_path / "l.safetensors", metadata)
    return tmp_path / "l.safetensors"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"alpha": "8", "lora_alpha": "4"}, r"contradict themselves \(lora_alpha 4, alpha 8\); give --alpha"),
        ({"alpha": "8", "rank": "16"}, r"goes with rank 16, but the tensors have rank 4 \(resized"),
    ],
)
def test_metadata_that_are_of_no_use(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    file = _flux_file(tmp_path, metadata)
    with pytest.raises(AdapterError, match=message):
        load_adapter(file)
    adapter = load_adapter(file, alpha=2)
    assert {module.scaling for module in adapter.modules.values()} == {0.5}
    assert any("as given; the file's metadata say" in note for note in adapter.notes)


@pytest.mark.parametrize("text", ["Dynamic", "None", "", "-1", "nan"])
def test_metadata_that_are_no_number_say_nothing(text: str, tmp_path: Path) -> None:
    adapter = load_adapter(_flux_file(tmp_path, {"ss_network_alpha": text, "alpha": text}))
    assert {module.scaling for module in adapter.modules.values()} == {1.0}


def test_alpha_tensors_count_more_than_metadata(tmp_path: Path) -> None:
    alphas = {f"transformer.{path}.alpha": torch.tensor(2.0) for path in _attention(_make("flux"))}
    adapter = load_adapter(_flux_file(tmp_path, {"alpha": "64"}, **alphas))
    assert {module.scaling for module in adapter.modules.values()} == {0.5}


def test_an_option_against_alpha_tensors(tmp_path: Path) -> None:
    alphas = {f"transformer.{path}.alpha": torch.tensor(2.0) for path in _attention(_make("flux"))}
    file = _flux_file(tmp_path, {}, **alphas)
    with pytest.raises(AdapterError, match=r"\.alpha tensors say 2, the option 8; omit the option"):
        load_adapter(file, alpha=8)
    assert {module.scaling for module in load_adapter(file, alpha=2).modules.values()} == {0.5}
    save_file(kohya_pair(**{"lora_unet_x.alpha": torch.tensor(2.0)}), tmp_path / "k.safetensors")
    with pytest.raises(AdapterError, match=r"\.alpha tensors say 2, the option 4; omit the option"):
        load_adapter(tmp_path / "k.safetensors", alpha=4)


def test_alpha_tensors_against_diffusers_own_metadata(tmp_path: Path) -> None:
    """Diffusers refuses the two together."""
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    alphas = {f"transformer.{path}.alpha": torch.tensor(2.0) for path in _attention(_make("flux"))}
    with pytest.raises(AdapterError, match=r"\.alpha is 2, but the metadata lora_adapter_metadata say 8"):
        load_adapter(_flux_file(tmp_path, metadata, **alphas))


def test_alpha_for_some_modules_only_is_refused(tmp_path: Path) -> None:
    """Diffusers gives the others the most frequent alpha, ComfyUI scaling 1."""
    first, *_ = _attention(_make("flux"))
    file = _flux_file(tmp_path, {}, **{f"transformer.{first}.alpha": torch.tensor(2.0)})
    with pytest.raises(AdapterError, match=r"has no \.alpha, but other modules have one.*give --alpha"):
        load_adapter(file)
    scalings = {m.path: m.scaling for m in load_adapter(file, alpha=16).modules.values()}
    assert scalings.pop(first) == 0.5
    assert set(scalings.values()) == {4.0}


def test_rslora_without_alpha_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="rsLoRA is stated, but not alpha; give --alpha"):
        load_adapter(_flux_file(tmp_path, {}), rslora=True)
    file = _flux_file(tmp_path, {"use_rslora": "true"})
    with pytest.raises(AdapterError, match="rsLoRA is stated, but not alpha; give --alpha"):
        load_adapter(file)
    assert {module.scaling for module in load_adapter(file, alpha=6).modules.values()} == {3.0}


# --- what is not a diffusion tool's ------------------------------------------------------------------------

LANGUAGE = [
    "transformer.h.0.attn.c_attn",
    "transformer.h.1.self_attention.query_key_value",
    "transformer.layer.0.attention.q_lin",
    "transformer.encoder.layers.0.self_attention.dense",
    "transformer.blocks.0.attn.Wqkv",
    "transformer.blocks.0.ffn.up_proj",
    "transformer.blocks.0.norm_attn_norm.attn.Wqkv",
    "transformer.layers.0.attn.qkv_proj",
    "transformer.layers.3.ffn.proj_1",
    "transformer.attentions.0.q_lin",
    "transformer.resblocks.0.mlp.c_fc",
    "model.layers.0.self_attn.q_proj",
    "model.decoder.layers.0.fc1",
    "blocks.0.attn.qkv",
    "blocks.0.mlp.fc1",
    "vision_model.encoder.layers.0.self_attn.k_proj",
]


@pytest.mark.parametrize("path", LANGUAGE)
def test_other_models_names_never_get_a_scaling_of_one(path: str, tmp_path: Path) -> None:
    tensors = {f"{path}.lora_A.weight": torch.randn(2, 4), f"{path}.lora_B.weight": torch.randn(6, 2)}
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(AdapterError, match=r"doesn't state alpha") as caught:
        load_adapter(tmp_path / "l.safetensors")
    assert "--alpha" in str(caught.value.hint)
    (module,) = load_adapter(tmp_path / "l.safetensors", alpha=6).modules.values()
    assert (module.path, module.scaling) == (path, 3.0)
    (module,) = load_adapter(tmp_path / "l.safetensors", format="diffusers").modules.values()
    assert module.scaling == 1.0


@pytest.mark.parametrize("path", ["model.layers.3.mlp.up_proj", "transformer.h.0.attn.c_attn"])
def test_bare_names_with_alpha_tensors(path: str, tmp_path: Path) -> None:
    tensors = {f"{path}.lora_A.weight": torch.randn(2, 4), f"{path}.lora_B.weight": torch.randn(6, 2)}
    save_file({**tensors, f"{path}.alpha": torch.tensor(6.0)}, tmp_path / "l.safetensors")
    (module,) = load_adapter(tmp_path / "l.safetensors").modules.values()
    assert (module.path, module.scaling) == (path, 3.0)


@pytest.mark.parametrize(
    "names", [("h.0.attn.c_attn", "ln_f.proj"), ("layers.0.attn.qkv_proj", "token.proj")]
)
@pytest.mark.parametrize("suffixes", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_a_language_models_transformer_is_no_component(
    names: tuple[str, str], suffixes: tuple[str, str], tmp_path: Path
) -> None:
    """One name tells it for the whole file: no module of it loses the part in front."""
    tensors = {f"transformer.{name}.{s}.weight": torch.ones(2, 2) for name in names for s in suffixes}
    save_file(tensors, tmp_path / "l.safetensors")
    modules = load_adapter(tmp_path / "l.safetensors", alpha=2).modules.values()
    assert {(module.component, module.path) for module in modules} == {
        (None, f"transformer.{name}") for name in names
    }


# --- kohya -------------------------------------------------------------------------------------------------

kohya_pair = partial(
    dict, {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)}
)


def test_kohya_metadata_against_missing_alpha_tensors(tmp_path: Path) -> None:
    """Every program loads such a file with scaling 1; what was trained is alpha / rank."""
    save_file(kohya_pair(), tmp_path / "l.safetensors", {"ss_network_alpha": "1", "ss_network_dim": "4"})
    with pytest.raises(AdapterError, match=r"give --alpha 1 \(as trained\) or --alpha 4 \(scaling 1\)"):
        load_adapter(tmp_path / "l.safetensors")
    for alpha, scaling in ((1, 0.25), (4, 1.0)):
        (module,) = load_adapter(tmp_path / "l.safetensors", alpha=alpha).modules.values()
        assert module.scaling == scaling


@pytest.mark.parametrize("stated", ["4", "Dynamic"])
def test_kohya_metadata_that_agree_or_say_nothing(stated: str, tmp_path: Path) -> None:
    save_file(kohya_pair(), tmp_path / "l.safetensors", {"ss_network_alpha": stated})
    (module,) = load_adapter(tmp_path / "l.safetensors").modules.values()
    assert module.scaling == 1.0


def test_kohya_alpha_tensors_count_more_than_metadata(tmp_path: Path) -> None:
    tensors = kohya_pair(**{"lora_unet_x.alpha": torch.tensor(2.0)})
    save_file(tensors, tmp_path / "l.safetensors", {"ss_network_alpha": "16", "ss_network_dim": "32"})
    (module,) = load_adapter(tmp_path / "l.safetensors").modules.values()
    assert module.scaling == 0.5


def test_both_spellings_of_a_pair_are_refused(tmp_path: Path) -> None:
    tensors = {f"diffusion_model.x.{s}.weight": torch.ones(2, 2) for s in ("lora_A", "lora_B", "lora_down")}
    tensors["diffusion_model.x.lora_up.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(AdapterError, match="looks like several formats: diffusers, kohya"):
        load_adapter(tmp_path / "l.safetensors")
    for format in ("diffusers", "kohya"):
        with pytest.raises(AdapterError, match="2 problems"):
            load_adapter(tmp_path / "l.safetensors", format=format)


# --- bad input in every spelling ---------------------------------------------------------------------------

SPELLINGS = {
    "ComfyUI": ("diffusion_model.blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_B.weight"),
    "ComfyUI, down": ("diffusion_model.x.lora_down.weight", "diffusion_model.x.lora_up.weight"),
    "bare": ("blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_B.weight"),
    "bare, not diffusion": ("layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight"),
    "named": ("layers.0.q.lora_A.task.weight", "layers.0.q.lora_B.task.weight"),
    "component": ("transformer.x.lora_A.weight", "transformer.x.lora_B.weight"),
}
A, B = torch.ones(2, 4), torch.ones(3, 2)
BAD: dict[str, tuple[torch.Tensor | None, torch.Tensor | None, str]] = {
    "half": (A, None, "lora_B is missing"),
    "other half": (None, B, "lora_A is missing"),
    "NaN": (torch.full((2, 4), torch.nan), B, "8 of 8 values are NaN or infinite"),
    "ranks": (torch.ones(3, 4), B, "have no common rank"),
    "a vector": (torch.ones(2), B, "wanted two matrices"),
    "integers": (A.int(), B, "dtype int32, wanted a float"),
    "empty": (torch.ones(0, 4), torch.ones(3, 0), "holds no values"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_bad_pairs(spelling: str, case: str, tmp_path: Path) -> None:
    first, second, message = BAD[case]
    named = zip(SPELLINGS[spelling], (first, second), strict=True)
    save_file({name: values for name, values in named if values is not None}, tmp_path / "l.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "l.safetensors", alpha=4)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_tensor_of_another_kind_is_named(spelling: str, tmp_path: Path) -> None:
    pair = dict(zip(SPELLINGS[spelling], (A.clone(), B.clone()), strict=True))
    name = SPELLINGS[spelling][0].rpartition(".lora")[0] + ".lora_mid.weight"
    save_file({**pair, name: torch.ones(2, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(AdapterError, match=r"\.lora_mid\.weight: "):
        load_adapter(tmp_path / "l.safetensors", alpha=4)
