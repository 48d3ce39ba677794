"""Run graphs with a key-value cache as a server does, in several calls, and what PyTorch says in one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

Array = tiny.Array
BATCH, TOKENS = 3, 9
# One call; prefill, then one token, then three; every token alone.
CHAINS = ((TOKENS,), (5, 1, 3), (1,) * TOKENS)


def prompt(tokens: int = TOKENS) -> dict[str, Array]:
    """Return three rows of token ids, two of them padded on the left, and where each row's tokens stand."""
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, (BATCH, tokens))
    mask = np.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }


def reference(model: Any, tokens: int = TOKENS) -> Array:
    """Return a model's logits for each token that is no padding, from one call without a cache."""
    given = prompt(tokens)
    plain = getattr(model, "get_base_model", lambda: model)()
    takes = inspect.signature(plain.forward).parameters
    with torch.no_grad():
        inputs = {name: torch.from_numpy(value) for name, value in given.items() if name in takes}
        logits = model.eval()(**inputs, use_cache=False).logits
    return logits.float().numpy()[given["attention_mask"] == 1]


class CachedGraph:
    """A graph in onnxruntime, whose cache goes from call to call."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]

    def empty_past(self) -> dict[str, Array]:
        """Return a cache of no tokens."""
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            value.name: np.zeros([BATCH, value.shape[1], 0, value.shape[3]], kinds[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def call(
        self, start: int, stop: int, past: Mapping[str, Array], more: Mapping[str, Array], tokens: int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the logits of tokens ``start`` to ``stop``, and the cache with them in it."""
        given, known = prompt(tokens), {value.name for value in self.session.get_inputs()}
        feeds = {name: value[:, start:stop] for name, value in given.items() if name in known}
        feeds["attention_mask"] = given["attention_mask"][:, :stop]
        results = self.session.run(self.outputs, feeds | dict(past) | dict(more))
        found = dict(zip(self.outputs, results, strict=True))
        logits = found.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}

    def run(
        self, parts: Sequence[int], more: Mapping[str, Array] | None = None, tokens: int = TOKENS
    ) -> Array:
        """Return what `reference` does, from a call for each part of the prompt."""
        past, start, logits = self.empty_past(), 0, []
        for part in parts:
            answer, past = self.call(start, start + part, past, more or {}, tokens)
            logits.append(answer)
            start += part
        assert start == tokens
        mask = prompt(tokens)["attention_mask"]
        return np.concatenate(logits, 1).astype(np.float32)[mask == 1]
