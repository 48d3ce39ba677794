"""A vision–language folder is captured as its language model: the graph takes text, and answers as PEFT's."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_export import SiteError, merge_onnx

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def llava():
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=98,
            image_seq_length=4,
        )
    )


def paligemma():
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**VISION),
            text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
            image_token_index=98,
            projection_dim=32,
            hidden_size=32,
        )
    )


@pytest.mark.parametrize("make", [llava, paligemma])
def test_the_language_model_is_captured(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        wanted = adapted(
            input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids)
        ).logits.numpy()
    out = tmp_path / "model.onnx"
    # The tower has a q_proj as well, and no place in this graph.
    with pytest.raises(SiteError, match="vision_tower") as caught:
        merge_onnx(tmp_path / "base", tmp_path / "adapter", out)
    assert "--component model.language_model" in caught.value.hint
    merge_onnx(tmp_path / "base", tmp_path / "adapter", out, component="model.language_model")
    # PaliGemma's attention goes in both directions, where its token types are 0.
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    feeds |= {"token_type_ids": np.zeros(ids.shape, np.int64)} if make is paligemma else {}
    assert tiny.relative_error(tiny.run(out, feeds), wanted) < 2e-6
