"""Hints name what helps: none asks for what was given, and what they name is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_export import check_parity, merge_checkpoint, merge_onnx
from lora_export.errors import AdapterError, SiteError

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 32}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=False)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXT, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            **T5, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
        )
    ),
}


def _trained(arch: str, folder: Path, **options: Any) -> tuple[Path, Path]:
    """Save a base, and an adapter that names it as its own."""
    torch.manual_seed(0)
    with tiny.quiet():
        MODELS[arch]().save_pretrained(folder / "base")
        model = type(MODELS[arch]()).from_pretrained(folder / "base").eval()
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options))
        generator = torch.Generator().manual_seed(1)
        for values in peft.parameters():
            if values.requires_grad:
                values.data.add_(0.2 * torch.randn(values.shape, generator=generator))
        peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize(("arch", "linear"), [("llama", "q_proj"), ("bert", "query")])
def test_parity_of_single_rows(arch: str, linear: str, tmp_path: Path) -> None:
    base, given = _trained(arch, tmp_path, target_modules=[linear], trainable_token_indices=[3, 5])
    merge_onnx(base, given, tmp_path / "m.onnx")
    with pytest.raises(AdapterError) as caught:
        check_parity(base, tmp_path / "m.onnx", given)
    assert "lora-export merge" in caught.value.hint
    assert "without this adapter" in caught.value.hint
    assert "trained on" not in caught.value.hint
    # What the hint says.
    merge_checkpoint(base, given, tmp_path / "merged")
    assert check_parity(tmp_path / "merged", tmp_path / "m.onnx").passed


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_bias_that_the_base_lacks(arch: str, tmp_path: Path) -> None:
    base, given = _trained(arch, tmp_path, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(SiteError, match="lora_bias needs a bias") as caught:
        merge_checkpoint(base, given, tmp_path / "merged")
    assert "merge-onnx" in caught.value.hint
    assert "changed since" not in caught.value.hint
    merge_onnx(base, given, tmp_path / "m.onnx")
    with tiny.quiet(), torch.no_grad():
        model = type(MODELS[arch]()).from_pretrained(base).eval()
        peft = PeftModel.from_pretrained(model, given).eval()
        ids = torch.arange(8).reshape(2, 4)
        expected = peft(input_ids=ids).logits.numpy()
    assert tiny.relative_error(_run(tmp_path / "m.onnx", ids.numpy()), expected) < 1e-5


def _run(path: Path, ids: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {}
    for port in session.get_inputs():
        feeds[port.name] = ids if port.name == "input_ids" else np.ones_like(ids)
        if "position" in port.name:
            feeds[port.name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("arch", ["t5", "switch"])
@pytest.mark.parametrize("table", ["shared", "encoder.embed_tokens"])
@pytest.mark.parametrize("was_tied", [False, True])
def test_ends_that_can_not_be_parted(arch: str, table: str, was_tied: bool, tmp_path: Path) -> None:
    """Trained with ensure_weight_tying, the hint doesn't ask for it."""
    base, given = _trained(arch, tmp_path, target_modules=["q", table], ensure_weight_tying=was_tied)
    with pytest.raises(SiteError) as caught:
        merge_checkpoint(base, given, tmp_path / "merged")
    assert ("ensure_weight_tying=True" in caught.value.hint) != was_tied
    assert "swap-onnx" in caught.value.hint


@pytest.mark.parametrize("weight", [0.5, 2.0])
@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, {"use_dora": True}],
    ids=["head", "norm", "dora"],
)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_one_adapter_with_a_weight(arch: str, options: dict[str, Any], weight: float, tmp_path: Path) -> None:
    base, given = _trained(arch, tmp_path, target_modules=["q_proj"], **options)
    with pytest.raises(AdapterError, match="this adapter can't be merged so") as caught:
        merge_checkpoint(base, given, tmp_path / "merged", weights=[weight])
    assert caught.value.hint == "merge it without --weight"
    merge_checkpoint(base, given, tmp_path / "merged")
