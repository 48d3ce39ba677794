"""Refuse feeds that a graph would answer wrongly: it takes rows that are padded on the right only.

``GroupQueryAttention`` counts the ones of a row's mask, and takes so many first tokens of the row. So

1. a prompt's row begins with a token and has its padding at the end;
2. behind a past, all new tokens are the row's own, and the first token of the past is;
3. several new tokens behind a past are for one row (ONNX Runtime refuses more);
4. the mask has ones and zeros, as it is added up;
5. positions count a row's tokens, as the operator does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_export.adapter import Array

_MASK, _IDS, _POSITIONS = "attention_mask", "input_ids", "position_ids"


def padding_problem(feeds: Mapping[str, Any]) -> str:
    """Return what is wrong with the padding; an empty text if nothing is, or if the mask is on a GPU.

    Args:
        feeds: Input name → array, or `onnxruntime.OrtValue`.
    """
    mask, ids = _on_host(feeds.get(_MASK)), feeds.get(_IDS)
    if mask is None or ids is None or mask.ndim != 2:
        return ""
    tokens = int((ids.shape if isinstance(ids, np.ndarray) else ids.shape())[1])
    past = mask.shape[1] - tokens
    if not np.isin(mask, (0, 1)).all():
        return f"{_MASK}: other numbers than 0 and 1"  # rule 4
    if not mask[:, 0].all():
        return f"{_MASK}: row {_first(mask[:, 0] == 0)} does not begin with a token, but padding"
    gaps: Array = np.any(np.diff(mask.astype(np.int8), axis=1) > 0, axis=1)
    padded: Array = np.any(mask[:, past:] == 0, axis=1)
    if past <= 0 and gaps.any():
        return f"{_MASK}: row {_first(gaps)} has padding between its tokens"
    if past > 0 and padded.any():
        return f"{_MASK}: a new token of row {_first(padded)} is padding, behind a past"
    if past > 0 and tokens > 1 and len(mask) > 1:
        return f"{_IDS}: {tokens} new tokens of {len(mask)} rows behind a past; the graph takes one of each"
    positions = _on_host(feeds.get(_POSITIONS))
    if positions is None or positions.shape != (len(mask), tokens):
        return ""
    counted = mask.cumsum(1) - 1
    others: Array = np.any((counted[:, past:] != positions) & (mask[:, past:] == 1), axis=1)
    return f"{_POSITIONS}: those of row {_first(others)} do not count its tokens" if others.any() else ""


def _on_host(value: Any) -> Array | None:
    if value is None or isinstance(value, np.ndarray):
        return value
    found: Array | None = value.numpy() if value.device_name() == "cpu" else None
    return found


def _first(rows: Array) -> int:
    return int(rows.argmax()) + 1
