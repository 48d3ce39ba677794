"""Names with wrappers and adapters' names in them: PEFT's merge of the unwrapped model is the oracle."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from peft_models import Layers, Moe, adapt, make, merge, parameters, worst_error
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, build
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from lora_export.errors import AdapterError
from lora_export.formats import load_adapter
from lora_export.formats.reading.wrappers import strip_flat_wrappers, strip_wrappers, unwrap
from lora_export.modes.merge_checkpoint import merge_checkpoint

State = dict[str, torch.Tensor]


class Holder(nn.Module):
    """What a LightningModule, or TRL's model with a value head, is to a state dict."""

    def __init__(self, attribute: str, held: nn.Module) -> None:
        super().__init__()
        setattr(self, attribute, held)


def _checkpointed(model: nn.Module) -> State:
    layers = [m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block"))]
    assert layers
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    return model.state_dict()


def _compiled_layers(model: nn.Module) -> State:
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for index, layer in enumerate(module):
                module[index] = torch.compile(layer)
    return model.state_dict()


def _renamed(pattern: str, by: str) -> Callable[[nn.Module], State]:
    return lambda model: {re.sub(pattern, by, name): v for name, v in model.state_dict().items()}


WRAPPERS: dict[str, Callable[[nn.Module], State]] = {
    "none": lambda model: model.state_dict(),
    "torch.compile": lambda model: torch.compile(model).state_dict(),
    "DataParallel": lambda model: nn.DataParallel(model).state_dict(),
    "DataParallel of compile": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
    "compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model)).state_dict(),
    "activation checkpointing": _checkpointed,
    "layers compiled one by one": _compiled_layers,
    "FSDP": _renamed(r"\.(\d+)\.", r".\1._fsdp_wrapped_module."),
    "Fabric": _renamed(r"^", "_forward_module."),
    "Lightning": lambda model: Holder("model", model).state_dict(),
    "Lightning, compiled": lambda model: Holder("net", torch.compile(model)).state_dict(),
    "Lightning inside DDP": lambda model: nn.DataParallel(Holder("llm", model)).state_dict(),
    "value head": lambda model: Holder("pretrained_model", model).state_dict(),
    "PEFT twice": _renamed(r"^", "base_model.model."),
    "compiled inside PEFT": _renamed(r"^base_model\.model\.", "base_model.model._orig_mod."),
    "leaf": _renamed(r"\.(lora_[AB])\.", r".\1._fsdp_wrapped_module."),
}


DORA = {"use_dora": True}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj", "k_proj"], "modules_to_save": None}


def _trained(arch: str, adapter_name: str = "default", **feature: Any) -> PeftModel:
    """A PEFT model whose settings depend on anchored paths, everything trained random."""
    paths = [
        name
        for name, module in build(arch).named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(ARCHITECTURES[arch].targets))
    ]
    options = {
        "target_modules": ARCHITECTURES[arch].targets,
        "alpha_pattern": {"^" + re.escape(paths[0]): 32},
        "rank_pattern": {"^" + re.escape(paths[1]): 2},
        "modules_to_save": [ARCHITECTURES[arch].head],
    }
    config = LoraConfig(r=4, lora_alpha=8, **options | feature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(arch), config, adapter_name=adapter_name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def _write(folder: Path, model: PeftModel, state: State) -> Path:
    folder.mkdir(exist_ok=True)
    next(iter(model.peft_config.values())).save_pretrained(folder)
    trained = {n: v.clone() for n, v in state.items() if "lora_" in n or ".modules_to_save." in n}
    save_file(trained, folder / "adapter_model.safetensors")
    return folder


def _error(arch: str, model: PeftModel, folder: Path, **options: Any) -> float:
    base = parameters(build(arch))
    merged = parameters(copy.deepcopy(model).merge_and_unload())
    return worst_error(merge(base, load_adapter(folder, **options)), merged)


@pytest.mark.parametrize("arch", ["bert", "vit", "qwen2"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_names_are_read_as_pefts_own(arch: str, wrapper: str, tmp_path: Path) -> None:
    model = _trained(arch)
    folder = _write(tmp_path / "a", model, WRAPPERS[wrapper](copy.deepcopy(model)))
    names = set(load_adapter(folder).tensor_names)
    assert any("lora_A" in name for name in names), "the file's own names are what is accounted for"
    assert _error(arch, model, folder) < 2e-6


@pytest.mark.parametrize("name", ["default", "my_task", "sql-v2"])
@pytest.mark.parametrize(
    ("arch", "feature"), [("bert", {}), ("phi3", {}), ("bert", DORA), ("llama", EMBEDDING)]
)
def test_a_state_dict_names_its_adapter(
    arch: str, feature: dict[str, Any], name: str, tmp_path: Path
) -> None:
    model = _trained(arch, name, **feature)
    folder = _write(tmp_path / "a", model, model.state_dict())
    assert any(f".lora_A.{name}.weight" in tensor for tensor in load_adapter(folder).tensor_names)
    assert _error(arch, model, folder) < 2e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_a_lightning_checkpoint_with_the_whole_model(compiled: bool, tmp_path: Path) -> None:
    """All of the base's weights are in it; alpha is where its hyper-parameters say that it is LoRA's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=["query", "dense"], modules_to_save=["classifier"]
        )
        model = get_peft_model(build("bert"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    held = Holder("net", torch.compile(model) if compiled else model)
    content = {
        "epoch": 2,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": held.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {}, "param_groups": [{"alpha": 0.99}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lora_r": 4, "lora_alpha": 6, "alpha": 0.3, "lr": 1e-4, "name": "x"},
    }
    torch.save(content, tmp_path / "last.ckpt")
    adapter = load_adapter(tmp_path / "last.ckpt")
    assert adapter.format == "peft"
    assert any("weights of the base (….base_layer.weight)" in note for note in adapter.notes)
    assert worst_error(
        merge(parameters(build("bert")), adapter), parameters(model.merge_and_unload())
    ) < 2e-6  # fmt: skip


@pytest.mark.parametrize(
    "wrapper", ["torch.compile", "layers compiled one by one", "Lightning", "PEFT twice"]
)
@pytest.mark.parametrize("case", ["experts", "experts with patterns"])
def test_wrapped_parameters(case: str, wrapper: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    if "patterns" in case:
        options["rank_pattern"] = {r"^layers\.0\.experts\.down_proj": 3}
        options["alpha_pattern"] = {r"^layers\.0\.experts\.gate_up_proj": 11}
    model = adapt(make(Moe), **options)
    folder = _write(tmp_path / "a", model, WRAPPERS[wrapper](copy.deepcopy(model)))
    merged = parameters(copy.deepcopy(model).merge_and_unload())
    assert worst_error(merge(parameters(make(Moe)), load_adapter(folder)), merged) < 2e-6


def test_a_graphs_transposed_factors_name_no_adapter(tmp_path: Path) -> None:
    """onnxruntime-genai's names: read only when told, for nothing in the file says that it is transposed."""
    tensors = {f"model.layers.0.attn.q_proj.lora_{s}.MatMul.weight": torch.ones(2, 2) for s in "AB"}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="is not in a known adapter format"):
        load_adapter(tmp_path / "x.safetensors", alpha=2)


@pytest.mark.parametrize("wrapper", ["torch.compile", "Lightning"])
def test_wrapped_single_rows_of_a_named_adapter(wrapper: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [3, 1]}}
    model = adapt(make(Layers), **options)
    model.save_pretrained(tmp_path / "saved")
    state = WRAPPERS[wrapper](copy.deepcopy(model))
    kept = {name: v for name, v in state.items() if "lora_" in name or "trainable_tokens_delta" in name}
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/adapter_config.json").write_bytes((tmp_path / "saved/adapter_config.json").read_bytes())
    save_file({name: v.clone() for name, v in kept.items()}, tmp_path / "raw/adapter_model.safetensors")
    raw, saved = (load_adapter(tmp_path / name).token_rows for name in ("raw", "saved"))
    assert raw.keys() == saved.keys() == {"embed.weight"}
    for path, rows in saved.items():
        assert raw[path].indices == rows.indices
        np.testing.assert_array_equal(raw[path].values, rows.values)


@pytest.mark.parametrize("name", ["default", "default_0", "pixel"])
def test_a_pipelines_state_dict_names_its_adapter(name: str, tmp_path: Path) -> None:
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    save_file(
        {f"transformer.x.lora_A.{name}.weight": a, f"transformer.x.lora_B.{name}.weight": b},
        tmp_path / "x.safetensors",
    )
    adapter = load_adapter(tmp_path / "x.safetensors")
    (module,) = adapter.modules.values()
    assert (adapter.format, module.path, module.scaling) == ("diffusers", "x", 1.0)


def _pair(*paths: str) -> State:
    made: State = {}
    for path in paths:
        made[f"{path}.lora_A.weight"], made[f"{path}.lora_B.weight"] = torch.randn(2, 4), torch.randn(3, 2)
    return made


PREFIX = "base_model.model."
REFUSED: dict[str, tuple[State, str]] = {
    "two tensors become one": (
        _pair(f"{PREFIX}a.q", f"_orig_mod.{PREFIX}a.q"),
        r"\.a\.q\.lora_A\.weight: the same as .*\.lora_A\.weight once the names of wrappers are removed",
    ),
    "two models": (
        _pair(f"generator.{PREFIX}a.q", f"critic.{PREFIX}a.q"),
        r"several PEFT models \(critic\.base_model\.model\., generator\.base_model\.model\.\)",
    ),
    "the holder's own head": (
        {**_pair(f"model.{PREFIX}a.q"), "classifier.weight": torch.ones(2, 2)},
        r"classifier\.weight: not part of the PEFT model, whose names begin with model\.base_model\.model\.",
    ),
    "two adapters": (
        {f"{PREFIX}a.q.lora_{side}.{name}.weight": torch.randn(2, 2) for side in "AB" for name in ("x", "y")},
        r"(?s)several adapters \(x, y\); save one of them alone.*selected_adapters=\['x'\]",
    ),
    "one adapter named, one not": (
        {
            **_pair(f"{PREFIX}a.q"),
            f"{PREFIX}a.k.lora_A.x.weight": torch.randn(2, 4),
            f"{PREFIX}a.k.lora_B.x.weight": torch.randn(3, 2),
        },
        r"several adapters \(x, \(none\)\)",
    ),
    "a whole parameter twice": (
        {
            **_pair(f"{PREFIX}a.q"),
            f"{PREFIX}a.norm.weight": torch.ones(3),
            f"{PREFIX}a._orig_mod.norm.weight": torch.zeros(3),
        },
        r"norm\.weight: the same as .*norm\.weight once",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_cannot_be_told_apart(case: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[case]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, alpha=4)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("module.base_model.model.a.q", "base_model.model.a.q"),
        ("module._orig_mod.module.base_model.model.a.q", "base_model.model.a.q"),
        ("_orig_mod", "_orig_mod"),
        # May be DataParallel's or a submodule of the model's own: the base tells.
        ("base_model.model.module.q", "base_model.model.module.q"),
        ("base_model.model.enc.module.q", "base_model.model.enc.module.q"),
        ("module.enc.q", "module.enc.q"),
    ],
)
def test_module_is_a_wrapper_only_around_peft(name: str, path: str) -> None:
    assert unwrap([name]).paths == {name: path}


def _merged(base: State, folder: Path, tmp_path: Path, **options: Any) -> set[str]:
    """Names of the base's weights that a merge of the adapter changes."""
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    merge_checkpoint(tmp_path / "base", [load_adapter(folder, **options)], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    return {name for name, values in merged.items() if not torch.equal(values, base[name])}


@pytest.mark.parametrize("spelling", ["peft", "plain"])
@pytest.mark.parametrize(
    ("names", "changed"),
    [
        (["a.q", "a.k"], "a.q"),
        (["module.a.q", "a.q"], "module.a.q"),
        (["module.a.q", "head"], "module.a.q"),
    ],
)
def test_the_base_tells_whose_module_it_is(
    names: list[str], changed: str, spelling: str, tmp_path: Path
) -> None:
    base = {f"{name}.weight": torch.randn(3, 4) for name in names}
    pair = _pair(f"{PREFIX}module.a.q" if spelling == "peft" else "module.a.q")
    if spelling == "plain":
        pair = {name.replace(".lora_", "."): values for name, values in pair.items()}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    file = tmp_path / "adapter_model.safetensors"
    assert _merged(base, file, tmp_path, alpha=4) == {f"{changed}.weight"}


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_a_pattern_that_fits_only_without_module_is_refused(key: str, tmp_path: Path) -> None:
    save_file(_pair(f"{PREFIX}module.a.q"), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    for pattern, fits in ((r"^a\.q", False), (r"^module\.a\.q", True), ("a.q", True)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: {pattern: 2}}))
        if fits:
            assert load_adapter(tmp_path).modules
            continue
        with pytest.raises(AdapterError, match=f"config {key} has a key that fits only without 'module.'"):
            load_adapter(tmp_path)


def test_patterns_that_were_written_around_a_wrapper_are_met(tmp_path: Path) -> None:
    save_file(_pair(f"{PREFIX}_orig_mod.a.q"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        r'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"^_orig_mod\\.a\\.q": 12}}'
    )
    (module,) = load_adapter(tmp_path).modules.values()
    assert (module.path, module.alpha) == ("a.q", 12)


def test_one_path_alone() -> None:
    assert (
        strip_wrappers("module._orig_mod.base_model.model.a._fsdp_wrapped_module.b") == "base_model.model.a.b"
    )
    assert strip_wrappers("layers.0.module.w") == "layers.0.module.w"
    assert strip_flat_wrappers("_orig_mod_blocks_0__orig_mod_q") == "blocks_0_q"


@pytest.mark.parametrize("spelling", ["loralib", "plain", "kohya", "diffusers"])
def test_wrappers_in_every_format(spelling: str, tmp_path: Path) -> None:
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    left, right = {
        "loralib": ("_orig_mod.x.y.lora_A", "_orig_mod.x.y.lora_B"),
        "plain": ("x._orig_mod.y.A.weight", "x._orig_mod.y.B.weight"),
        "kohya": ("lora_unet__orig_mod_x_y.lora_down.weight", "lora_unet__orig_mod_x_y.lora_up.weight"),
        "diffusers": (
            "transformer._orig_mod.x.y.lora_A.weight",
            "transformer._orig_mod.x.y.lora_B.weight",
        ),
    }[spelling]
    save_file({left: a, right: b}, tmp_path / "x.safetensors")
    adapter = load_adapter(tmp_path / "x.safetensors", alpha=2)
    (module,) = adapter.modules.values()
    assert (adapter.format, module.path.replace("_", ".")) == (spelling, "x.y")
    left_factor, right_factor = module.factors(dtype=np.float64)
    np.testing.assert_allclose(left_factor @ right_factor, (b.double() @ a.double()).numpy(), rtol=1e-6)


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    "names",
    [("_orig_mod.a.q", "a.q"), ("a._orig_mod.q", r"_fsdp_wrapped_module\.a.q")],
)
def test_keys_that_become_one_are_no_guess(key: str, names: tuple[str, str], tmp_path: Path) -> None:
    """PEFT matches them with the path that the module has in the model, with wrappers or without."""
    save_file(_pair(f"{PREFIX}a.q"), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**config, key: {names[0]: 2, names[1]: 12}}))
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert any(f"config {key}" in line and "they are one" in line for line in caught.value.problems)
    file.write_text(json.dumps({**config, key: {names[0]: 2, names[1]: 2}}))
    assert len(load_adapter(tmp_path).modules) == 1


@pytest.mark.parametrize("path", ["a.q", "_orig_mod.a.q"])
def test_a_key_that_fits_with_wrappers_and_without_counts_first(path: str, tmp_path: Path) -> None:
    save_file(_pair(f"{PREFIX}{path}"), tmp_path / "adapter_model.safetensors")
    pattern = {"q": 3, "_orig_mod.q": 12, r"_orig_mod\.q": 13}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (module,) = load_adapter(tmp_path).modules.values()
    assert module.alpha == pattern[get_pattern_key(pattern, path)]
