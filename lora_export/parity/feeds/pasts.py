"""Replace random key-value caches in feeds by caches that the model itself computed.

Random keys and values are far from those of real use: on SmolLM2-135M they raised float16's own error in the
logits to 0.04 to 0.2, and an error of the export could hide there. So the reference reads as many tokens as
the past has, without an adapter, and its cache of them becomes the past.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_export.adapter import Array
from lora_export.parity.feeds.made import Feed

_PAST, _PRESENT = "past_key_values.", "present."


def with_real_pasts(
    feeds: Sequence[Feed], run: Callable[[Mapping[str, Array]], Mapping[str, Array]], seed: int
) -> list[Feed]:
    """Return the feeds, with each past replaced by the reference's cache of random tokens.

    Args:
        feeds: Feeds from `make_feeds`.
        run: Function that runs the reference without an adapter.
        seed: Seed of the tokens, which are drawn from those of all feeds.
    """
    random = np.random.default_rng(seed)
    return [_with_real_past(feed, feeds, run, random) if feed.past else feed for feed in feeds]


def _with_real_past(
    feed: Feed,
    feeds: Sequence[Feed],
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    random: np.random.Generator,
) -> Feed:
    tokens = np.unique(np.concatenate([other.values["input_ids"].ravel() for other in feeds]))
    ids = feed.values["input_ids"]
    prefix: dict[str, Array] = {"input_ids": random.choice(tokens, (len(ids), feed.past)).astype(ids.dtype)}
    mask = feed.values.get("attention_mask")
    if mask is not None:
        prefix["attention_mask"] = mask[:, : feed.past]
    if "position_ids" in feed.values:
        kept = np.ones_like(prefix["input_ids"]) if mask is None else prefix["attention_mask"]
        positions = np.maximum(kept.cumsum(1) - 1, 0)
        prefix["position_ids"] = positions.astype(feed.values["position_ids"].dtype)
    pasts = {name: values for name, values in feed.values.items() if name.startswith(_PAST)}
    empty = {name: values[:, :, :0] for name, values in pasts.items()}
    found = run({**prefix, **empty})
    made = {
        name: found[_PRESENT + name.removeprefix(_PAST)].astype(values.dtype)
        for name, values in pasts.items()
    }
    return replace(feed, values={**feed.values, **made})
