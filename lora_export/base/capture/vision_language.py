"""Take a vision–language model apart into three graphs, under the names that onnxruntime-genai uses.

The graph of the language model reads embeddings, so it is one for texts with images, without, and for later
tokens.

=================================== =====================================================
vision
``pixel_values``                    ``[image_batch, channels, height, width]``
``image_features``                  ``[image_tokens, width]``, of all images
embedding
``input_ids``                       ``[batch, sequence]``
``image_features``                  ``[image_tokens, width]``, none without an image
``inputs_embeds``                   ``[batch, sequence, width]``
text                                as a decoder's (`cache`), but for
``inputs_embeds``                   in place of ``input_ids``
``input_ids``                       also, of a model whose images' tokens see each other
=================================== =====================================================

Names: https://github.com/microsoft/onnxruntime-genai ``src/config.h``; it gives the decoder ``input_ids`` if
there is such an input (``src/models/multi_modal.cpp``).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.cache import with_cache
from lora_export.base.capture.export import run_module
from lora_export.base.capture.traced import Traced, difference_of
from lora_export.base.kinds.vision_language import (
    TEXT_ALONE,
    features_of,
    has_image_types,
    image_types,
    whole_only,
)
from lora_export.base.parts import Part
from lora_export.errors import CheckpointError
from lora_export.graph.captured import (
    BATCH,
    IMAGE_BATCH,
    IMAGE_TOKENS,
    PAST_SEQUENCE,
    SEQUENCE,
    TOTAL_SEQUENCE,
    Captured,
)

if TYPE_CHECKING:
    import torch

    from lora_export.base.kinds.model_kind import ModelKind

_PIXELS, _FEATURES, _EMBEDS, _IDS = "pixel_values", "image_features", "inputs_embeds", "input_ids"
# Variable that transformers looks at (``utils/import_utils.py``, ``torch_compilable_check``).
_CHECK = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def take_part(model: Any, inputs: Mapping[str, Any], *, part: Part, where: str) -> Traced:
    """Make a model compute one of its parts.

    Args:
        model: A transformers model; its ``forward`` is replaced. With a module around it instead, each weight
            of the graph would have another name than in the checkpoint.
        inputs: Inputs that the whole model runs with.
        part: ``vision``, ``embedding`` or ``text``.
        where: The folder, for messages.

    Raises:
        CheckpointError: The model has no such parts, or its answers are not made by them alone.
        GraphError: The model fails on the inputs.
    """
    if not hasattr(model.base_model, "language_model"):
        raise whole_only(where, type(model).__name__, "it has no language model that reads embeddings")
    if part == "vision":
        return _vision(model, inputs[_PIXELS])
    outputs, embeds = run_whole(model, inputs)
    if part == "embedding":
        traced = _embedding(model, inputs, features_of(model, inputs[_PIXELS]))
        _refuse_other_answers(model, traced.inputs, embeds, where)
        return traced
    return _text(model, inputs, outputs, embeds, where=where)


def describe_part(model: Any, kind: ModelKind, part: Part, dtype: str) -> Captured:
    """Return the record of a part's graph."""
    if part == "vision":
        return Captured(kind="vision", kv_cache=False, dtype=dtype)
    largest, vocab_size = kind.largest(model), kind.vocab_size(model)
    if part == "embedding":
        return Captured(kind="embedding", kv_cache=False, dtype=dtype, vocab_size=vocab_size, largest=largest)
    if SEQUENCE in largest:
        largest |= dict.fromkeys((PAST_SEQUENCE, TOTAL_SEQUENCE), largest[SEQUENCE])
    return Captured(kind="decoder", kv_cache=True, dtype=dtype, vocab_size=vocab_size, largest=largest)


def run_whole(model: Any, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], torch.Tensor]:
    """Run a whole model with its cache; return its outputs, and the embeddings that its language model got.

    Raises:
        GraphError: The model fails on the inputs.
    """
    seen: list[Any] = []

    def record(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen.append(named[_EMBEDS])

    hook = model.base_model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        outputs = run_module(model, {**inputs, "use_cache": True})
    finally:
        hook.remove()
    return outputs, seen[-1]


def _vision(model: Any, pixels: torch.Tensor) -> Traced:
    from torch.export import Dim

    def vision(pixel_values: torch.Tensor) -> torch.Tensor:
        return features_of(model, pixel_values)

    model.forward = vision
    return Traced(inputs={_PIXELS: pixels}, shapes={_PIXELS: {0: Dim(IMAGE_BATCH)}}, output_names=[_FEATURES])


def _embedding(model: Any, inputs: Mapping[str, Any], features: torch.Tensor) -> Traced:
    """Have a model return what it gives its language model, made from features instead of pixels."""
    from torch.export import Dim
    from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

    inner = model.base_model
    found = inner.get_image_features(pixel_values=inputs[_PIXELS], return_dict=True).pooler_output
    is_list = isinstance(found, tuple | list)

    def unchanged(*, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    def embedding(input_ids: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
        def given(*_: Any, **__: Any) -> Any:
            return BaseModelOutputWithPooling(pooler_output=[image_features] if is_list else image_features)

        inner.get_image_features = given
        with _unchecked():
            # The pixels are only looked at for whether there are any.
            found = inner(input_ids=input_ids, pixel_values=image_features, use_cache=False)
        return found.last_hidden_state

    inner.language_model.forward = unchanged
    model.forward = embedding
    return Traced(
        inputs={_IDS: inputs[_IDS], _FEATURES: features},
        shapes={_IDS: {0: Dim(BATCH), 1: Dim(SEQUENCE)}, _FEATURES: {0: Dim(IMAGE_TOKENS)}},
        output_names=[_EMBEDS],
    )


def _text(
    model: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], embeds: torch.Tensor, *, where: str
) -> Traced:
    """Have a model read embeddings and its cache; refuse it if it then answers otherwise."""
    _read_embeddings(model)
    ids = {_IDS: inputs[_IDS]} if has_image_types(model) else {}
    traced = with_cache(model, inputs, outputs, where, read={**ids, _EMBEDS: embeds})
    example = dict(traced.inputs)
    example["past"] = [(key[:, :, :0], value[:, :, :0]) for key, value in example["past"]]
    example["attention_mask"] = inputs["attention_mask"]
    if "position_ids" in example:
        example["position_ids"] = example["position_ids"] - example["position_ids"].min()
    _refuse_other_answers(model, example, outputs["logits"], where)
    return traced


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Switch off transformers' comparison of the numbers of features and image tokens: ONNX has no such."""
    before = os.environ.get(_CHECK)
    os.environ[_CHECK] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CHECK]
        else:
            os.environ[_CHECK] = before


def _read_embeddings(model: Any) -> None:
    """Have a model that reads token types find them from its ids, which it reads beside embeddings."""
    import torch

    forward = model.forward

    @functools.wraps(forward)
    def text(*, input_ids: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        if input_ids is not None:
            # Types are those of all tokens. Images among those of the past have seen each other.
            past = input_ids.new_zeros(input_ids.shape[0], past_key_values.get_seq_length())
            given["token_type_ids"] = torch.cat([past, image_types(model, input_ids)], 1)
        return forward(**given, past_key_values=past_key_values)

    model.forward = text


def _refuse_other_answers(model: Any, example: Mapping[str, Any], wanted: torch.Tensor, where: str) -> None:
    """Refuse a model of whose answer something is computed outside of its parts."""
    if model.device.type == "meta":
        return
    found = run_module(model, example)
    gap = difference_of(found[0] if isinstance(found, tuple) else found, wanted)
    if gap is not None:
        raise CheckpointError(
            f"{where}: {type(model).__name__} computes more than its parts do, vision, embedding and text "
            f"(relative difference {gap:.2g})",
            TEXT_ALONE,
        )
