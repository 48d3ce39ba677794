"""Take an encoder–decoder apart into two graphs, between which keys and values of the encoder go as tensors.

The encoder's graph has what it answers, and what the decoder's layers make of that; the decoder's graph reads
it for each token. So it is one for the first and for later tokens, and computes nothing of the encoder again.

========================================= =====================================================
encoder                                   as the model's, without ``decoder_input_ids``
``last_hidden_state``                     ``[batch, sequence, width]``
``present.N.encoder.key``, ``….value``    ``[batch, heads, sequence, head_dim]``
decoder
``input_ids``                             ``[batch, decoder_sequence]``
``encoder_attention_mask``                ``[batch, sequence]``, if the encoder has one
``past_key_values.N.decoder.key``, …      ``[batch, heads, past_sequence, head_dim]``
``past_key_values.N.encoder.key``, …      ``[batch, heads, sequence, head_dim]``
``logits``                                ``[batch, decoder_sequence, vocab]``
``present.N.decoder.key``, …              ``[batch, heads, total_sequence, head_dim]``
========================================= =====================================================

These are optimum's names: https://github.com/huggingface/optimum-onnx ``optimum/exporters/onnx/base.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.cache import past_zeros, plain_layers, refuse_other_logits
from lora_export.base.capture.export import run_module
from lora_export.base.capture.traced import Traced, difference_of
from lora_export.base.parts import Part
from lora_export.errors import CheckpointError
from lora_export.graph.captured import (
    BATCH,
    DECODER_SEQUENCE,
    PAST_SEQUENCE,
    SEQUENCE,
    TOTAL_SEQUENCE,
    Captured,
)

if TYPE_CHECKING:
    import torch

    from lora_export.base.kinds.model_kind import ModelKind

_IDS, _MASK = "decoder_input_ids", "attention_mask"


def halve(model: Any, kind: ModelKind, inputs: Mapping[str, Any], *, part: Part, where: str) -> Traced:
    """Make a model compute one of its halves.

    Args:
        model: A transformers model; its ``forward`` is replaced. With a module around it instead, each weight
            of the graph would have another name than in the checkpoint.
        kind: Its kind.
        inputs: Inputs that the whole model runs with.
        part: ``encoder`` or ``decoder``.
        where: The folder, for messages.

    Raises:
        CheckpointError: The model has no cache of both kinds, a state beside it, or reads more of the encoder
            than that.
        GraphError: The model fails on the inputs.
    """
    name = type(model).__name__
    if _IDS not in inputs:
        raise _no_cache(name, where)
    outputs = run_module(model, {**inputs, "use_cache": True})
    cache = outputs.get("past_key_values")
    if not hasattr(cache, "cross_attention_cache") or outputs.get("encoder_last_hidden_state") is None:
        raise _no_cache(name, where)
    refuse_other_logits(outputs.get("logits"), inputs[_IDS], name, where)
    own, cross = (
        plain_layers(half, name, where) for half in (cache.self_attention_cache, cache.cross_attention_cache)
    )
    if part == "encoder":
        _encode_alone(model)
        return _encoder(kind, inputs, len(cross))
    _decode_alone(model, outputs["encoder_last_hidden_state"].shape[-1])
    traced = _decoder(kind, inputs, own, cross)
    _refuse_other_answers(model, traced.inputs, outputs["logits"], where)
    return traced


def describe_half(model: Any, kind: ModelKind, part: Part, dtype: str) -> Captured:
    """Return the record of a half's graph."""
    largest = kind.largest(model)
    if part == "encoder":
        sizes = {name: size for name, size in largest.items() if name != DECODER_SEQUENCE}
        return Captured(
            kind="encoder", kv_cache=False, dtype=dtype, vocab_size=kind.vocab_size(model), largest=sizes
        )
    if DECODER_SEQUENCE in largest:
        largest |= dict.fromkeys((PAST_SEQUENCE, TOTAL_SEQUENCE), largest[DECODER_SEQUENCE])
    return Captured(
        kind="decoder", kv_cache=True, dtype=dtype, vocab_size=kind.vocab_size(model), largest=largest
    )


def cross_states(outputs: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return the keys and values of the encoder's answer, by the graphs' names.

    Args:
        outputs: Outputs of a whole model with its cache.
        prefix: ``present`` or ``past_key_values``.
    """
    return _named(outputs["past_key_values"].cross_attention_cache.layers, prefix, "encoder")


def own_states(outputs: Any) -> dict[str, torch.Tensor]:
    """Return the keys and values of the decoder's own tokens, by the names of its graph's outputs."""
    return _named(outputs["past_key_values"].self_attention_cache.layers, "present", "decoder")


def _named(layers: Sequence[Any], prefix: str, half: str) -> dict[str, torch.Tensor]:
    return {
        name: state
        for number, layer in enumerate(layers)
        for name, state in zip(_names(number, prefix, half), (layer.keys, layer.values), strict=True)
    }


def _names(number: int, prefix: str, half: str) -> list[str]:
    return [f"{prefix}.{number}.{half}.{part}" for part in ("key", "value")]


def _encode_alone(model: Any) -> None:
    """Have a model return the encoder's half; the exporter drops what the rest computes."""
    import torch

    forward = model.forward

    def encoder(**given: Any) -> tuple[torch.Tensor, ...]:
        first = next(iter(given.values()))
        start = torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)
        outputs = forward(**given, decoder_input_ids=start, use_cache=True)
        return outputs["encoder_last_hidden_state"], *cross_states(outputs, "present").values()

    # The parameters of the model's own, by which the exporter calls it.
    encoder.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = encoder


def _decode_alone(model: Any, width: int) -> None:
    """Have a model read keys and values of both halves instead of the encoder's inputs."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    forward = model.forward

    def decoder(
        input_ids: Any, encoder_attention_mask: Any = None, past: Any = ()
    ) -> tuple[torch.Tensor, ...]:
        own, cross = (DynamicCache([layer[i : i + 2] for layer in past]) for i in (0, 2))
        key = past[0][2]
        # What the encoder answered is in the keys and values. Who reads it all the same gets no number.
        unknown = torch.full(
            (key.shape[0], key.shape[2], width), torch.nan, dtype=key.dtype, device=key.device
        )
        mask = {} if encoder_attention_mask is None else {_MASK: encoder_attention_mask}
        outputs = forward(
            **mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=unknown),
            decoder_input_ids=input_ids,
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
        )
        return outputs["logits"], *own_states(outputs).values()

    model.forward = decoder


def _encoder(kind: ModelKind, inputs: Mapping[str, Any], layers: int) -> Traced:
    from torch.export import Dim

    example = {name: value for name, value in inputs.items() if name != _IDS}
    return Traced(
        inputs=example,
        shapes={name: {axis: Dim(dim) for axis, dim in kind.axes(name).items()} for name in example},
        output_names=[
            "last_hidden_state",
            *(name for number in range(layers) for name in _names(number, "present", "encoder")),
        ],
    )


def _decoder(kind: ModelKind, inputs: Mapping[str, Any], own: Sequence[Any], cross: Sequence[Any]) -> Traced:
    from torch.export import Dim

    batch, past = Dim(BATCH), Dim(PAST_SEQUENCE)
    example: dict[str, Any] = {"input_ids": inputs[_IDS]}
    shapes: dict[str, Any] = {"input_ids": {0: batch, 1: Dim(DECODER_SEQUENCE)}}
    read: dict[int, Any] = {0: batch}
    if any(SEQUENCE in kind.axes(name).values() for name in inputs):
        read |= {2: Dim(SEQUENCE)}
    if _MASK in inputs:
        example["encoder_attention_mask"] = inputs[_MASK]
        shapes["encoder_attention_mask"] = {0: batch, 1: Dim(SEQUENCE)}
    names = [*example]
    example["past"] = [
        (past_zeros(one.keys), past_zeros(one.values), other.keys, other.values)
        for one, other in zip(own, cross, strict=True)
    ]
    shapes["past"] = [({0: batch, 2: past},) * 2 + (read,) * 2] * len(own)
    return Traced(
        inputs=example,
        shapes=shapes,
        input_names=[*names, *_cache_names(len(own), "past_key_values", ("decoder", "encoder"))],
        output_names=["logits", *_cache_names(len(own), "present", ("decoder",))],
        has_cache=True,
    )


def _cache_names(layers: int, prefix: str, halves: Sequence[str]) -> Iterator[str]:
    for number in range(layers):
        for half in halves:
            yield from _names(number, prefix, half)


def _refuse_other_answers(model: Any, example: Mapping[str, Any], wanted: torch.Tensor, where: str) -> None:
    """Refuse a model that reads the encoder's answer in another way than by keys and values of a cache."""
    if model.device.type == "meta":
        return
    empty = [(key[:, :, :0], value[:, :, :0], *cross) for key, value, *cross in example["past"]]
    gap = difference_of(run_module(model, {**example, "past": empty})[0], wanted)
    if gap is not None:
        raise CheckpointError(
            f"{where}: the decoder of {type(model).__name__} reads more of the encoder than keys and values "
            f"(without it, relative difference {gap:.2g})",
            "omit --kv-cache (kv_cache=True)",
        )


def _no_cache(name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {name} has no key-value cache of an encoder and a decoder",
        "omit --kv-cache (kv_cache=True)",
    )
