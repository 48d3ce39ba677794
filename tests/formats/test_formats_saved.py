"""What `save_adapter` writes is loaded by PEFT, and does what the adapter did that it was read from."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_export.formats import load_adapter, save_adapter

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 40, "num_labels": 3, "max_position_embeddings": 32, "pad_token_id": 0}
IDS = torch.arange(2, 14).reshape(2, 6)


def llama(tied):
    config = transformers.LlamaConfig(**{**TEXT, "tie_word_embeddings": tied})
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def classifier(kind):
    config = getattr(transformers, f"{kind}Config")(**TEXT)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def tagger():
    return transformers.BertForTokenClassification(transformers.BertConfig(**TEXT))


CLASSES = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
ROWS = "trainable_token_indices"
# (model, settings); a head is one module, or several in one that PEFT saves whole for the task.
CASES = {
    "a head of two modules": (lambda: classifier("Roberta"), CLASSES),
    "the same in another model": (lambda: classifier("Electra"), CLASSES),
    "another module beside it": (
        lambda: classifier("XLMRoberta"),
        {**CLASSES, "modules_to_save": ["LayerNorm"]},
    ),
    "a head of one module": (lambda: classifier("Bert"), {**CLASSES, "modules_to_save": ["pooler"]}),
    "a head for tokens": (tagger, {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "rows": (lambda: llama(False), {"target_modules": ["q_proj"], ROWS: [3, 7]}),
    "rows of a tied embedding": (lambda: llama(True), {"target_modules": ["q_proj"], ROWS: [3, 7]}),
    "rows kept tied": (
        lambda: llama(True),
        {"target_modules": ["q_proj"], ROWS: [3, 7], "ensure_weight_tying": True},
    ),
    "rows of two modules": (
        lambda: llama(False),
        {"target_modules": ["q_proj"], ROWS: {"embed_tokens": [3, 7], "lm_head": [5]}},
    ),
    "rows in another model": (gpt2, {"target_modules": ["c_attn"], ROWS: {"wte": [2, 4, 9]}}),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_was_saved(name, tmp_path):
    torch.manual_seed(0)
    make, settings = CASES[name]
    base = make().eval()
    trained = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=6, **settings))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    trained.save_pretrained(tmp_path / "a")
    save_adapter(load_adapter(tmp_path / "a"), tmp_path / "b")
    expected, found = (
        logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)) for folder in "ab"
    )
    assert (expected - logits(base)).norm() > 0.01 * logits(base).norm()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_rows_has_indices_of_its_own(tmp_path):
    torch.manual_seed(0)
    make, settings = CASES["rows of two modules"]
    get_peft_model(make(), LoraConfig(r=2, **settings)).save_pretrained(tmp_path / "a")
    save_adapter(load_adapter(tmp_path / "a", component="model"), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config[ROWS] == {"model.embed_tokens": [3, 7]}
    PeftModel.from_pretrained(make(), tmp_path / "b")
