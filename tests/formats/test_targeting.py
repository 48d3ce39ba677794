"""A config that says other things than its file: what PEFT leaves out is said, what stops it is refused."""

import json
import re
import shutil

import peft
import pytest
import tiny
import torch
import transformers
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn

from lora_export import (
    AdapterError,
    CheckpointError,
    bank_onnx,
    load_adapter,
    merge_checkpoint,
    merge_onnx,
    save_adapter,
    swap_onnx,
)
from lora_export.formats.reading.targeting import is_targeted

TIED = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
TIED |= {"num_attention_heads": 2, "tie_word_embeddings": True}

PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.2.attn.c_attn",
    "unet.down_blocks.0.attentions.1.to_q",
    "q_proj",
    "lm_head",
)
CONFIGS = [
    {"target_modules": ["q_proj", "attn.c_attn"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "proj"]},
    {"target_modules": r".*\.(q_proj|to_q)"},
    {"target_modules": r"q_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [2], "layers_pattern": "h"},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0], "layers_pattern": ["layers", "h"]},
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_targets_are_those_of_peft(config, path):
    wanted = bool(check_target_module_exists(peft.LoraConfig(**config), path))
    # As the config lies in a file: PEFT makes sets of lists, and lists of sets.
    stored = json.loads(json.dumps(config))
    assert is_targeted(stored, path) is wanted


def edited(arch, folder, **changes):
    """Return a copy of a PEFT folder whose config somebody has edited."""
    source = tiny.adapter(arch)
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


NARROWER = [
    ("llama", {"target_modules": ["q_proj"]}),
    ("llama", {"exclude_modules": ["v_proj", "o_proj"]}),
    ("llama", {"layers_to_transform": [0]}),
    ("gpt2", {"target_modules": ["c_proj"]}),
]


@pytest.mark.parametrize(("arch", "changes"), NARROWER, ids=str)
def test_what_peft_would_not_load_is_said_by_every_verb(arch, changes, tmp_path):
    given = edited(arch, tmp_path / "ad", **changes)
    with tiny.quiet():
        model = peft.PeftModel.from_pretrained(tiny.build(arch), given)
    loaded = sum("lora_A" in name for name, _ in model.named_parameters())
    held = sum("lora_A" in name for name in load_file(given / "adapter_model.safetensors"))
    assert 0 < loaded < held
    wanted = f"leave out {held - loaded} of the file's {held} modules"
    checkpoint, graph = tiny.checkpoint(arch), tiny.base_onnx(arch, "dynamo_noopt")
    plans = [
        merge_checkpoint(checkpoint, given, tmp_path / "merged", dry_run=True).plan,
        merge_onnx(graph, given, tmp_path / "m" / "o.onnx", dry_run=True).plan,
        swap_onnx(graph, tmp_path / "s" / "o.onnx", adapter=given, dry_run=True).plan,
        bank_onnx(graph, {"a": given}, tmp_path / "b" / "o.onnx", dry_run=True).plan,
    ]
    for plan in plans:
        assert sum(wanted in note for note in plan.notes) == 1
        assert len(plan.placed) >= held


def test_a_config_that_fits_is_not_spoken_of(tmp_path):
    for arch in ("llama", "gpt2", "qwen2_moe"):
        assert not any("leave out" in note for note in load_adapter(tiny.adapter(arch)).notes)


@pytest.mark.parametrize(("key", "value"), [("alpha_pattern", 32), ("rank_pattern", 2)])
@pytest.mark.parametrize("pattern", ["*q_proj", "q_proj(", "layers.[0"])
def test_a_pattern_that_stops_peft_is_refused(key, value, pattern, tmp_path):
    given = edited("llama", tmp_path / "ad", **{key: {pattern: value}})
    with tiny.quiet(), pytest.raises(re.error):
        peft.PeftModel.from_pretrained(tiny.build("llama"), given)
    with pytest.raises(AdapterError) as caught:
        load_adapter(given)
    assert any(f"{key} {pattern!r}: not a regular expression" in problem for problem in caught.value.problems)


def test_keys_of_a_pattern_that_contradict_each_other_are_said(tmp_path):
    given = edited("llama", tmp_path / "ad", alpha_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 64})
    report = merge_checkpoint(tiny.checkpoint("llama"), given, tmp_path / "merged")
    assert any("several alpha_pattern keys match" in note for note in report.plan.notes)


def test_other_tuners_are_refused_by_name_where_their_tensors_look_like_loralibs(tmp_path):
    model = tiny.build("llama")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=6, target_r=4, total_step=10)
    with tiny.quiet():
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "ad")
    names = load_file(tmp_path / "ad" / "adapter_model.safetensors")
    assert any(name.endswith(".lora_A") for name in names)
    with pytest.raises(AdapterError, match="is ADALORA, not LoRA"):
        load_adapter(tmp_path / "ad")


@pytest.mark.parametrize("arch", ["llama", "bert", "gpt2"])
def test_layers_that_a_file_lacks_are_said_as_peft_says_them(arch, tmp_path):
    given = edited(arch, tmp_path / "ad")
    file = given / "adapter_model.safetensors"
    tensors = {name: values for name, values in load_file(file).items() if ".1." not in name}
    save_file(tensors, file, {"format": "pt"})
    with tiny.quiet(), pytest.warns(UserWarning, match="missing adapter keys") as caught:
        peft.PeftModel.from_pretrained(tiny.build(arch), given)
    (said,) = [str(one.message) for one in caught if "missing adapter keys" in str(one.message)]
    missing = set(re.findall(r"[\w.]+lora_A", said))
    report = merge_checkpoint(tiny.checkpoint(arch), given, tmp_path / "merged")
    graph = merge_onnx(tiny.base_onnx(arch, "dynamo_noopt"), given, tmp_path / "m" / "o.onnx", dry_run=True)
    for plan in (report.plan, graph.plan):
        assert any(f"targets {len(missing)} more modules of this base" in note for note in plan.notes)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_an_adapter_without_effect_is_said(arch, tmp_path):
    with tiny.quiet():
        model = peft.get_peft_model(tiny.build(arch), peft.LoraConfig(r=2, target_modules="all-linear"))
        model.save_pretrained(tmp_path / "ad")
    report = merge_checkpoint(tiny.checkpoint(arch), tmp_path / "ad", tmp_path / "merged")
    assert any("it changes nothing" in note for note in report.plan.notes)
    assert not any("changes nothing" in note for note in load_adapter(tiny.adapter(arch)).notes)


@pytest.mark.parametrize(
    ("key", "value"), [("modules_to_save", -1), ("target_modules", 3), ("exclude_modules", {"a": 1})]
)
def test_a_key_of_another_type_is_refused(key, value, tmp_path):
    with pytest.raises(AdapterError) as caught:
        load_adapter(edited("llama", tmp_path / "ad", **{key: value}))
    assert any(f"config {key}: {value!r}, wanted" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("key", "value"),
    [("architectures", True), ("architectures", [1]), ("quantization_config", {"quant_method": ["x"]})],
)
def test_a_base_config_of_other_types_is_refused(key, value, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny.checkpoint("llama"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError):
        merge_checkpoint(base, tiny.adapter("llama"), tmp_path / "merged")


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), norm


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_saved_batch_norm_is_written_so_that_peft_loads_it(norm, tmp_path):
    with tiny.quiet():
        config = peft.LoraConfig(r=2, target_modules=["fc"], modules_to_save=["bn"])
        peft.get_peft_model(Normed(norm(8)), config).save_pretrained(tmp_path / "ad")
        save_adapter(load_adapter(tmp_path / "ad"), tmp_path / "again")
        loaded = peft.PeftModel.from_pretrained(Normed(norm(8)), tmp_path / "again")
    assert "bn" in str(loaded.peft_config["default"].modules_to_save)


@pytest.mark.parametrize(
    ("arch", "saved"),
    [("bert", ["classifier"]), ("llama", ["lm_head"]), ("llama", ["embed_tokens", "lm_head"])],
)
def test_modules_to_save_that_the_file_lacks_are_refused_as_peft_refuses_them(arch, saved, tmp_path):
    given, lost = tmp_path / "ad", saved[-1]
    with tiny.quiet():
        config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=saved)
        peft.get_peft_model(tiny.build(arch), config).save_pretrained(given)
    file = given / "adapter_model.safetensors"
    tensors = {name: values for name, values in load_file(file).items() if f".{lost}." not in name}
    assert len(tensors) < len(load_file(file))
    save_file(tensors, file, {"format": "pt"})
    with tiny.quiet(), pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(tiny.build(arch), given)
    graph = tiny.base_onnx(arch, "dynamo_noopt")
    verbs = [
        lambda: merge_checkpoint(tiny.checkpoint(arch), given, tmp_path / "merged"),
        lambda: merge_onnx(graph, given, tmp_path / "m" / "o.onnx"),
        lambda: swap_onnx(graph, tmp_path / "s" / "o.onnx", adapter=given),
        lambda: bank_onnx(graph, {"a": given}, tmp_path / "b" / "o.onnx"),
    ]
    for verb in verbs:
        with pytest.raises(AdapterError, match="modules_to_save") as caught:
            verb()
        assert [problem.split(":")[0] for problem in caught.value.problems] == [lost]
    # What the hint says.
    config = json.loads((given / "adapter_config.json").read_text())
    config["modules_to_save"] = [name for name in saved if name != lost]
    (given / "adapter_config.json").write_text(json.dumps(config))
    verbs[0]()


def test_names_that_the_base_has_not_are_no_fault(tmp_path):
    """PEFT writes both of them for a classifier."""
    with tiny.quiet():
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        peft.get_peft_model(tiny.build("bert"), config).save_pretrained(tmp_path / "ad")
    assert set(load_adapter(tmp_path / "ad").config["modules_to_save"]) >= {"classifier", "score"}
    merge_checkpoint(tiny.checkpoint("bert"), tmp_path / "ad", tmp_path / "merged")


@pytest.mark.parametrize("tying", [True, False])
@pytest.mark.parametrize("arch", ["Llama", "Qwen3", "Bart"])
def test_ends_that_peft_ties_are_not_left_out(arch, tying, tmp_path):
    """PEFT gives them the embedding's change; its own model says which modules it loads."""
    more = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    more |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    options = (TIED | more) if arch == "Bart" else TIED
    config = getattr(transformers, f"{arch}Config")(**options)
    kind = getattr(transformers, f"{arch}For{'ConditionalGeneration' if arch == 'Bart' else 'CausalLM'}")
    table = "shared" if arch == "Bart" else "embed_tokens"
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", table], ensure_weight_tying=tying)
    with tiny.quiet():
        model = peft.get_peft_model(kind(config), lora)
        torch.nn.init.normal_(model.get_input_embeddings().lora_embedding_A["default"])
        torch.nn.init.normal_(model.get_input_embeddings().lora_embedding_B["default"])
        model.save_pretrained(tmp_path / "a")
    assert not any("leave out" in note for note in load_adapter(tmp_path / "a").notes)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    stranger = "base_model.model.model.other.lora_{}.weight"
    tensors |= {stranger.format("A"): torch.randn(2, 8), stranger.format("B"): torch.randn(8, 2)}
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    assert any("leave out 1 of" in note for note in load_adapter(tmp_path / "a").notes)


ROUTED = {**TIED, "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize("arch", ["Qwen3Moe", "Mixtral"])
@pytest.mark.parametrize("targets", ["q_proj", "all-linear"])
def test_weights_that_target_parameters_name_are_not_left_out(arch, targets, tmp_path):
    """A router's own weight; PEFT loads every tensor of the file."""
    experts = {"num_local_experts" if arch == "Mixtral" else "num_experts": 4}
    config = getattr(transformers, f"{arch}Config")(**ROUTED, **experts)
    model = getattr(transformers, f"{arch}ForCausalLM")(config)
    chosen = targets if targets == "all-linear" else [targets]
    lora = peft.LoraConfig(r=2, target_modules=chosen, target_parameters=["mlp.gate.weight"])
    with tiny.quiet():
        peft.get_peft_model(model, lora).save_pretrained(tmp_path / "a")
        loaded = peft.PeftModel.from_pretrained(
            getattr(transformers, f"{arch}ForCausalLM")(config), tmp_path / "a"
        )
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(loaded)
    assert any("mlp.gate.lora_A" in name for name in tensors)
    assert all(torch.equal(state[name], values) for name, values in tensors.items())
    assert not any("leave out" in note for note in load_adapter(tmp_path / "a").notes)
    if targets == "all-linear":
        return  # Without target_parameters its experts could not be read.
    file = tmp_path / "a" / "adapter_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "target_parameters": None}))
    assert any("mlp.gate" in note for note in load_adapter(tmp_path / "a").notes if "leave out" in note)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"alora_invocation_tokens": [1]}, "serve it with PEFT or vLLM"),
        ({"arrow_config": {"top_k": 3}}, "export the task adapters one by one"),
        ({"use_qalora": True}, "run it with PEFT on the quantised base"),
    ],
)
def test_a_hint_never_proposes_a_merge_that_peft_refuses(change, hint, tmp_path):
    shutil.copytree(tiny.adapter("llama"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    stored = json.loads(file.read_text())
    for more, others in (({}, False), ({"r": 0}, True)):
        file.write_text(json.dumps({**stored, **change, **more}))
        with pytest.raises(AdapterError) as refused:
            load_adapter(tmp_path / "a")
        assert refused.value.hint.startswith(hint)
        assert "merge" not in refused.value.hint
        assert ("fix the other problems" in refused.value.hint) == others
