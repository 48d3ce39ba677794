"""PEFT's stored copies of the one embedding of an encoder-decoder model: all of its ends get them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_export import merge_onnx

V, D = 40, 16
BART = {
    "d_model": D, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": V,
    "max_position_embeddings": 32, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
T5 = {
    "d_model": D, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": V, "use_cache": False,
    "tie_word_embeddings": True,
}  # fmt: skip
# Class → config, a linear layer, exporters that can do it.
KINDS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "BartForConditionalGeneration": (BART, "q_proj", ("dynamo", "plain", "TorchScript")),
    "PegasusForConditionalGeneration": (BART, "fc1", ("plain", "TorchScript")),
    "T5ForConditionalGeneration": (T5, "wi", ("TorchScript",)),
}
EXPORTERS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True, "optimize": True},
    "plain": {"dynamo": True, "optimize": False},
    "TorchScript": {"dynamo": False, "opset_version": 17},
}
FEEDS = {"input_ids": torch.arange(3, 10)[None], "decoder_input_ids": torch.arange(5, 9)[None]}
CASES = [(kind, exporter) for kind, (_, _, able) in KINDS.items() for exporter in able]


def loaded(kind: str, folder: Path) -> Any:
    with tiny.quiet():
        model = getattr(transformers, kind).from_pretrained(folder).eval()
    model.set_attn_implementation("eager")
    return model


def answer(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(**FEEDS).logits.numpy())


def export(model: Any, path: Path, exporter: str) -> Path:
    forward = model.forward
    model.forward = lambda input_ids, decoder_input_ids: (
        forward(input_ids=input_ids, decoder_input_ids=decoder_input_ids).logits
    )
    with tiny.quiet(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(FEEDS.values()), str(path), input_names=list(FEEDS), output_names=["logits"],
            **EXPORTERS[exporter],
        )  # fmt: skip
    return path


@pytest.mark.parametrize("copies", ["both", "shared alone"])
@pytest.mark.parametrize(("kind", "exporter"), CASES)
def test_every_end_of_the_shared_embedding(kind: str, exporter: str, copies: str, tmp_path: Path) -> None:
    sizes, linear, _ = KINDS[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    with tiny.quiet():
        cls(cls.config_class(**sizes)).save_pretrained(tmp_path / "base")
        tuned = get_peft_model(loaded(kind, tmp_path / "base"), LoraConfig(r=2, target_modules=[linear]))
        with torch.no_grad():
            for name, values in tuned.named_parameters():
                if "lora_B" in name:
                    values.normal_(0, 0.3)
            tuned.get_input_embeddings().weight.add_(0.3 * torch.randn(V, D))
        tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    assert sum("lora_" not in name for name in stored) == 2
    if copies == "shared alone":
        save_file({name: values for name, values in stored.items() if "lm_head" not in name}, file)
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = answer(PeftModel.from_pretrained(loaded(kind, tmp_path / "base"), file.parent).eval())
    graph = export(loaded(kind, tmp_path / "base"), tmp_path / "base.onnx", exporter)
    merge_onnx(graph, file.parent, tmp_path / "out.onnx", checkpoint=tmp_path / "base")
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    (found,) = session.run(None, {name: values.numpy() for name, values in FEEDS.items()})
    assert tiny.relative_error(found, expected) <= 2e-6
    assert tiny.relative_error(answer(loaded(kind, tmp_path / "base")), expected) > 0.05
