"""Graphs of models whose embedding and head are one weight."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tiny
import torch
import transformers

V, H = 30, 16


PLAIN = {
    "vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0,
    "max_position_embeddings": 32, "intermediate_size": 24,
}  # fmt: skip


# Class → config, input embedding, output head, a linear layer.
KINDS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "Olmo2ForCausalLM": (PLAIN, "embed_tokens", "lm_head", "q_proj"),
    "GPTNeoXForCausalLM": (PLAIN, "embed_in", "lm_head", "dense_h_to_4h"),
    "GraniteForCausalLM": (PLAIN, "embed_tokens", "lm_head", "q_proj"),
}


IDS = torch.arange(2, 12)[None]


FEEDS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


# Tools: the exporter as it is, without its optimiser, and the one before.
EXPORTERS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True, "optimize": True},
    "plain": {"dynamo": True, "optimize": False},
    "TorchScript": {"dynamo": False},
}


def loaded(kind: str, folder: Path) -> Any:
    with tiny.quiet():
        model = getattr(transformers, kind).from_pretrained(folder).eval()
    model.set_attn_implementation("eager")
    return model


def base_of(kind: str, folder: Path, tied: bool = True) -> Path:
    """Save a base; one that is not tied has equal values in both, as where they were parted only now."""
    config = getattr(transformers, kind).config_class(**KINDS[kind][0], tie_word_embeddings=tied)
    torch.manual_seed(0)
    with tiny.quiet():
        model = getattr(transformers, kind)(config).eval()
        if not tied:
            model.get_output_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
        model.save_pretrained(folder)
    return folder


def answer(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(**FEEDS).logits.numpy())


def graph_of(kind: str, base: Path, path: Path, exporter: str) -> Path:
    with tiny.quiet(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(kind, base)
        model.config.use_cache = False
        options = EXPORTERS[exporter]
        given = {"kwargs": FEEDS} if options["dynamo"] else {"input_names": list(FEEDS)}
        args = () if options["dynamo"] else tuple(FEEDS.values())
        if not options["dynamo"]:
            model.forward = functools.partial(_two, model.forward)
        torch.onnx.export(model, args, str(path), output_names=["logits"], verbose=False, **given, **options)
    return path


def _two(forward: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Run a model with two inputs: TorchScript makes inputs of the others' defaults, too."""
    return forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def ran(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    feeds = {port.name: FEEDS[port.name].numpy() for port in session.get_inputs()}
    return np.asarray(session.run(["logits"], feeds)[0])
