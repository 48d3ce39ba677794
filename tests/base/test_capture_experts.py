"""Mixtures of experts: a folder is captured, merged into, and answers as PEFT does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_export.base.capture.export import trace_module
from lora_export.errors import GraphError
from lora_export.modes.merge_onnx import merge_onnx
from lora_export.runtimes.torch.reference import TorchReference

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
MODELS = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"]},
}


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **MODELS[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_merged_as_peft_merges_it(kind: str, tmp_path: Path) -> None:
    """Attention and experts, with another batch and length than those of the capture."""
    base = model(kind)
    ids = torch.randint(1, 48, (3, 9))
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False
    )
    with tiny.quiet(), torch.no_grad():
        base.save_pretrained(tmp_path / "base")
        without = base(ids).logits.numpy()
        adapted = get_peft_model(base, config).eval()
        adapted.save_pretrained(tmp_path / "adapter")
        expected = adapted(ids).logits.numpy()
    merge_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out.onnx")
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    actual = session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})[0]
    effect = np.linalg.norm(expected - without)
    assert effect > 1e-2 * np.linalg.norm(without)
    assert np.linalg.norm(actual - expected) < 1e-3 * effect


@pytest.mark.parametrize("kind", ["Mixtral", "Olmoe"])
def test_the_reference_computes_as_transformers_does(kind: str, tmp_path: Path) -> None:
    with tiny.quiet():
        model(kind).save_pretrained(tmp_path / "base")
    reference = TorchReference(tmp_path / "base", "float32", {})
    own = type(reference.module).from_pretrained(tmp_path / "base")
    assert reference.module.get_experts_implementation() == own.get_experts_implementation()


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_a_module_of_ones_own_is_told_what_helps(kind: str) -> None:
    """The hint, followed: the export works."""
    mixture = model(kind)
    mixture.config.use_cache = False
    ids = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    with pytest.raises(GraphError, match="can't export") as caught:
        trace_module(mixture, ids, None, None)
    assert "experts_implementation='batched_mm'" in caught.value.hint
    mixture.set_experts_implementation("batched_mm")
    assert trace_module(mixture, ids, None, None).graph.inputs
