"""PEFT is the oracle: for every feature, our reading of what it saved merges to what it merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from peft_models import (
    Case,
    Convs,
    Layers,
    Moe,
    Transposed,
    TransposedMoe,
    adapt,
    make,
    merge,
    parameters,
    saved_and_merged,
    worst_error,
)
from safetensors.torch import load_file, save_file

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError, OutputError
from lora_export.formats import load_adapter, save_adapter

QK = {"target_modules": ["q_proj", "k_proj"]}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CONVS = {"target_modules": ["one", "two", "flat", "three"], "r": 4}

CASES = {
    "linear": Case(Layers, QK),
    "linear regex": Case(Layers, {"target_modules": r".*\.(up|down)"}),
    "rslora": Case(Layers, {**QK, "use_rslora": True}),
    "rank_pattern": Case(Layers, {**QK, "rank_pattern": {"q_proj": 5, "layers.1.k_proj": 3}}),
    "alpha_pattern": Case(Layers, {**QK, "alpha_pattern": {r"^layers\.0\.q_proj": 1, "k_proj": 11}}),
    "patterns that overlap": Case(
        Layers, {**QK, "alpha_pattern": {"layers.0.q_proj": 1, "q_proj": 9, "proj": 30}, "use_rslora": True}
    ),
    "rank and alpha patterns": Case(
        Layers, {**QK, "rank_pattern": {r"layers\.\d\.q_proj": 4}, "alpha_pattern": {"0.k_proj": 5}}
    ),
    "conv": Case(Convs, CONVS),
    "conv rslora": Case(Convs, {**CONVS, "use_rslora": True}),
    "embedding": Case(Layers, {"target_modules": ["embed", "q_proj"]}),
    "fan_in_fan_out": Case(Transposed, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora linear": Case(Layers, {**QK, "use_dora": True}),
    "dora rslora patterns": Case(
        Layers, {**QK, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 5}}
    ),
    "dora conv": Case(Convs, {**CONVS, "use_dora": True}),
    "dora embedding": Case(Layers, {"target_modules": ["embed"], "use_dora": True}),
    "dora fan_in_fan_out": Case(
        Transposed, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "lora_bias": Case(Layers, {**QK, "lora_bias": True}),
    "lora_bias conv": Case(Convs, {**CONVS, "lora_bias": True}),
    "bias all": Case(Layers, {**QK, "bias": "all"}),
    "bias lora_only": Case(Layers, {**QK, "bias": "lora_only"}),
    "bias all, lora_bias, modules_to_save": Case(
        Layers, {**QK, "bias": "all", "lora_bias": True, "modules_to_save": ["score"]}
    ),
    "modules_to_save": Case(Layers, {**QK, "modules_to_save": ["score", "norm"]}),
    "target_parameters": Case(Moe, EXPERTS),
    "target_parameters one": Case(Moe, {"target_parameters": ["down_proj"]}),
    "target_parameters transposed": Case(TransposedMoe, EXPERTS),
    "target_parameters patterns": Case(
        Moe, {**EXPERTS, "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"gate_up_proj": 2}}
    ),
    "target_parameters and modules": Case(Moe, {**EXPERTS, "target_modules": ["gate"]}),
    "target_parameters 2-D": Case(Layers, {"target_parameters": ["q_proj.weight"]}),
    "bdlora": Case(
        Layers,
        {
            **QK,
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["k_proj"], nblocks=2
            ),
        },
    ),
    "velora": Case(Layers, {**QK, "velora_config": VeloraConfig(num_groups=2)}),
    "monteclora": Case(Layers, {**QK, "monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)}),
    "init gaussian": Case(Layers, {**QK, "init_lora_weights": "gaussian"}),
    "init orthogonal": Case(Layers, {**QK, "init_lora_weights": "orthogonal"}),
    "init mica": Case(Layers, {**QK, "init_lora_weights": "mica"}),
    "init eva": Case(Layers, {**QK, "init_lora_weights": "eva"}),
    "layers_to_transform": Case(
        Layers, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    ),
    "dropout": Case(Layers, {**QK, "lora_dropout": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_merges_as_peft_does(name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    if name == "init mica" and dtype == torch.float64:
        pytest.skip("PEFT's MiCA doesn't initialise in float64")
    before, theirs = saved_and_merged(CASES[name], tmp_path / "adapter", dtype)
    adapter = load_adapter(tmp_path / "adapter")
    assert worst_error(merge(before, adapter), theirs) <= tolerance
    assert any(not np.array_equal(before[key], theirs[key]) for key in before)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_the_file_is_accounted_for(name: str, tmp_path: Path) -> None:
    saved_and_merged(CASES[name], tmp_path / "adapter", torch.float32)
    adapter = load_adapter(tmp_path / "adapter")
    in_file = set(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    used = [n for m in adapter.modules.values() for n in m.tensor_names]
    aside = in_file - set(adapter.tensor_names)
    replaced = [adapter.extra_tensors.get(path, path) for path in adapter.extras]
    assert sorted(adapter.tensor_names) == sorted([*used, *replaced])
    assert all(any(name in note for note in adapter.notes) for name in aside)


@pytest.mark.parametrize("name", CASES)
def test_written_again_is_the_same_to_us_and_to_peft(name: str, tmp_path: Path) -> None:
    before, theirs = saved_and_merged(CASES[name], tmp_path / "adapter", torch.float32)
    adapter = load_adapter(tmp_path / "adapter")
    save_adapter(adapter, tmp_path / "again")
    assert_same(load_adapter(tmp_path / "again"), adapter)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(make(CASES[name].model), tmp_path / "again")
    assert worst_error(parameters(loaded.merge_and_unload()), theirs) <= 2e-6
    assert worst_error(merge(before, load_adapter(tmp_path / "again")), theirs) <= 2e-6


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    for key, module in other.modules.items():
        mine = one.modules[key]
        for name in ("path", "kind", "rank", "parameter", "experts", "groups", "turned", "layout"):
            assert getattr(mine, name) == getattr(module, name), name
        assert mine.scaling == pytest.approx(module.scaling, rel=1e-15)
        for name in ("lora_a", "lora_b", "magnitude", "lora_bias"):
            a, b = getattr(mine, name), getattr(module, name)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
    assert one.extras.keys() == other.extras.keys()
    for key, values in other.extras.items():
        np.testing.assert_array_equal(one.extras[key], values)
    assert one.fan_in_fan_out == other.fan_in_fan_out


def test_grouped_convolution_tells_its_groups(tmp_path: Path) -> None:
    """PEFT refuses to merge these; the groups show in lora_B's shape."""

    class Grouped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(6, 9, 3, groups=3)

    adapt(make(Grouped), target_modules=["conv"], r=6).save_pretrained(tmp_path)
    (module,) = load_adapter(tmp_path).modules.values()
    assert (module.kind, module.groups, module.rank) == ("conv", 3, 6)
    assert module.lora_b.shape == (9, 2, 1, 1)


def test_embeddings_saved_along_are_replaced_before_the_change(tmp_path: Path) -> None:
    """A targeted, resized embedding: PEFT saves its base values, loading puts them in place."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    tuned = make(lambda: LlamaForCausalLM(config), seed=3)
    adapt(tuned, target_modules=["embed_tokens", "q_proj"]).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    adapter = load_adapter(tmp_path)
    assert "model.embed_tokens.weight" in adapter.extras
    base = make(lambda: LlamaForCausalLM(config), seed=4)
    before = parameters(base)
    theirs = parameters(PeftModel.from_pretrained(base, tmp_path).merge_and_unload())
    assert worst_error(merge(before, adapter), theirs) <= 2e-6


def test_old_spelling_of_the_dora_magnitude(tmp_path: Path) -> None:
    before, theirs = saved_and_merged(CASES["dora linear"], tmp_path, torch.float32)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k + ".weight" if k.endswith("_vector") else k: v for k, v in tensors.items()}, file)
    assert worst_error(merge(before, load_adapter(tmp_path)), theirs) <= 2e-6


def test_pissa_converted_to_lora_merges_onto_the_original_base(tmp_path: Path) -> None:
    model = adapt(make(Layers), **QK, init_lora_weights=True)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    adapter = load_adapter(tmp_path / "converted")
    assert {module.rank for module in adapter.modules.values()} == {4}


@pytest.mark.parametrize("where", ["folder", "file", "bin", "bin folder"])
def test_a_folder_or_the_file_inside_it(where: str, tmp_path: Path) -> None:
    model = adapt(make(Layers), **QK)
    model.save_pretrained(tmp_path / "a", safe_serialization="bin" not in where)
    file = tmp_path / "a" / ("adapter_model.bin" if "bin" in where else "adapter_model.safetensors")
    if "bin" in where:  # newer PEFT always writes safetensors
        torch.save(dict(_state(tmp_path / "a")), file)
        (tmp_path / "a" / "adapter_model.safetensors").unlink(missing_ok=True)
    adapter = load_adapter(file if where in ("file", "bin") else tmp_path / "a")
    assert adapter.format == "peft"
    assert adapter.name == "a"
    assert len(adapter.modules) == 4
    assert len(adapter.sha256) == 64


def _state(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.safetensors"
    return load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin")


def test_a_lone_file_needs_alpha_and_reads_the_rank_off_lora_a(tmp_path: Path) -> None:
    before, theirs = saved_and_merged(CASES["rank_pattern"], tmp_path / "a", torch.float32)
    lone = tmp_path / "lone.safetensors"
    (tmp_path / "a/adapter_model.safetensors").rename(lone)
    with pytest.raises(AdapterError, match="doesn't state alpha"):
        load_adapter(lone)
    adapter = load_adapter(lone, alpha=6)
    assert adapter.name == "lone"
    assert worst_error(merge(before, adapter), theirs) <= 2e-6
    with pytest.raises(AdapterError, match=r"rank 7 is stated, but lora_A \(5, 12\)"):
        load_adapter(lone, alpha=6, rank=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    adapt(make(Layers), **QK).to(dtype).save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert {module.lora_a.dtype.name for module in adapter.modules.values()} == {str(dtype)[6:]}
    save_adapter(adapter, tmp_path / "b")
    assert_same(load_adapter(tmp_path / "b"), adapter)
    assert load_file(tmp_path / "b/adapter_model.safetensors")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "aLoRA acts only after its invocation tokens"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "a model with replicated layers"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "Arrow routes between adapters"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, "KaSA truncates the base weights"),
    "megatron": ({"megatron_config": {"x": 1}}, "Megatron's parallel layers"),
    "tokens": ({"trainable_token_indices": [3]}, "the file has no token_adapter.trainable_tokens_delta"),
    "old enable_lora": ({"enable_lora": [True, False]}, "MergedLinear of PEFT 0.2"),
    **{
        f"init {init}": ({"init_lora_weights": init}, f"'{init}' changed the base weights.*path_initial")
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq")
    },
    "unknown key": ({"use_hyper": 3}, "config use_hyper: 3; the key is unknown"),
    "r 0": ({"r": 0}, "config r: 0, wanted a whole number above 0"),
    "alpha negative": ({"lora_alpha": -4}, "config lora_alpha: -4, wanted a number above 0"),
    "alpha missing": ({"lora_alpha": None}, "config lora_alpha: None, wanted a number"),
    "alpha text": ({"lora_alpha": "16"}, "config lora_alpha: '16', wanted a number"),
    "rank unlike the tensors": ({"r": 3}, r"rank 3 is stated, but lora_A \(2, 12\), lora_B \(10, 2\)"),
    "pattern zero": ({"rank_pattern": {"q_proj": 0}}, "config rank_pattern 'q_proj': 0, wanted"),
    "pattern list": ({"alpha_pattern": [1]}, r"config alpha_pattern: \[1\], wanted an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    adapt(make(Layers), **QK).save_pretrained(tmp_path)
    _edit_config(tmp_path, change)
    with pytest.raises(AdapterError, match=r"(?s)has \d+ problems?.*" + message):
        load_adapter(tmp_path)


def test_all_problems_at_once(tmp_path: Path) -> None:
    adapt(make(Layers), **QK).save_pretrained(tmp_path)
    _edit_config(tmp_path, {"use_qalora": True, "odd": 1, "lora_alpha": 0, "init_lora_weights": "pissa"})
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    text = "\n".join(caught.value.problems)
    assert all(word in text for word in ("QALoRA", "odd", "lora_alpha", "pissa"))


@pytest.mark.parametrize("tuner", ["LOHA", "LOKR", "OFT", "VERA", "IA3", "ADALORA", "BOFT"])
def test_other_tuners_name_the_conversion(tuner: str, tmp_path: Path) -> None:
    adapt(make(Layers), **QK).save_pretrained(tmp_path)
    _edit_config(tmp_path, {"peft_type": tuner})
    with pytest.raises(AdapterError, match=rf"(?s)is {tuner}, not LoRA.*save_as_lora\(FOLDER, model"):
        load_adapter(tmp_path)


def test_the_conversion_named_in_the_hint_exists() -> None:
    import inspect

    from peft import save_as_lora

    assert list(inspect.signature(save_as_lora).parameters)[:3] == ["path", "model", "rank"]


def test_prompt_tuning_changes_no_weights(tmp_path: Path) -> None:
    adapt(make(Layers), **QK).save_pretrained(tmp_path)
    _edit_config(tmp_path, {"peft_type": "PROMPT_TUNING"})
    with pytest.raises(AdapterError, match="changes the model's input, not its weights"):
        load_adapter(tmp_path)


def test_a_real_loha_adapter_is_refused(tmp_path: Path) -> None:
    from peft import LoHaConfig, get_peft_model

    get_peft_model(make(Layers), LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="is LOHA, not LoRA"):
        load_adapter(tmp_path)


def test_multihead_attention_is_refused_because_peft_counts_twice(tmp_path: Path) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2)

    adapt(make(Attention), target_modules=["attn"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"attn: LoRA on nn\.MultiheadAttention"):
        load_adapter(tmp_path)


def test_trainable_tokens_are_rows_of_their_embedding(tmp_path: Path) -> None:
    model = adapt(make(Layers), **QK, trainable_token_indices={"embed": [3, 1]})
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    (path,) = adapter.token_rows
    rows = adapter.token_rows[path]
    assert path == "embed.weight"
    assert rows.indices == (3, 1)
    assert rows.tensor_name in adapter.tensor_names
    assert [(first, len(values)) for first, values in rows.runs()] == [(1, 1), (3, 1)]


def test_unknown_nesting_of_parameters_is_refused(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Module()
            self.inner.first = torch.nn.Parameter(torch.zeros(2, 4, 4))
            self.inner.second = torch.nn.Parameter(torch.zeros(2, 4, 4))

    adapt(make(Odd), target_parameters=["inner.first", "inner.second"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="the order in which the module registered"):
        load_adapter(tmp_path)


def test_nested_pairs_without_target_parameters_are_refused(tmp_path: Path) -> None:
    saved_and_merged(CASES["target_parameters"], tmp_path, torch.float32)
    _edit_config(tmp_path, {"target_parameters": None})
    with pytest.raises(AdapterError, match="2 nested LoRA pairs, but target_parameters lists 0"):
        load_adapter(tmp_path)


def _edit_config(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_we_know_every_key_of_this_peft() -> None:
    """A key that PEFT adds must be thought about: here, not at a user's desk."""
    from lora_export.formats.reading import lora_config

    keys = set(LoraConfig().to_dict())
    assert keys <= lora_config._HARMLESS | lora_config._READ | lora_config._REFUSED.keys()


def test_what_pefts_config_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    from dataclasses import replace

    saved_and_merged(CASES["dora linear"], tmp_path / "a", torch.float32)
    adapter = load_adapter(tmp_path / "a")
    first, *rest = adapter.modules.values()
    mixed = {first.key: replace(first, magnitude=None, component="unet")}
    mixed |= {m.key: replace(m, component="text_encoder") for m in rest}
    with pytest.raises(AdapterError) as caught:
        save_adapter(replace(adapter, modules=mixed, flattened=True), tmp_path / "b")
    text = "\n".join(caught.value.problems)
    assert all(word in text for word in ("components text_encoder, unet", "DoRA magnitude", "have no dots"))
    assert not (tmp_path / "b").exists()


def test_mixed_rslora_is_written_as_the_same_scaling(tmp_path: Path) -> None:
    from dataclasses import replace

    saved_and_merged(CASES["linear"], tmp_path / "a", torch.float32)
    adapter = load_adapter(tmp_path / "a")
    first, *rest = adapter.modules.values()
    mixed = {m.key: m for m in (replace(first, rslora=True), *rest)}
    save_adapter(replace(adapter, modules=mixed), tmp_path / "b")
    again = load_adapter(tmp_path / "b")
    assert {k: m.scaling for k, m in again.modules.items()} == pytest.approx(
        {k: m.scaling for k, m in mixed.items()}
    )


def test_existing_files_stay_without_force(tmp_path: Path) -> None:
    saved_and_merged(CASES["linear"], tmp_path, torch.float32)
    adapter = load_adapter(tmp_path)
    save_adapter(adapter, tmp_path / "again")
    with pytest.raises(OutputError) as caught:
        save_adapter(adapter, tmp_path / "again")
    assert len(caught.value.problems) == 2
    save_adapter(adapter, tmp_path / "again", force=True)
    assert_same(load_adapter(tmp_path / "again"), adapter)


def test_tied_embeddings_say_that_their_change_counts_once(tmp_path: Path) -> None:
    """PEFT's own merge_and_unload adds the change twice here (0.21); its unmerged model once at each end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    tied = make(lambda: LlamaForCausalLM(config))
    tied.tie_weights()
    adapt(tied, target_modules=["embed_tokens"], ensure_weight_tying=True).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert any("counts once" in note for note in adapter.notes)
    embed, head = (adapter.modules[f"{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    (a, b), (c, d) = embed.factors(), head.factors()
    np.testing.assert_allclose(a @ b, c @ d, rtol=1e-5)


def test_a_missing_module_to_save_is_noted(tmp_path: Path) -> None:
    adapt(make(Layers), **QK).save_pretrained(tmp_path)
    _edit_config(tmp_path, {"modules_to_save": ["classifier"]})
    assert any("but the file has none" in note for note in load_adapter(tmp_path).notes)


def test_alpha_patterns_that_overlap_are_noted(tmp_path: Path) -> None:
    saved_and_merged(CASES["patterns that overlap"], tmp_path, torch.float32)
    notes = load_adapter(tmp_path).notes
    assert any(note.startswith("layers.0.q_proj: several alpha_pattern keys match") for note in notes)


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from lora_export.formats.reading import peft_folder

    saved_and_merged(CASES["linear"], tmp_path, torch.float32)
    adapter = load_adapter(tmp_path)
    save_adapter(adapter, tmp_path / "again")
    before = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft_folder, "write_safetensors", full)
    with pytest.raises(OutputError, match=r"(?s)No space left on device \(nothing was replaced\).*free some"):
        save_adapter(adapter, tmp_path / "again", force=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == before
