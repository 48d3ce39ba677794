"""A square Conv1D is known by the name that the base stores it under, however the adapter spells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_export import merge_checkpoint

SMALL = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)),
    "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**SMALL)),
    "imagegpt": lambda: transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**SMALL)),
}


@pytest.mark.parametrize("prefix", ["lora_", "lora_te_", "lora_te1_"])
@pytest.mark.parametrize("arch", MODELS)
def test_flattened_names(arch: str, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[arch]().eval()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attn.c_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    state = get_peft_model_state_dict(wrapped)
    kohya: dict[str, torch.Tensor] = {}
    for name, values in state.items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        flat = prefix + path.replace(".", "_")
        kohya[f"{flat}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = values.contiguous()
        kohya[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(kohya, tmp_path / "a.safetensors")
    merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = wrapped.merge_and_unload().state_dict()
    names = [name for name in merged if name.endswith("attn.c_proj.weight")]
    assert names
    for name in names:
        (own,) = (key for key in expected if key == name or key.endswith(f".{name}"))
        np.testing.assert_allclose(merged[name].numpy(), expected[own].numpy(), atol=1e-5)
