"""Run a whole encoder–decoder in PyTorch for what its halves have to answer (see `gap`).

* The encoder's half runs on all that a model without a cache does, padding included.
* The decoder's half runs on three rows, two of which have padding in the encoder's tokens, then on steps
  that go on with its cache. It reads keys and values that PyTorch's model computed from the encoder's answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.export import run_module
from lora_export.base.capture.halves import cross_states, own_states
from lora_export.errors import GraphError

if TYPE_CHECKING:
    import torch

# Input of the decoder's graph → the model's name of it.
DECODER_INPUTS = {"input_ids": "decoder_input_ids", "encoder_attention_mask": "attention_mask"}
# Tokens of the steps behind the first run.
_STEPS = (1, 2, 1)

Feeds = Mapping[str, Any]


def decoder_runs(example: Feeds) -> Iterator[dict[str, Any]]:
    """Yield a run with the encoder's inputs, and steps behind it.

    Args:
        example: Inputs that the whole model runs with.
    """
    import torch

    first = {name: torch.cat([values, values[:1].flip(-1)]) for name, values in example.items()}
    mask = first.get("attention_mask")
    if mask is not None:
        mask[1, :3], mask[2, -2:] = 0, 0
    yield first
    for tokens in _STEPS:
        step = {"decoder_input_ids": first["decoder_input_ids"][:, 1 : 1 + tokens]}
        yield step if mask is None else {**step, "attention_mask": mask}


def is_start(run: Feeds) -> bool:
    """Return whether a run has inputs of the encoder, and begins with an empty cache."""
    return bool(run.keys() - set(DECODER_INPUTS.values()))


def encoder_answers(model: Any, runs: Sequence[Feeds]) -> list[Mapping[str, torch.Tensor]]:
    """Return what the encoder's half has to answer; nothing where the model does not take the sizes."""
    found: list[Mapping[str, torch.Tensor]] = []
    for run in runs:
        try:
            outputs = run_module(model, {**run, "use_cache": True})
        except GraphError:  # of a size that the model does not take
            found.append({})
            continue
        hidden = outputs["encoder_last_hidden_state"]
        found.append({"last_hidden_state": hidden, **cross_states(outputs, "present")})
    return found


def decoder_answers(model: Any, runs: Sequence[Feeds]) -> list[Mapping[str, torch.Tensor]]:
    """Return what the decoder's half has to answer, and what it reads of the encoder."""
    found: list[Mapping[str, torch.Tensor]] = []
    before: Any = None
    for run in runs:
        more: dict[str, Any] = {"use_cache": True}
        if not is_start(run):
            if before is None:
                found.append({})
                continue
            more["past_key_values"] = before["past_key_values"]
            more["encoder_outputs"] = (before["encoder_last_hidden_state"],)
        try:
            before = run_module(model, {**run, **more})
        except GraphError:  # of a size that the model does not take
            before = None
            found.append({})
            continue
        found.append(
            {"logits": before["logits"], **own_states(before), **cross_states(before, "past_key_values")}
        )
    return found
