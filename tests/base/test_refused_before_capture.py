"""What an adapter's file alone decides is refused before a folder is captured, which takes a minute."""

from functools import partial

import numpy as np
import onnxruntime as ort
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from lora_export import AdapterError, SiteError, bank_onnx, merge_onnx, swap_onnx
from lora_export.base.capture import capture as capturing

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt2():
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 32, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False))


def olmoe():
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1))


MODELS = {"llama": (llama, "q_proj", "embed_tokens"), "gpt2": (gpt2, "c_attn", "wte")}


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    make, target, table = MODELS[request.param]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    return make, target, table, tmp_path


def trained(make, folder, **options):
    """Save an adapter with random values, and return PEFT's model of the saved base."""
    model = type(make()).from_pretrained(folder / "base").eval()
    peft = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    for name, values in peft.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(values)
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return peft


@pytest.fixture
def no_capture(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("captured")

    monkeypatch.setattr(capturing, "capture_checkpoint", fail)


# (options of PEFT, options of each verb, what the hint says).
REFUSED = {
    "rows of tokens": ({"rows": True}, {}, {}, "lora-export merge"),
    "DoRA": ({"use_dora": True}, {}, {}, "--dora"),
    "more ranks": ({}, {"max_rank": 2}, {"resident": "inputs", "slot_rank": 2}, "-rank 4 or more"),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("verb", ["swap-onnx", "bank-onnx"])
def test_nothing_is_captured(case, reason, verb, no_capture, tmp_path):
    make, target, table, folder = case
    options, swap, bank, hint = REFUSED[reason]
    options = dict(options)
    if options.pop("rows", False):
        options["trainable_token_indices"] = {table: [1, 2]}
    trained(make, folder, target_modules=[target], **options)
    out = tmp_path / "o.onnx"
    expose = partial(swap_onnx, folder / "base", out, adapter=folder / "adapter", **swap)
    if verb == "bank-onnx":
        expose = partial(bank_onnx, folder / "base", {"a": folder / "adapter"}, out, **bank)
    with pytest.raises((AdapterError, SiteError)) as caught:
        expose()
    assert hint in caught.value.hint
    assert verb not in caught.value.hint


def of_a_larger_model(folder, form):
    """Write the adapter of a model with inputs twice as wide, in one of two formats."""
    tensors, kohya = load_file(folder / "adapter_model.safetensors"), {}
    for name, a in list(tensors.items()):
        if name.endswith("lora_A.weight"):
            tensors[name] = torch.cat([a, a], 1)
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            front = f"lora_te_{path.replace('.', '_')}"
            b = tensors[name.replace("lora_A", "lora_B")]
            kohya |= {f"{front}.lora_down.weight": tensors[name], f"{front}.lora_up.weight": b}
    if form == "kohya":
        save_file(kohya, folder / "kohya.safetensors")
        return folder / "kohya.safetensors"
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
def test_another_size_of_the_family(case, form, verb, no_capture, tmp_path):
    """All names fit: the sizes alone show that it is another model's."""
    make, target, _, folder = case
    trained(make, folder, target_modules=[target])
    given, base, out = of_a_larger_model(folder / "adapter", form), folder / "base", tmp_path / "o.onnx"
    run = {
        "merge-onnx": partial(merge_onnx, base, given, out),
        "swap-onnx": partial(swap_onnx, base, out, adapter=given),
        "bank-onnx": partial(bank_onnx, base, {"a": given}, out),
    }[verb]
    with pytest.raises(SiteError, match="no place") as caught:
        run()
    assert all("32" in problem for problem in caught.value.problems)
    assert "the base" in caught.value.hint or "its base" in caught.value.hint


def test_stacked_experts(no_capture, tmp_path):
    torch.manual_seed(0)
    olmoe().save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained(olmoe, tmp_path, target_modules=[], target_parameters=parameters)
    with pytest.raises(SiteError) as caught:
        swap_onnx(tmp_path / "base", tmp_path / "o.onnx", adapter=tmp_path / "adapter")
    assert len(caught.value.problems) == len(parameters)
    assert "merge-onnx" in caught.value.hint


def test_rows_of_tokens_are_merged_before_the_capture(case):
    make, target, table, folder = case
    peft = trained(make, folder, target_modules=[target], trainable_token_indices={table: [1, 2, 9]})
    merge_onnx(folder / "base", folder / "adapter", folder / "merged.onnx")
    ids = torch.tensor([[1, 2, 3, 9]])
    with torch.no_grad():
        expected = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    session = ort.InferenceSession(folder / "merged.onnx")
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 4), np.int64)}
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-4, atol=1e-5)
