"""Give a decoder its key-value cache as plain inputs and outputs, under the names that servers expect.

========================================== ==============================================
``input_ids``, ``position_ids``            ``[batch, sequence]``
``attention_mask``                         ``[batch, total_sequence]``, past and new tokens
``past_key_values.N.key``, ``….value``     ``[batch, kv_heads, past_sequence, head_dim]``
``logits``                                 ``[batch, sequence, vocab]``
``present.N.key``, ``….value``             ``[batch, kv_heads, total_sequence, head_dim]``
========================================== ==============================================

These are the names of optimum and onnxruntime-genai. Every layer keeps all tokens; those that a layer with a
sliding window must not see are masked, as without a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.traced import Traced
from lora_export.errors import CheckpointError
from lora_export.graph.captured import BATCH, PAST_SEQUENCE, SEQUENCE, TOTAL_SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_PAST = 5  # Tokens in the example's cache: a size that no other dimension of the example has.
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
_LEAVE_OUT = "omit --kv-cache (kv_cache=True)"


def switch_cache(model: Any, used: bool) -> None:
    """Switch a model's cache on or off, also of the language model inside a vision–language model."""
    if not hasattr(model.config, "get_text_config"):  # a model of diffusers, which has none
        return
    configs = [model.config, model.config.get_text_config()]
    if not used:
        # Also of models inside it that have a config of their own, as T5's decoder does. Some must not be
        # switched on: its encoder has none.
        found = (getattr(module, "config", None) for module in model.modules())
        configs += [config for config in found if getattr(config, "use_cache", None)]
    for config in configs:
        config.use_cache = used


def with_cache(
    model: Any,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    where: str,
    *,
    read: Mapping[str, Any] | None = None,
) -> Traced:
    """Make a model read and return its cache as a flat list of tensors.

    Args:
        model: A transformers model; its ``forward`` is replaced. With a module around it instead, each weight
            of the graph would have another name than in the checkpoint.
        inputs: Inputs that it was run with.
        outputs: Its outputs; the cache in them shows the layers' shapes.
        where: The folder, for messages.
        read: Inputs that hold each token, ``input_ids`` before ``inputs_embeds``; its ids by default.

    Raises:
        CheckpointError: The model has no key-value cache, or another state beside it.
    """
    import torch

    past = _empty_past(type(model).__name__, inputs, outputs, where)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    example: dict[str, Any] = {
        **(read or {"input_ids": ids}),
        "attention_mask": torch.ones(len(ids), mask.shape[1] + _PAST, dtype=mask.dtype),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        example["position_ids"] = torch.arange(_PAST, _PAST + ids.shape[1]).repeat(len(ids), 1)
    names = [*example]
    _replace_forward(model, names)
    example["past"] = past
    layers = [f"{number}.{part}" for number in range(len(past)) for part in ("key", "value")]
    return Traced(
        inputs=example,
        shapes=_shapes(example),
        input_names=names + [f"past_key_values.{layer}" for layer in layers],
        output_names=["logits", *(f"present.{layer}" for layer in layers)],
        has_cache=True,
    )


def _empty_past(
    kind: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], where: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return zeros in the shape of each layer's keys and values."""
    cache, logits = outputs.get("past_key_values"), outputs.get("logits")
    if cache is None:
        raise CheckpointError(
            f"{where}: {kind} has no key-value cache",
            f"only decoders that generate text have one: {_LEAVE_OUT}",
        )
    refuse_other_logits(logits, inputs["input_ids"], kind, where)
    return [(past_zeros(layer.keys), past_zeros(layer.values)) for layer in plain_layers(cache, kind, where)]


def refuse_other_logits(logits: torch.Tensor | None, ids: torch.Tensor, kind: str, where: str) -> None:
    """Raise `CheckpointError` if a model with a cache does not score each token.

    Args:
        logits: Its scores, if there are any.
        ids: Its tokens.
        kind: Its class.
        where: The folder, for messages.
    """
    if logits is None or logits.shape[:2] != ids.shape:
        raise CheckpointError(
            f"{where}: {kind} has a key-value cache, but no logits for each token to go on from", _LEAVE_OUT
        )


def plain_layers(cache: Any, kind: str, where: str) -> list[Any]:
    """Return the layers of a cache that holds keys and values and nothing else.

    Args:
        cache: The cache.
        kind: Class of the model.
        where: The folder, for messages.

    Raises:
        CheckpointError: The cache holds another state.
    """
    layers = list(getattr(cache, "layers", ()))
    others = sorted({type(layer).__name__ for layer in layers} - set(_LAYERS))
    if others or not layers:
        raise CheckpointError(
            f"{where}: {kind} keeps a state that is more than keys and values "
            f"({', '.join(others) or type(cache).__name__})",
            f"{_LEAVE_OUT}, or build the graph with onnxruntime-genai's builder",
        )
    return layers


def past_zeros(state: torch.Tensor) -> torch.Tensor:
    """Return zeros in the shape of a layer's keys or values, for the example's past tokens."""
    import torch

    batch, heads, _, size = state.shape
    return torch.zeros(batch, heads, _PAST, size, dtype=state.dtype, device=state.device)


def _replace_forward(model: Any, names: list[str]) -> None:
    from transformers import DynamicCache

    forward = model.forward

    def cached(
        input_ids: Any = None,
        inputs_embeds: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past: Any = (),
    ) -> tuple[torch.Tensor, ...]:
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        # The config is left out: with it, layers with a sliding window would forget tokens.
        result = forward(
            **{name: given[name] for name in names}, past_key_values=DynamicCache(past), use_cache=True
        )
        states = [state for layer in result.past_key_values.layers for state in (layer.keys, layer.values)]
        return (result.logits, *states)

    model.forward = cached


def _shapes(example: Mapping[str, Any]) -> dict[str, Any]:
    from torch.export import Dim

    batch, sequence, past = Dim(BATCH), Dim(SEQUENCE), Dim(PAST_SEQUENCE)
    shapes: dict[str, Any] = {name: {0: batch, 1: sequence} for name in example}
    shapes["attention_mask"] = {0: batch, 1: Dim(TOTAL_SEQUENCE)}
    shapes["past"] = [({0: batch, 2: past}, {0: batch, 2: past})] * len(example["past"])
    return shapes


def name_total(model: ir.Model) -> None:
    """Give the outputs' ``past_sequence + sequence`` the name that the attention mask has for it."""
    import onnx_ir as ir

    for value in model.graph.outputs[1:]:
        assert value.shape is not None
        dims = list(value.shape)
        dims[2] = ir.SymbolicDim(TOTAL_SEQUENCE)
        value.shape = ir.Shape(dims)
