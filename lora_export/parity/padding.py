"""Tell which values of an answer are read from padding: they mean nothing, and implementations differ there.

A model may take one token's state for a whole text: the first one's (ModernBERT), or that of the largest id
(CLIP). In a row that is padded on that side it is the state of padding, whose window of attention may be
padding as a whole; what PyTorch and ONNX Runtime compute of no token is their own affair. Where an output has
a position for each token, the mask tells (`metrics.valid_positions`). Elsewhere the model does: with other
ids in the padding, such values are others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lora_export.adapter import Array
from lora_export.parity.feeds.feed import Feed
from lora_export.parity.judge.metrics import valid_positions
from lora_export.parity.laws import masks_of

Outputs = Mapping[str, Array]
# Relative to an output's largest value: float64's and float32's rounding is below it.
_SAME = 1e-6


def read_from_padding(feed: Feed, answers: Outputs, run: Callable[[Feed], Outputs]) -> dict[str, Array]:
    """Return which values of a reference's outputs are read from padding, bool, for outputs that have some.

    Args:
        feed: The feed.
        answers: Outputs of the reference for it.
        run: Function that runs the reference on another feed.
    """
    pooled = [
        name
        for name, values in answers.items()
        if values.dtype.kind == "f" and valid_positions(values.shape, masks_of(feed, name)) is None
    ]
    other = _other_padding(feed) if pooled else None
    if other is None:
        return {}
    again = run(other)
    found = {}
    for name in pooled:
        exact = answers[name].astype(np.float64)
        limit = _SAME * np.abs(np.nan_to_num(exact)).max(initial=0.0)
        changed = ~(np.abs(again[name].astype(np.float64) - exact) <= limit)
        if changed.any():
            found[name] = changed
    return found


def without_padding(
    actual: Outputs,
    expected: Outputs,
    padding: Mapping[str, Array],
    pairs: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """Return outputs with the expected values where these are read from padding.

    Args:
        actual: The outputs.
        expected: The reference's.
        padding: The reference's output → what is read from padding, for some.
        pairs: Output → the reference's; None: of the same names.
    """
    names = pairs if pairs is not None else {name: name for name in actual}
    replaced = {
        name: np.where(padding[other], expected[other], actual[name])
        for name, other in names.items()
        if other in padding
    }
    return {**actual, **replaced}


def _other_padding(feed: Feed) -> Feed | None:
    """Return the feed with other ids in its padding; None if it has no padding with ids."""
    values = dict(feed.values)
    for prefix in ("", "decoder_"):
        ids, mask = values.get(f"{prefix}input_ids"), values.get(f"{prefix}attention_mask")
        if ids is None or mask is None or mask.ndim != 2 or ids.ndim != 2:
            continue
        padding = mask[:, mask.shape[1] - ids.shape[1] :] == 0
        least, count = ids.min(), int(ids.max()) - int(ids.min()) + 1
        if padding.any() and count > 1:
            # Ids that the feed has stay within the vocabulary.
            values[f"{prefix}input_ids"] = np.where(padding, least + (ids - least + 1) % count, ids)
    changed = any(values[name] is not given for name, given in feed.values.items())
    return Feed(f"{feed.label}, other padding", values, feed.shared) if changed else None
