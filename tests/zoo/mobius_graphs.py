"""Tiny models as mobius builds them, of families beside the zoo's, with adapters and PEFT's answers."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tiny
import torch
from tiny_models import HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB

from lora_export import load_adapter

Array = tiny.Array
ATTENTION, GATED = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Family:
    """A decoder of transformers.

    Attributes:
        name: Start of its classes' names.
        targets: What its adapters change.
        options: Of its config, beside the sizes.
        adapter: Of `LoraConfig`.
    """

    name: str
    targets: tuple[str, ...] = (*ATTENTION, *GATED)
    options: tuple[tuple[str, Any], ...] = ()
    adapter: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "llama": Family("Llama", adapter=(("modules_to_save", ["lm_head"]),)),
    "qwen2": Family("Qwen2", options=(("tie_word_embeddings", True),), adapter=(("bias", "all"),)),
    # Norms of q and k lie between the projections and the attention.
    "qwen3": Family("Qwen3", adapter=(("use_rslora", True),)),
    "mistral": Family("Mistral", (*ATTENTION, *GATED, "embed_tokens"), (("head_dim", 32),)),
    "granite": Family("Granite", adapter=(("lora_bias", False),)),
    "phi3": Family("Phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "qwen2_moe": Family(
        "Qwen2Moe",
        (*ATTENTION, "shared_expert.down_proj", "shared_expert.up_proj", "shared_expert_gate"),
        (("num_experts", 4), ("moe_intermediate_size", 24), ("shared_expert_intermediate_size", HIDDEN)),
    ),
}


@cache
def _model(family: str) -> Any:
    import transformers

    spec = FAMILIES[family]
    options = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "head_dim": HIDDEN // HEADS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    config = getattr(transformers, f"{spec.name}Config")(**(options | dict(spec.options)))
    torch.manual_seed(0)
    model = getattr(transformers, f"{spec.name}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                1 + 0.2 * noise if parameter.dim() == 1 else noise / math.sqrt(parameter.shape[-1])
            )
    return model


@cache
def checkpoint(family: str) -> Path:
    """Return the model's folder."""
    folder = tiny.cache_folder() / "mobius" / family / "checkpoint"
    with tiny.quiet():
        _model(family).save_pretrained(folder)
    return folder


@cache
def adapter(family: str, seed: int = 0, rank: int = 4) -> Path:
    """Return a PEFT folder of an adapter whose every trained value is random."""
    from peft import LoraConfig, get_peft_model

    spec = FAMILIES[family]
    folder = tiny.cache_folder() / "mobius" / family / f"adapter-{seed}"
    # The whole parameters of an adapter can't be resident beside another's.
    more = dict(spec.adapter) if seed == 0 else {}
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=list(spec.targets), **more)
    with tiny.quiet():
        model = get_peft_model(_fresh(family), config)
        generator = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.2 * noise if "lora_" in name else parameter + 0.1 * noise)
        model.save_pretrained(folder)
    return folder


def _fresh(family: str) -> Any:
    import copy

    return copy.deepcopy(_model(family))


def inputs() -> dict[str, Array]:
    """Return token ids and their mask."""
    ids = np.random.default_rng(2).integers(3, VOCAB, (2, 7))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@cache
def answer(family: str, adapter_path: Path | None = None) -> Array:
    """Return PyTorch's logits, with PEFT's own branches of an adapter."""
    from peft import PeftModel

    with tiny.quiet(), torch.no_grad():
        model = _fresh(family)
        if adapter_path is not None:
            model = PeftModel.from_pretrained(model, adapter_path).eval()
        values = {name: torch.tensor(value) for name, value in inputs().items()}
        return np.asarray(model(**values).logits.numpy())


@cache
def base(family: str, provider: str, dtype: str = "f32") -> Path:
    """Return mobius' graph."""
    from mobius.__main__ import main

    folder = tiny.cache_folder() / "mobius" / family / f"{provider}-{dtype}"
    arguments = ["build", "--config", str(checkpoint(family)), "--ep", provider, "--dtype", dtype]
    with tiny.quiet(), contextlib.redirect_stderr(io.StringIO()):
        main([*arguments, str(folder)])
    return folder / "model.onnx"


def feeds(path: Path) -> dict[str, Array]:
    """Return what a graph reads: an empty past and positions beside the tokens."""
    values, graph = inputs(), ir.load(path).graph
    batch, sequence = values["input_ids"].shape
    values["position_ids"] = np.arange(sequence)[None].repeat(batch, 0)
    for value in graph.inputs:
        name = str(value.name)
        if name.startswith("past_key_values."):
            assert value.shape is not None
            kind = np.float32 if value.dtype is None else value.dtype.numpy()
            values[name] = np.zeros((batch, int(value.shape[1]), 0, int(value.shape[3])), kind)
    return {str(v.name): values[str(v.name)] for v in graph.inputs if str(v.name) in values}


def merged_weights(family: str, adapter_path: Path, names: Mapping[str, Array]) -> dict[str, Array]:
    """Return what constants of mobius' graph must hold once merged: W0 + scaling·B·A in float64, by hand.

    Args:
        family: The model.
        adapter_path: An adapter of low-rank modules, and perhaps of whole ones.
        names: The graph's constants; those that the adapter changes are returned.
    """
    from safetensors.numpy import load_file

    wanted = {
        name: w.astype(np.float64) for name, w in load_file(checkpoint(family) / "model.safetensors").items()
    }
    given, changed = load_adapter(adapter_path), set()
    for module in given.modules.values():
        change = module.scaling * (module.lora_b.astype(np.float64) @ module.lora_a.astype(np.float64))
        wanted[f"{module.path}.weight"] += change.T if module.kind == "embedding" else change
        changed.add(f"{module.path}.weight")
    for name, values in given.extras.items():
        wanted[name] = values.astype(np.float64)
        changed.add(name)
    result = {}
    for name in names:
        stem = re.sub(r"__axis_0__concat(?=_t$|$)", "", name)
        parts = re.sub(r"_t$", "", stem).split("__")
        if changed & set(parts):
            values = np.concatenate([wanted[part] for part in parts])
            result[name] = values.T if name.endswith("_t") else values
    return result
