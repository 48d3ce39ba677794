"""Run a whole vision–language model in PyTorch for what its parts have to answer (see `gap`).

* The graph of images runs on several numbers of them.
* The other two run on three texts with an image each, two of them padded, then on steps that go on with the
  cache, the last one with more images, on a text without an image, and on a long one. The graph of embeddings
  reads the features, and that of the language model the embeddings, that PyTorch's model had computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.vision_language import run_whole
from lora_export.base.kinds.model_kind import parameters_of
from lora_export.base.kinds.vision_language import features_of, has_image_types, image_types
from lora_export.errors import GraphError

if TYPE_CHECKING:
    import torch

# Tokens of the steps behind the first run.
_STEPS = (1, 2, 1)
_IDS, _MASK, _PIXELS = "input_ids", "attention_mask", "pixel_values"

Feeds = Mapping[str, Any]
Answers = list[Mapping[str, "torch.Tensor"]]


def whole_runs(model: Any, example: Feeds, *, longest: int) -> Iterator[dict[str, Any]]:
    """Yield texts with images, steps behind them, a text without an image, and a long one.

    Args:
        model: The model.
        example: Inputs that it runs with.
        longest: Tokens of the long text.
    """
    import torch

    ids, pixels = (torch.cat([example[name], example[name][:1]]) for name in (_IDS, _PIXELS))
    # Of the example's text, what has no image.
    words = example[_IDS][:, (example[_IDS] != model.config.image_token_id).all(0)]
    mask = torch.ones_like(ids)
    mask[1, :1], mask[2, -2:] = 0, 0
    yield _run(model, ids, mask, pixels=pixels)
    for count in _STEPS:
        new = torch.cat([words, words[:1].flip(1)])[:, 1 : 1 + count]
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        yield _run(model, ids, mask, new=count)
    again = ids[:, : example[_IDS].shape[1]]
    ids, mask = torch.cat([ids, again], 1), torch.cat([mask, torch.ones_like(again)], 1)
    yield _run(model, ids, mask, pixels=pixels, new=again.shape[1])
    yield _run(model, words, torch.ones_like(words))
    more = words[:1].repeat(1, 1 + longest // words.shape[1])
    long = torch.cat([example[_IDS][:1], more], 1)[:, : max(longest, example[_IDS].shape[1])]
    yield _run(model, long, torch.ones_like(long), pixels=example[_PIXELS][:1])


def feature_answers(model: Any, runs: Sequence[Feeds]) -> Answers:
    """Return what the graph of images has to answer."""
    return [{"image_features": features_of(model, run[_PIXELS])} for run in runs]


def embedding_answers(model: Any, runs: Sequence[Feeds]) -> Answers:
    """Return what the graph of embeddings has to answer, and the features that it reads."""
    import torch

    found = []
    for run, answer in zip(runs, text_answers(model, runs), strict=True):
        embeds = answer.get("inputs_embeds")
        if embeds is None:
            found.append(answer)
            continue
        features = (
            features_of(model, run[_PIXELS])
            if _PIXELS in run
            else torch.zeros(0, embeds.shape[-1], dtype=embeds.dtype)
        )
        found.append({"inputs_embeds": embeds, "image_features": features})
    return found


def text_answers(model: Any, runs: Sequence[Feeds]) -> Answers:
    """Return what the graph of the language model has to answer, and the embeddings that it reads."""
    found: Answers = []
    past: Any = None
    for run in runs:
        is_start = run[_IDS].shape[1] == run[_MASK].shape[1]
        if past is None and not is_start:
            found.append({})
            continue
        try:
            outputs, embeds = run_whole(model, {**run, "past_key_values": None if is_start else past})
        except GraphError:  # of a size that the model does not take
            past = None
            found.append({})
            continue
        past = outputs["past_key_values"]
        found.append({"logits": outputs["logits"], "inputs_embeds": embeds})
    return found


def _run(model: Any, ids: Any, mask: Any, *, pixels: Any = None, new: int | None = None) -> dict[str, Any]:
    """Return the inputs of a run whose last tokens, or all, are new."""
    count = ids.shape[1] if new is None else new
    run = {_IDS: ids[:, -count:], _MASK: mask}
    if pixels is not None:
        run[_PIXELS] = pixels
    if "position_ids" in parameters_of(model):
        run["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -count:]
    if has_image_types(model):
        run["token_type_ids"] = image_types(model, ids)
    return run
