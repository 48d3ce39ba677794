"""Two modules of a checkpoint that hold the same values stay two in a captured graph."""

import numpy as np
import onnx
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_export import merge_onnx, swap_onnx

IDS = torch.tensor([[3, 9, 27, 11, 5]])
# Small: exporters join equal constants below a size.
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
# Architecture → its class; two modules that read the same input, of which the first is adapted.
PAIRS = {
    "Bert": ("BertForTokenClassification", "value", "key"),
    "Llama": ("LlamaForCausalLM", "q_proj", "k_proj"),
    "Qwen2": ("Qwen2ForCausalLM", "up_proj", "gate_proj"),
}


@pytest.fixture(params=PAIRS)
def equal(request, tmp_path):
    """Return a folder with base and adapter, and the tuned model."""
    name, one, other = PAIRS[request.param]
    torch.manual_seed(0)
    with tiny.quiet():
        model = getattr(transformers, name)(getattr(transformers, f"{request.param}Config")(**SIZES)).eval()
        modules = dict(model.named_modules())
        for path in [path for path in modules if path.endswith(f".{one}")]:
            twin = modules[path.removesuffix(one) + other]
            for ours, its in zip(modules[path].parameters(), twin.parameters(), strict=True):
                nn.init.normal_(ours, std=0.3)
                its.data.copy_(ours)
        model.save_pretrained(tmp_path / "base")
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=[one], init_lora_weights=False)).eval()
        tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path, tuned


def answer(tuned):
    with torch.no_grad():
        return tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.numpy()


def test_only_the_adapters_own_module_changes(equal):
    folder, tuned = equal
    merged, swap = folder / "m" / "model.onnx", folder / "s" / "model.onnx"
    with tiny.quiet():
        merge_onnx(folder / "base", folder / "adapter", merged)
        swap_onnx(folder / "base", swap, adapter=folder / "adapter")
        wanted = answer(tuned)
        with tuned.disable_adapter():
            base = answer(tuned)
    names = {value.name for value in onnx.load(merged, load_external_data=False).graph.input}
    feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    feeds |= {name: np.zeros_like(IDS.numpy()) for name in names - feeds.keys()}
    assert tiny.relative_error(tiny.run(merged, feeds), wanted) < 2e-6
    assert tiny.relative_error(tiny.run(swap, feeds), base) < 2e-6
    assert tiny.relative_error(base, wanted) > 1e-2
