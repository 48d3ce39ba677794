"""Weights that a base ties: PEFT's unmerged model says what each family must answer after a merge."""

from __future__ import annotations

import builtins
import json

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tied_models import BART, FAMILIES, PLAIN, H, V, base_of, config_of, gemma3, inputs_of, logits, reloaded

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.ties.tied_layers import may_tie_layers
from lora_export.base.ties.ties import Tie, Ties, find_ties, untied_config
from lora_export.errors import SiteError
from lora_export.modes.merge_checkpoint import merge_checkpoint

T5 = {"vocab_size": V, "d_model": H, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
TOGETHER = {
    "T5ForConditionalGeneration": (T5, "encoder.embed_tokens", "lm_head", "q"),
    "SwitchTransformersForConditionalGeneration": (
        T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "decoder.embed_tokens", "lm_head", "q"),
}  # fmt: skip


def trained(model, folder, targets, **options):
    """Save a PEFT adapter with random values, and return what the adapted, unmerged model answers."""
    settings = {"r": 4, "lora_alpha": 4, "target_modules": targets} | options
    with tiny.quiet():
        peft = get_peft_model(model, LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(1)
        for values in peft.parameters():
            if values.requires_grad:
                values.data.copy_(0.2 * torch.randn(values.shape, generator=generator))
        peft.save_pretrained(folder, save_embedding_layers=False)
        return logits(peft, inputs_of(model))


CASES = [(kind, *spec) for kind, spec in FAMILIES.items()]


@pytest.mark.parametrize("which", ["embedding", "head"])
@pytest.mark.parametrize(("kind", "options", "embedding", "head", "linear"), CASES, ids=list(FAMILIES))
def test_only_the_trained_one_changes(tmp_path, kind, options, embedding, head, linear, which):
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    target = embedding if which == "embedding" else head
    expected = trained(model, tmp_path / "adapter", [target, linear])
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not report.plan.refused
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("which", ["backbone.embeddings", "lm_head"])
def test_a_class_that_ties_nothing_whatever_the_config_says(tmp_path, which):
    """Transformers' xLSTM has no ``_tied_weights_keys``: its head is a weight of its own, and stays one."""
    config = transformers.xLSTMConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=1, num_blocks=1, num_heads=2, tie_word_embeddings=True
    )
    model = base_of("xLSTMForCausalLM", config, tmp_path / "base")
    with tiny.quiet():
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[which]))
        for name, values in peft.named_parameters():
            if "lora_" in name:
                values.data.normal_()
        peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        wanted = peft.merge_and_unload().state_dict()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    stored, before = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("out", "base"))
    assert stored.keys() == before.keys()
    assert {n for n in before if not torch.equal(stored[n], before[n])} == {f"{which}.weight"}
    torch.testing.assert_close(stored[f"{which}.weight"], wanted[f"{which}.weight"])


def llava():
    text = PLAIN | {"model_type": "llama", "intermediate_size": 24, "num_key_value_heads": 2}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": H,
    }  # fmt: skip
    return transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=V - 1, tie_word_embeddings=True
    )


# The head's name in the file: of Llava the one that older transformers gave it, as for the other tensors.
VISION = {
    "Gemma3ForConditionalGeneration": (gemma3, "language_model.lm_head.weight"),
    "LlavaForConditionalGeneration": (llava, "language_model.lm_head.weight"),
}


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("target", ["model.language_model.embed_tokens", "lm_head"])
def test_the_flag_of_a_vision_language_model(tmp_path, target, kind):
    config, head = VISION[kind]
    model = base_of(kind, config(), tmp_path / "base")
    expected = trained(model, tmp_path / "adapter", rf"{target}|.*language_model.*q_proj")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6
    stored, before = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("out", "base"))
    assert set(stored) - set(before) == {head}


@pytest.mark.parametrize("kind", TOGETHER)
def test_families_that_can_not_be_parted_are_refused(tmp_path, kind):
    options, embedding, head, linear = TOGETHER[kind]
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    for target in (embedding, head):
        trained(model, tmp_path / target, [target, linear])
        model = model.__class__.from_pretrained(tmp_path / "base")
        with pytest.raises(SiteError) as caught:
            merge_checkpoint(tmp_path / "base", tmp_path / target, tmp_path / "out")
        assert len(caught.value.problems) == 1
        assert "share one weight" in caught.value.problems[0]
        assert "ensure_weight_tying" in caught.value.hint
    # The rest of the adapter has its place.
    report = merge_checkpoint(tmp_path / "base", tmp_path / target, tmp_path / "out", allow_unmatched=True)
    assert len(report.plan.refused) == 1
    before, after = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("base", "out"))
    assert torch.equal(before["shared.weight"], after["shared.weight"])


@pytest.mark.parametrize("save", [False, True])
def test_trained_tied_stays_tied(tmp_path, save):
    kind, options, embedding, *_ = CASES[list(FAMILIES).index("OPTForCausalLM")]
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    targets = (
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]} if save else {"targets": [embedding]}
    )
    expected = trained(model, tmp_path / "adapter", ensure_weight_tying=True, **targets)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6
    names = [set(load_file(tmp_path / f"{n}/model.safetensors")) for n in ("base", "out")]
    assert names[0] == names[1]


def test_what_peft_did_not_tie_is_not_tied(tmp_path):
    """PEFT knows embeddings of two names only: with another, ensure_weight_tying does nothing."""
    kind = "MambaForCausalLM"
    options = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "state_size": 4}
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    expected = trained(model, tmp_path / "adapter", ["embeddings"], ensure_weight_tying=True)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6


def test_a_weight_that_is_never_called(tmp_path):
    """BART's `shared` is only what the others are tied to: PEFT's change of it shows nowhere."""
    kind = "BartForConditionalGeneration"
    model = base_of(kind, config_of(kind, BART), tmp_path / "base")
    expected = trained(model, tmp_path / "adapter", ["model.shared", "q_proj"])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6


# --- several ties under one switch -------------------------------------------------------------------

MASKED = {
    "RobertaForMaskedLM": (
        PLAIN | {"intermediate_size": 24, "max_position_embeddings": 40}, "lm_head", "decoder", "query"),
    "MPNetForMaskedLM": (
        PLAIN | {"intermediate_size": 24, "max_position_embeddings": 40}, "lm_head", "decoder", "q"),
    "BertForMaskedLM": (PLAIN | {"intermediate_size": 24}, "cls", "decoder", "query"),
    "AlbertForMaskedLM": (
        PLAIN | {"intermediate_size": 24, "embedding_size": 8}, "predictions", "decoder", "query"),
}  # fmt: skip


@pytest.mark.parametrize("saved", ["head", "output layer", "LoRA with a bias", "all biases"])
@pytest.mark.parametrize(
    ("kind", "options", "head", "output", "linear"), [(k, *v) for k, v in MASKED.items()]
)
def test_the_tied_bias_of_a_masked_head(tmp_path, kind, options, head, output, linear, saved):
    """The weight is parted from the embedding by the same switch as the bias from the head's own."""
    given = {
        "head": {"modules_to_save": [head]},
        "output layer": {"modules_to_save": [output]},
        "LoRA with a bias": {"targets": [linear, output], "lora_bias": True},
        "all biases": {"bias": "all"},
    }[saved]
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    expected = trained(model, tmp_path / "adapter", **{"targets": [linear]} | given)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6


# --- layers that share their weights -----------------------------------------------------------------

HYBRID = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 6, "intermediate_size": 24,
          "num_attention_heads": 4, "num_key_value_heads": 4, "mamba_d_state": 4}  # fmt: skip
SHARED_LAYERS = {
    "ZambaForCausalLM": (
        HYBRID | {"attention_hidden_size": 64, "n_mamba_heads": 2, "attn_layer_period": 2,
                  "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
        r".*layers\.2\..*q_proj", r".*layers\.4\..*q_proj", "q_proj"),
    "Zamba2ForCausalLM": (
        HYBRID | {"layers_block_type": ["mamba", "hybrid"] * 3, "n_mamba_heads": 4, "mamba_headdim": 16,
                  "mamba_ngroups": 1, "chunk_size": 4, "num_mem_blocks": 1, "use_mem_rope": False,
                  "adapter_rank": 4},
        r".*layers\.1\..*o_proj", r".*layers\.5\..*o_proj", "o_proj"),
}  # fmt: skip


@pytest.mark.parametrize("which", ["first", "last", "all"])
@pytest.mark.parametrize("kind", SHARED_LAYERS)
def test_one_of_the_layers_that_share_a_block(tmp_path, kind, which):
    options, first, last, every = SHARED_LAYERS[kind]
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    targets = {"first": first, "last": last, "all": [every]}[which]
    expected = trained(model, tmp_path / "adapter", targets)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}}, False),
        ({"model_type": "bert"}, False),
        ({"model_type": "nobody-s"}, False),
        ({}, False),
        ({"model_type": "zamba2"}, True),
        ({"model_type": "x", "text_config": {"model_type": "udop_text"}}, True),
        ({"model_type": "bark"}, True),
    ],
)
def test_families_whose_layers_may_be_tied(config, expected):
    assert may_tie_layers(config) is expected


# --- what the file holds with other values -----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["q", "lm_head"]},
        {"targets": ["q"], "modules_to_save": ["lm_head"]},
        {"targets": ["q"], "trainable_token_indices": {"shared": [4, 7]}},
    ],
    ids=["LoRA", "whole", "token rows"],
)
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "MT5ForConditionalGeneration"])
def test_a_head_of_its_own_in_a_class_that_always_ties(tmp_path, kind, options):
    """As FLAN-T5's: transformers does not tie tensors that a file holds with different values."""
    base_of(kind, config_of(kind, T5), tmp_path / "base")
    file, config = tmp_path / "base/model.safetensors", tmp_path / "base/config.json"
    save_file(load_file(file) | {"lm_head.weight": torch.randn(V, H)}, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    with tiny.quiet():
        model = getattr(transformers, kind).from_pretrained(tmp_path / "base").eval()
    assert model.lm_head.weight is not model.shared.weight
    expected = trained(model, tmp_path / "adapter", **options)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6


# --- blends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", [("both", "head"), ("head", "both"), ("both", "embedding"), ("both", "both2")]
)
def test_a_blend_ties_only_what_was_trained_tied(tmp_path, order):
    kind, options = "OPTForCausalLM", FAMILIES["OPTForCausalLM"][0]
    given = {
        "both": (["model.decoder.embed_tokens"], {"ensure_weight_tying": True}),
        "both2": (["model.decoder.embed_tokens"], {"ensure_weight_tying": True, "r": 2}),
        "head": (["lm_head"], {}),
        "embedding": (["model.decoder.embed_tokens"], {"r": 3}),
    }
    for name in order:
        model = base_of(kind, config_of(kind, options), tmp_path / "base")
        trained(model, tmp_path / name, given[name][0], **given[name][1])
    weights = [0.5, 2.0]
    merge_checkpoint(tmp_path / "base", [tmp_path / n for n in order], tmp_path / "out", weights=weights)
    base, out = (load_file(tmp_path / f"{n}/model.safetensors") for n in ("base", "out"))
    start = base["model.decoder.embed_tokens.weight"].double()
    change = {"embedding": start.clone(), "head": start.clone()}
    for name, weight in zip(order, weights, strict=True):
        values = {k: v.double() for k, v in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        scaling = weight * 4 / json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
        if name == "head":
            prefix = "base_model.model.lm_head.lora_"
            change["head"] += scaling * values[f"{prefix}B.weight"] @ values[f"{prefix}A.weight"]
            continue
        prefix = "base_model.model.model.decoder.embed_tokens.lora_embedding_"
        delta = scaling * (values[f"{prefix}B"] @ values[f"{prefix}A"]).T
        change["embedding"] += delta
        if name != "embedding":
            change["head"] += delta
    embedding = out["model.decoder.embed_tokens.weight"].double()
    assert torch.allclose(embedding, change["embedding"], atol=1e-6)
    assert torch.allclose(out.get("lm_head.weight", embedding).double(), change["head"], atol=1e-6)
    assert ("lm_head.weight" in out) == (order != ("both", "both2"))


def test_both_ends_that_contradict_their_tying_are_refused(tmp_path):
    kind, options = "OPTForCausalLM", FAMILIES["OPTForCausalLM"][0]
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    trained(model, tmp_path / "adapter", ["model.decoder.embed_tokens"], ensure_weight_tying=True)
    file = tmp_path / "adapter/adapter_model.safetensors"
    values = load_file(file)
    values["base_model.model.lm_head.lora_A.weight"] *= 2
    save_file(values, file)
    with pytest.raises(SiteError, match="trained with ensure_weight_tying, and yet"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# --- without transformers ----------------------------------------------------------------------------


def test_without_transformers_unknown_names_are_refused(tmp_path, monkeypatch):
    """A head tied to an embedding of a name that we don't know: never a guess."""
    kind, options, embedding, _, linear = CASES[0]
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    trained(model, tmp_path / "adapter", [embedding, linear])
    monkeypatch.setattr(builtins, "__import__", _without_transformers(builtins.__import__))
    with pytest.raises(SiteError, match="transformers is not installed"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


MARIAN = BART | {"pad_token_id": 1, "decoder_start_token_id": 1}
# Whose input embedding follows another one, and whose does not; rows of the input embedding, and of one end.
ROWS = {
    "Marian, a list": ("MarianMTModel", MARIAN, [3, 5]),
    "Marian, by name": ("MarianMTModel", MARIAN, {"encoder.embed_tokens": [3, 5]}),
    "Marian, another end": ("MarianMTModel", MARIAN, {"decoder.embed_tokens": [3, 5]}),
    "BART, a list": ("BartForConditionalGeneration", BART, [3, 5]),
    "BART, one end": ("BartForConditionalGeneration", BART, {"encoder.embed_tokens": [3, 5]}),
    "BART, the head": ("BartForConditionalGeneration", BART, {"lm_head": [3, 5]}),
    "BERT, a list": ("BertForMaskedLM", FAMILIES["BertForMaskedLM"][0], [3, 5]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_the_input_embedding_are_those_of_all_ends(case, tmp_path):
    """As PEFT's unmerged model, which leaves out a tied head's bias: its own merge adds that again."""
    kind, options, rows = ROWS[case]
    model = base_of(kind, config_of(kind, options), tmp_path / "base")
    has_bias = kind.startswith("Bert")
    if has_bias:
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(tmp_path / "base")
    linear = "query" if has_bias else "q_proj"
    expected = trained(model, tmp_path / "adapter", [linear], trainable_token_indices=rows)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    actual = reloaded(kind, tmp_path / "out", model)
    if has_bias:
        assert tiny.relative_error(actual, expected) > 0.01
        with tiny.quiet():
            plain = type(model).from_pretrained(tmp_path / "base").eval()
            theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
            expected = logits(theirs, inputs_of(model))
    assert tiny.relative_error(actual, expected) <= 2e-6
    assert any("PEFT leaves out" in note for note in report.plan.notes) == has_bias


CAUSAL = PLAIN | {"intermediate_size": 24, "num_key_value_heads": 1}


@pytest.mark.parametrize("said", [None, True], ids=["no key", "tied"])
@pytest.mark.parametrize("how", ["transformers", "no transformers", "unknown model_type"])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM", "OlmoForCausalLM"])
def test_a_head_with_other_values_is_not_tied_whoever_says_so(tmp_path, monkeypatch, kind, how, said):
    """Rows of the embedding: PEFT puts them into the head where the config says that it is tied."""
    config = getattr(transformers, kind).config_class(**CAUSAL, tie_word_embeddings=False)
    base_of(kind, config, tmp_path / "base")
    file = tmp_path / "base/config.json"
    told = {k: v for k, v in json.loads(file.read_text()).items() if k != "tie_word_embeddings"}
    told |= {} if said is None else {"tie_word_embeddings": said}
    file.write_text(json.dumps(told))
    with tiny.quiet():
        model = getattr(transformers, kind).from_pretrained(tmp_path / "base").eval()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    expected = trained(model, tmp_path / "adapter", ["q_proj"], trainable_token_indices=[3, 4, 5])
    if how == "unknown model_type":
        file.write_text(json.dumps(told | {"model_type": "nobody-s"}))
    with monkeypatch.context() as patched:
        if how == "no transformers":
            patched.setattr(builtins, "__import__", _without_transformers(builtins.__import__))
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    result = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(result | {"model_type": told["model_type"]}))
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6


def _without_transformers(real):
    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    return without


def test_untied_config_reaches_the_levels_that_have_a_vocabulary():
    config = {
        "text_config": {"vocab_size": 3},
        "vision_config": {"size": 1},
        "a": {"tie_word_embeddings": True},
    }
    assert untied_config(config) == {
        "text_config": {"vocab_size": 3, "tie_word_embeddings": False},
        "vision_config": {"size": 1},
        "a": {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }


def test_a_base_without_a_model_type_is_not_asked_about(tmp_path):
    save_file({"up.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert find_ties(Checkpoint.open(tmp_path)).ties == ()


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("stored", ["decoder.head.0.weight", "model.decoder.head.0.weight"])
def test_a_parameters_own_path_outdoes_another_that_ends_like_it(stored, flattened):
    """Detectors tie their heads to the decoder's, of which they are the end."""
    tie = Tie(tensors={stored: stored, "head.0.weight": "head.0.weight"}, source=stored)
    assert Ties((tie,)).absent("head_0.weight" if flattened else "head.0.weight", flattened) == (
        tie,
        "head.0.weight",
    )
