"""Tiny encoder–decoders, and their two graphs in onnxruntime beside PyTorch's own ``generate``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_export import capture_onnx

Array = tiny.Array
ROWS, TOKENS, NEW = 3, 9, 12
WIDTH, HEADS = 32, 2
START = 1
ARCHS = ("t5", "bart", "marian", "whisper")
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": START}
_BART = {
    "vocab_size": tiny.VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **_IDS,
}
_T5 = {
    "vocab_size": tiny.VOCAB,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": HEADS,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    **_IDS,
}
_SOUND = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART | {"max_position_embeddings": 64}),
    "marian": ("MarianMTModel", _BART | {"max_position_embeddings": 64}),
    "whisper": ("WhisperForConditionalGeneration", _BART | _SOUND),
}


def build(arch: str) -> Any:
    """Return a model with random weights of which each counts; the same at every call."""
    kind, settings = KINDS[arch]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # computed where the model is made: Marian's are not saved
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif any(word in name for word in ("embed", "shared", "head", "proj_out")):
                parameter.copy_(0.3 * noise)
            else:  # so large that the answer is not the token before
                parameter.copy_(2 * noise / parameter[0].numel() ** 0.5)
    return model


@functools.cache
def checkpoint(arch: str) -> Path:
    """Return the folder that a model was saved to."""
    folder = tiny.cache_folder() / "halves" / arch
    with tiny.quiet():
        build(arch).save_pretrained(folder)
    return folder


@functools.cache
def captured(arch: str) -> Path:
    """Return the folder of a model's two graphs."""
    folder = tiny.cache_folder() / "halves" / f"{arch}-graphs"
    capture_onnx(checkpoint(arch), folder, kv_cache=True)
    return folder


def inputs(arch: str) -> dict[str, torch.Tensor]:
    """Return what the encoder reads: three rows, of texts two of them padded."""
    generator = torch.Generator().manual_seed(2)
    if arch == "whisper":
        frames = 2 * _SOUND["max_source_positions"]
        return {"input_features": torch.randn(ROWS, _SOUND["num_mel_bins"], frames, generator=generator)}
    ids = torch.randint(3, tiny.VOCAB, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:], mask[2, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


# What adapters change, as PEFT's ``target_modules``: modules of both graphs, cross-attention's k and v among
# them; modules of the encoder's graph alone; modules of the decoder's alone.
TARGETS: dict[str, list[str] | str] = {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5": r"encoder\..*\.(q|v|wo)",
    "whisper": r".*decoder\..*\.(self_attn\.v_proj|encoder_attn\.q_proj|fc2)",
}


@functools.cache
def adapter(arch: str) -> Path:
    """Return an adapter's folder, as PEFT saves it."""
    folder = tiny.cache_folder() / "halves" / f"{arch}-adapter"
    config = LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS[arch], init_lora_weights=False)
    torch.manual_seed(5)
    with tiny.quiet():
        get_peft_model(build(arch), config).save_pretrained(folder)
    return folder


def adapted(arch: str) -> Any:
    """Return the model with the adapter, as PEFT computes it."""
    with tiny.quiet():
        return PeftModel.from_pretrained(build(arch), adapter(arch))


@dataclass(frozen=True)
class Answer:
    """Greedy tokens ``[rows, NEW]`` and the scores ``[rows, NEW, vocab]`` that they were chosen by."""

    tokens: Array
    logits: Array


def reference(model: Any, arch: str) -> Answer:
    """Return what PyTorch generates, also with PEFT's model around the model."""
    plain = getattr(model, "get_base_model", lambda: model)()
    plain.generation_config = transformers.GenerationConfig(
        pad_token_id=0, decoder_start_token_id=START, max_new_tokens=NEW
    )
    # Whisper's own has rules for which tokens may follow.
    with tiny.quiet(), torch.no_grad():
        found = transformers.GenerationMixin.generate(
            plain.eval(), **inputs(arch), output_logits=True, return_dict_in_generate=True
        )
    return Answer(found.sequences[:, 1:].numpy(), torch.stack(found.logits, 1).numpy())


def run(folder: Path, arch: str, fed: Mapping[str, Mapping[str, Array]] | None = None) -> Answer:
    """Return what the two graphs generate: the encoder's once, the decoder's for each token.

    Args:
        folder: Their folder.
        arch: The model.
        fed: Half → LoRA tensors for its graph.
    """
    sessions = {half: opened(folder, half) for half in ("encoder", "decoder")}
    more = fed or {}
    given = {name: value.numpy() for name, value in inputs(arch).items()} | dict(more.get("encoder", {}))
    names = [port.name for port in sessions["encoder"].get_outputs()]
    found = dict(zip(names, sessions["encoder"].run(names, given), strict=True))
    state = {as_past(name): value for name, value in found.items() if name.startswith("present.")}
    for port in sessions["decoder"].get_inputs():
        if ".decoder." in port.name:
            state[port.name] = np.zeros((ROWS, port.shape[1], 0, port.shape[3]), np.float32)
    if "attention_mask" in given:
        state["encoder_attention_mask"] = given["attention_mask"]
    state |= more.get("decoder", {})
    ids, tokens, logits = np.full((ROWS, 1), START), [], []
    names = [port.name for port in sessions["decoder"].get_outputs()]
    for _ in range(NEW):
        found = dict(zip(names, sessions["decoder"].run(names, state | {"input_ids": ids}), strict=True))
        logits.append(found.pop("logits")[:, -1])
        state |= {as_past(name): value for name, value in found.items()}
        ids = logits[-1].argmax(-1)[:, None]
        tokens.append(ids)
    return Answer(np.concatenate(tokens, 1), np.stack(logits, 1))


def opened(folder: Path, half: str) -> ort.InferenceSession:
    """Return a half's graph in onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        str(folder / f"{half}_model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def as_past(name: str) -> str:
    """Return the name of the input that an output with a state goes into."""
    return name.replace("present.", "past_key_values.")
