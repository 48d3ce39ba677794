"""Single rows of embeddings: over an earlier merge, in a part of an adapter, with heads that aren't tied."""

import builtins

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_export import AdapterError, merge_checkpoint

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 30, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
MODELS = ["Llama", "Qwen2"]
TABLE = "model.embed_tokens.weight"


def based(name, folder, **config):
    torch.manual_seed(0)
    with tiny.quiet():
        config = getattr(transformers, f"{name}Config")(**SIZES, **config)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        model.save_pretrained(folder)
    return model


def trained(name, base, folder, seed=0, **config):
    with tiny.quiet():
        model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(base)
        tuned = get_peft_model(model, LoraConfig(r=2, **config))
        torch.manual_seed(seed)
        for key, parameter in tuned.named_parameters():
            if "lora_" in key or "trainable_tokens_delta" in key:
                nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def reloaded(name, base, adapter):
    with tiny.quiet():
        model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(base)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


FIRST = {
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [6, 7]},
    "low-rank": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", FIRST)
def test_rows_over_what_an_earlier_merge_changed_are_refused(first, name, tmp_path):
    based(name, tmp_path / "base", tie_word_embeddings=False)
    rows = {"target_modules": ["q_proj"], "trainable_token_indices": [6]}
    one = trained(name, tmp_path / "base", tmp_path / "one", 1, **FIRST[first])
    two = trained(name, tmp_path / "base", tmp_path / "two", 2, **rows)
    merge_checkpoint(tmp_path / "base", one, tmp_path / "merged")
    with pytest.raises(AdapterError, match="would undo an earlier merge") as caught:
        merge_checkpoint(tmp_path / "merged", two, tmp_path / "out")
    assert "'two' holds 1 single rows of it" in caught.value.problems[0]
    # Trained on the merged base, as the hint says.
    three = trained(name, tmp_path / "merged", tmp_path / "three", 3, **rows)
    merge_checkpoint(tmp_path / "merged", three, tmp_path / "out")
    wanted = reloaded(name, tmp_path / "merged", three)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.allclose(got[TABLE], wanted[TABLE], atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_rows_over_an_earlier_merge_of_other_weights_pass(name, tmp_path):
    based(name, tmp_path / "base", tie_word_embeddings=False)
    one = trained(name, tmp_path / "base", tmp_path / "one", 1, target_modules=["v_proj"])
    rows = {"target_modules": ["q_proj"], "trainable_token_indices": [6]}
    two = trained(name, tmp_path / "base", tmp_path / "two", 2, **rows)
    merge_checkpoint(tmp_path / "base", one, tmp_path / "merged")
    merge_checkpoint(tmp_path / "merged", two, tmp_path / "out")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("known", [True, False], ids=["transformers", "alone"])
def test_rows_stay_at_their_end_where_the_head_has_other_values(known, name, tmp_path, monkeypatch):
    """A class that doesn't tie need not say so in its config."""
    based(name, tmp_path / "base", tie_word_embeddings=False)
    config = tmp_path / "base" / "config.json"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "tie_word_embeddings" not in line))
    rows = {"target_modules": ["q_proj"], "trainable_token_indices": [6]}
    given = trained(name, tmp_path / "base", tmp_path / "rows", **rows)
    wanted = reloaded(name, tmp_path / "base", given)
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.partition(".")[0] == "transformers" and not known:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    merge_checkpoint(tmp_path / "base", given, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for key in (TABLE, "lm_head.weight"):
        assert torch.allclose(got[key], wanted[key], atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_left_aside_with_the_rest_of_what_is_not_meant(name, tmp_path):
    base = based(name, tmp_path / "base", tie_word_embeddings=False)
    rows = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [6]}
    given = trained(name, tmp_path / "base", tmp_path / "rows", **rows)
    report = merge_checkpoint(tmp_path / "base", given, tmp_path / "out", component="model.layers")
    assert [row.parameter for row in report.plan.placed] == ["model.layers.0.self_attn.q_proj.weight"]
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got[TABLE], base.state_dict()[TABLE])
    both = merge_checkpoint(tmp_path / "base", given, tmp_path / "both", component="model")
    assert {row.parameter for row in both.plan.placed} == {TABLE, "model.layers.0.self_attn.q_proj.weight"}
