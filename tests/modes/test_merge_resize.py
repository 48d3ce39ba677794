"""New tokens, single rows and heads for a task: merged like PEFT answers, or said what to do to the base."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tied_models import BART, base_of, config_of, gemma3, inputs_of, logits, reloaded
from tiny_models import build

from lora_export.commands.merge import merge
from lora_export.commands.merge_onnx import merge_onnx
from lora_export.errors import AdapterError, SiteError
from lora_export.formats import load_adapter
from lora_export.modes.merge_checkpoint import merge_checkpoint

V, N, H = 40, 43, 16
PLAIN = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN = PLAIN | {"intermediate_size": 24, "num_key_value_heads": 1}
OPT = PLAIN | {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": H}


def qwen(tied):
    return transformers.Qwen2Config(**QWEN, tie_word_embeddings=tied)


# Class, config, input embedding, output head.
MODELS = {
    "qwen2": ("Qwen2ForCausalLM", lambda: qwen(False), "embed_tokens", "lm_head"),
    "qwen2-tied": ("Qwen2ForCausalLM", lambda: qwen(True), "embed_tokens", "lm_head"),
    "opt-tied": ("OPTForCausalLM", lambda: config_of("OPTForCausalLM", OPT), "embed_tokens", "lm_head"),
    "gemma3": ("Gemma3ForConditionalGeneration", gemma3, "model.language_model.embed_tokens", "lm_head"),
}


def trained(model, folder, save=False, **options):
    """Save a PEFT adapter with random values, and return what the adapted, unmerged model answers."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 4, "target_modules": r".*(language_model|layers)\S*q_proj"} | options
    with tiny.quiet():
        peft = get_peft_model(model, LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(1)
        for values in peft.parameters():
            if values.requires_grad:
                values.data.copy_(0.2 * torch.randn(values.shape, generator=generator))
        peft.save_pretrained(folder, save_embedding_layers=save)
        return logits(peft, inputs_with_new(model))


def inputs_with_new(model):
    """Return ids up to the last token that the model knows."""
    rows = model.get_input_embeddings().weight.shape[0]
    return {"input_ids": torch.tensor([[3, 1, 7, 2, rows - 1, rows - 2, 5]])}


def answer(kind, folder, model):
    with tiny.quiet():
        merged, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return logits(merged.eval(), inputs_with_new(model))


def resized(kind, config, folder):
    """Save a base and return it with rows for new tokens."""
    model = base_of(kind, config, folder)
    with tiny.quiet():
        model.resize_token_embeddings(N, mean_resizing=False)
    return model


# --- new tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ["saved along", "modules to save", "lora on both"])
def test_resize_takes_the_rows_from_the_adapter(tmp_path, name, what):
    kind, config, embedding, head = MODELS[name]
    model = resized(kind, config(), tmp_path / "base")
    options = {
        "saved along": {},
        "modules to save": {"modules_to_save": [embedding, head]},
        "lora on both": {"target_modules": rf".*{embedding}|{head}|.*(language_model|layers)\S*q_proj"},
    }[what]
    expected = trained(model, tmp_path / "adapter", save=what != "modules to save", **options)
    with pytest.raises(SiteError) as caught:
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert f"resize_token_embeddings({N})" in caught.value.hint
    assert "--resize" in caught.value.hint
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", resize=True)
    assert not report.plan.refused
    assert any(f"from {V} to {N} tokens" in note for note in report.plan.notes)
    assert tiny.relative_error(answer(kind, tmp_path / "out", model), expected) <= 2e-6
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("text_config", config)["vocab_size"] == N


@pytest.mark.parametrize("name", MODELS)
def test_a_base_resized_by_transformers_is_as_good(tmp_path, name):
    kind, config, *_ = MODELS[name]
    model = resized(kind, config(), tmp_path / "base")
    with tiny.quiet():
        model.save_pretrained(tmp_path / "base43")
    expected = trained(model, tmp_path / "adapter", save=True)
    merge_checkpoint(tmp_path / "base43", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(answer(kind, tmp_path / "out", model), expected) <= 2e-6


@pytest.mark.parametrize("name", ["qwen2", "opt-tied"])
def test_rows_that_the_adapter_does_not_hold_are_not_made_up(tmp_path, name):
    kind, config, embedding, _ = MODELS[name]
    trained(resized(kind, config(), tmp_path / "base"), tmp_path / "adapter", modules_to_save=[embedding])
    for unmatched in (False, True):
        if unmatched:
            report = merge_checkpoint(
                tmp_path / "base", tmp_path / "adapter", tmp_path / "out", resize=True, allow_unmatched=True
            )
            assert len(report.plan.refused) == 1
            before, after = (load_file(tmp_path / f"{n}/model.safetensors") for n in ("base", "out"))
            same = [torch.equal(before[name], after[name]) for name in before if "q_proj" not in name]
            assert all(same)
            assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
            continue
        with pytest.raises(SiteError, match=r"lm_head\.weight.*doesn't hold"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", resize=True)


def test_a_bias_of_the_vocabulary_is_counted_too(tmp_path):
    """BART adds ``final_logits_bias``, one value for each token: no adapter brings that along."""
    kind = "BartForConditionalGeneration"
    model = resized(kind, config_of(kind, BART), tmp_path / "base")
    from peft import LoraConfig, get_peft_model

    with tiny.quiet():
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(SiteError):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", resize=True)


def test_a_config_of_another_size_is_not_guessed_at(tmp_path):
    kind, config, *_ = MODELS["qwen2"]
    trained(resized(kind, config(), tmp_path / "base"), tmp_path / "adapter", save=True)
    said = json.loads((tmp_path / "base/config.json").read_text()) | {"vocab_size": V - 1}
    (tmp_path / "base/config.json").write_text(json.dumps(said))
    with pytest.raises(SiteError, match=f"no vocab_size of the base's config is {V}"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", resize=True)


def test_a_graph_says_what_to_do_to_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    rows = model.config.vocab_size + 3
    with tiny.quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    graph = tiny.base_onnx("llama", "dynamo")
    args = ["--base", str(graph), "--adapter", str(tmp_path / "adapter"), "-o", str(tmp_path / "m.onnx")]
    result = CliRunner().invoke(merge_onnx, args)
    assert isinstance(result.exception, SiteError)
    assert f"give the base {rows} rows before it is exported" in result.exception.hint


# --- single rows -------------------------------------------------------------------------------------

ROWS = [2, 7, 5, 6]


@pytest.mark.parametrize("name", MODELS)
def test_trained_rows_are_replaced(tmp_path, name):
    kind, config, embedding, _ = MODELS[name]
    model = base_of(kind, config(), tmp_path / "base")
    expected = trained(model, tmp_path / "adapter", trainable_token_indices={embedding: ROWS})
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not report.plan.refused
    assert tiny.relative_error(answer(kind, tmp_path / "out", model), expected) <= 2e-6
    before, after = (load_file(tmp_path / f"{n}/model.safetensors") for n in ("base", "out"))
    assert set(before) == set(after)
    (table,) = [name for name in before if name.endswith("embed_tokens.weight")]
    changed = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
    assert changed == sorted(ROWS)
    manifest = json.loads((tmp_path / "out/lora.json").read_text())
    assert list(manifest["adapters"][0]["replaced_rows"].values()) == [4]


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_trained_rows_lie_below_the_heads_own_change(tmp_path, kind):
    """Where embedding and head are tied, PEFT gives the head the trained rows, and adds its LoRA to them."""
    own = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    if kind.startswith("GPT2"):
        own = {"n_embd": 32, "n_layer": 1, "n_head": 4}
    config = getattr(transformers, f"{kind.partition('LM')[0].removesuffix('ForCausal')}Config")
    model = base_of(kind, config(vocab_size=64, tie_word_embeddings=True, **own), tmp_path / "base")
    options = {"target_modules": ["lm_head"], "trainable_token_indices": ROWS}
    expected = trained(model, tmp_path / "adapter", **options)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(answer(kind, tmp_path / "out", model), expected) <= 2e-6


@pytest.mark.parametrize("kind", ["T5", "Bert"])
@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "without the head's"])
def test_what_is_tied_grows_along_or_nothing_does(tmp_path, kind, whole):
    """A stored copy is of all that share its weight; a bias that the file lacks is not made up."""
    from peft import LoraConfig, get_peft_model

    if kind == "T5":
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        model, target, lost = transformers.T5ForConditionalGeneration(config), "q", "lm_head"
    else:
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        model, target, lost = transformers.BertForMaskedLM(config), "query", "decoder"
    model.eval().save_pretrained(tmp_path / "base")
    with tiny.quiet():
        model.resize_token_embeddings(69, mean_resizing=False)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        ).eval()
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ids = inputs_of(model) | {"input_ids": torch.tensor([[3, 1, 68, 64, 7]])}
    expected = logits(adapted, ids)
    if not whole:
        file = tmp_path / "adapter/adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if lost not in k}, file)
    given = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    grows = whole or kind == "T5"
    if not grows:
        with pytest.raises(SiteError, match="rows"):
            merge_checkpoint(*given, resize=True)
    merge_checkpoint(*given, resize=True, allow_unmatched=not grows)
    with tiny.quiet():
        loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.vocab_size == (69 if grows else 64)
    if grows:
        assert tiny.relative_error(logits(loaded.eval(), ids), expected) <= 2e-6


@pytest.mark.parametrize(
    "rows",
    [
        {"lm_head": [2, 5]},
        {"lm_head": [2, 5], "embed_tokens": [1, 2]},
        {"lm_head": [2, 5], "embed_tokens": [2, 5]},
    ],
    ids=["head", "different", "alike"],
)
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
def test_rows_of_the_head(tmp_path, name, rows):
    kind, config, *_ = MODELS[name]
    model = base_of(kind, config(), tmp_path / "base")
    expected = trained(model, tmp_path / "adapter", trainable_token_indices=rows)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(answer(kind, tmp_path / "out", model), expected) <= 2e-6


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
def test_rows_of_new_tokens(tmp_path, name):
    kind, config, *_ = MODELS[name]
    model = resized(kind, config(), tmp_path / "base")
    options = {"trainable_token_indices": [1, N - 1]}
    expected = trained(model, tmp_path / "adapter", save=True, **options)
    with pytest.raises(SiteError, match="resize"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", resize=True)
    assert tiny.relative_error(answer(kind, tmp_path / "out", model), expected) <= 2e-6


def test_rows_without_their_embedding(tmp_path):
    """The file holds only the new rows: those between the base's last and them can't be known."""
    kind, config, *_ = MODELS["qwen2"]
    model = resized(kind, config(), tmp_path / "base")
    trained(model, tmp_path / "adapter", trainable_token_indices=[1, N - 1])
    for resize in (False, True):
        with pytest.raises(SiteError) as caught:
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", resize=resize)
        assert f"resize_token_embeddings({N})" in caught.value.hint


@pytest.mark.parametrize("given", [[1], [1, 1], [1, -2], "all", {"other": [1], "more": [2]}, None])
def test_indices_that_do_not_fit_the_tensor(tmp_path, given):
    kind, config, *_ = MODELS["qwen2"]
    trained(base_of(kind, config(), tmp_path / "base"), tmp_path / "adapter", trainable_token_indices=[1, 2])
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": given}))
    with pytest.raises(AdapterError, match="trainable_tokens_delta"):
        load_adapter(tmp_path / "adapter")


def test_the_config_names_rows_that_the_file_lacks(tmp_path):
    kind, config, *_ = MODELS["qwen2"]
    trained(base_of(kind, config(), tmp_path / "base"), tmp_path / "adapter", trainable_token_indices=[1, 2])
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({n: v for n, v in load_file(file).items() if "token_adapter" not in n}, file)
    with pytest.raises(AdapterError, match="the file has no token_adapter"):
        load_adapter(tmp_path / "adapter")


def test_others_than_merge_refuse_rows_and_say_where_they_go(tmp_path):
    kind, config, *_ = MODELS["qwen2"]
    trained(base_of(kind, config(), tmp_path / "base"), tmp_path / "ad", trainable_token_indices=[1, 2])
    adapter = load_adapter(tmp_path / "ad")
    graph = tiny.base_onnx("llama", "dynamo")
    args = ["--base", str(graph), "--adapter", str(tmp_path / "ad"), "-o", str(tmp_path / "m.onnx")]
    result = CliRunner().invoke(merge_onnx, args)
    assert isinstance(result.exception, AdapterError)
    assert "lora-export merge" in result.exception.hint
    assert not (tmp_path / "m.onnx").exists()
    with pytest.raises(AdapterError, match="alone and with weight 1"):
        merge_checkpoint(tmp_path / "base", [adapter, adapter], tmp_path / "out")


# --- heads for a task --------------------------------------------------------------------------------

BERT = transformers.BertConfig(**PLAIN | {"intermediate_size": 24})
HEADS = {
    "score": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", qwen(False)),
    "classifier": ("BertModel", "BertForTokenClassification", BERT),
    "qa_outputs": ("BertForMaskedLM", "BertForQuestionAnswering", BERT),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_base_without_the_head(tmp_path, head):
    from peft import LoraConfig, get_peft_model

    kind, task, config = HEADS[head]
    base_of(kind, config, tmp_path / "base")
    config.num_labels = 2 if head == "qa_outputs" else 5
    with tiny.quiet():
        model = getattr(transformers, task).from_pretrained(tmp_path / "base", config=config)
        targets = ["q_proj", "query"]
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=[head]))
        peft.save_pretrained(tmp_path / "adapter")
        with pytest.raises(SiteError) as caught:
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert any(f"{head}.weight" in line for line in caught.value.problems)
        assert f"a head of {config.num_labels} labels" in caught.value.hint
        assert "save_pretrained" in caught.value.hint
        # What the hint says works.
        getattr(transformers, task).from_pretrained(tmp_path / "base", config=config).save_pretrained(
            tmp_path / "with head"
        )
        merge_checkpoint(tmp_path / "with head", tmp_path / "adapter", tmp_path / "out")
        config.num_labels = 3
        if head == "qa_outputs":
            return
        getattr(transformers, task)(config).save_pretrained(tmp_path / "other head")
    with pytest.raises(SiteError, match=r"(?s)shape \(3, 16\).*a head of 5 labels"):
        merge_checkpoint(tmp_path / "other head", tmp_path / "adapter", tmp_path / "out2")


def test_command(tmp_path):
    kind, config, *_ = MODELS["qwen2"]
    model = resized(kind, config(), tmp_path / "base")
    trained(model, tmp_path / "adapter", save=True)
    args = [
        "--base",
        str(tmp_path / "base"),
        "--adapter",
        str(tmp_path / "adapter"),
        "-o",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(merge, [*args, "--resize"])
    assert result.exit_code == 0, result.output
    assert reloaded(kind, tmp_path / "out", model).shape[-1] == N
    assert inputs_of(model)
