"""Make a twin of a checkpoint: a small model of the same config, with random weights, in a folder of its own.

What the config says of the model's kind stays: options, the ratio of query heads to key-value heads, the size
of a head, every kind of layer. Smaller are the width, the MLP, the vocabulary, the number of experts, the
window of attention and the number of layers: as many as have each kind of layer, and one of them once more.
"""

from __future__ import annotations

import copy
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.export import quiet
from lora_export.base.checkpoint.module_counts import few_modules
from lora_export.untrusted.places import exists, listed

if TYPE_CHECKING:
    from lora_export.base.capture.outline import Stack

# Settings of the same meaning, by transformers' names for them; a config may map them to its own.
_HEADS = ("num_attention_heads",)
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_MLPS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "mlp_dim"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_DEPTHS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)
# Ends of names of settings that are ids (LLaVA's ``image_token_index``).
_TOKENS = ("token_id", "token_index")
# Largest sizes of a twin.
_MOST_HEADS, _MOST_KEY_VALUE_HEADS = 4, 2
_MLP, _VOCABULARY, _MOST_EXPERTS, _WINDOW, _WIDTH = 96, 512, 8, 4, 32
# Layers behind the first of the last kind: one that is copied, and one at the end.
_BEHIND = 2


def depth_of(stack: Stack) -> int:
    """Return the number of layers of a stack that have each kind of layer, and one of them once more."""
    first_of = {last: first for first, last in stack.alike}
    kinds = [first_of.get(position, position) for position in stack.template]
    return min(stack.depth, max(map(kinds.index, kinds)) + 1 + _BEHIND)


def small_config(config: Any, stacks: Sequence[Stack]) -> Any:
    """Return the config of a twin.

    Args:
        config: The model's.
        stacks: Its layers.
    """
    small = copy.deepcopy(config)
    depths: dict[int, int] = {}
    for stack in stacks:  # an encoder's and a decoder's may be as deep, and have other kinds of layers
        depths[stack.depth] = max(depth_of(stack), depths.get(stack.depth, 0))
    for part in _parts(small):
        _narrow(part)
        _shorten(part, depths)
    return small


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config and those inside it."""
    from transformers import PretrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _narrow(config: Any) -> None:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    changes: dict[str, int] = {}
    if heads:
        keys = next((found for name in _KEY_VALUE_HEADS if (found := _number(config, name))), None)
        few = min(keys or heads, _MOST_KEY_VALUE_HEADS)
        ratio = heads // keys if keys and heads % keys == 0 else 1
        changes |= dict.fromkeys(_KEY_VALUE_HEADS, few)
        changes["num_attention_heads"] = few * min(ratio, _MOST_HEADS) if keys else min(heads, _MOST_HEADS)
        if hidden and hidden % heads == 0:
            each = hidden // heads
            # Where heads have a size of their own, the width is free.
            is_free = "head_dim" in vars(config) and _number(config, "head_dim") is not None
            changes["hidden_size"] = changes["num_attention_heads"] * (min(each, _WIDTH) if is_free else each)
    # A router chooses among groups of experts by their best two.
    chosen = (_number(config, "num_experts_per_tok") or 0, 2 * (_number(config, "n_group") or 0))
    changes |= dict.fromkeys(_MLPS, _MLP) | dict.fromkeys(_EXPERTS, max(_MOST_EXPERTS, *chosen))
    changes |= dict.fromkeys(_WINDOWS, _WINDOW) | {"vocab_size": _VOCABULARY}
    # Sizes that are the width under another name, such as an embedding's before its projection.
    same = [name for name, value in vars(config).items() if value == hidden and "position" not in name]
    for name, size in changes.items():
        old = _number(config, name)
        if old and size < old:
            setattr(config, name, size)
    if hidden and (width := _number(config, "hidden_size")) != hidden:
        for name in same:
            if _number(config, name) == hidden:
                setattr(config, name, width)
    for name, value in list(vars(config).items()):
        if name.endswith(_TOKENS) and isinstance(value, int) and value >= _VOCABULARY:
            setattr(config, name, value % _VOCABULARY)


def _shorten(config: Any, depths: dict[int, int]) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) in depths:
            setattr(config, name, value[: depths[len(value)]])
        elif name in _DEPTHS and value in depths:
            setattr(config, name, depths[value])


def _number(config: Any, name: str) -> int | None:
    """Return a setting that is a whole number above 0; None if the config has none of that name."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def save_twin(kind: Any, config: Any, folder: Path, beside: Path) -> None:
    """Save a twin with random weights, in float32.

    Args:
        kind: The model's class.
        config: The twin's config.
        folder: The folder to write.
        beside: The model's folder, whose small documents (of its image processor) the twin needs as well.
    """
    import torch

    torch.manual_seed(0)
    with quiet(), torch.no_grad(), few_modules(beside):
        model = kind._from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            _fill(name, parameter)
        model.save_pretrained(folder)
    for found in listed(beside, "*.json"):
        if not exists(folder / found.name) and not found.name.endswith(".index.json"):
            shutil.copy(found, folder / found.name)


def _fill(name: str, parameter: Any) -> None:
    """Give a parameter values of which each counts: near 1 for a norm, as large as keeps the state's size."""
    import torch

    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if parameter.ndim > 1:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
    else:
        parameter.add_(noise * 0.2)
