"""Roles of the varying dimensions of a graph's inputs: batch, sequence, past, total.

A role comes from the dimension's name in the graph (exporters agree on few names, so several spellings are
known), else from the input that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_export.graph.captured import BATCH, PAST_SEQUENCE, SAMPLES, SEQUENCE, TOTAL_SEQUENCE

_TEXT_INPUTS = re.compile(r"(^|[._/])(input_ids|token_type_ids|position_ids|attention_mask|inputs_embeds)$")
_PAST_INPUTS = re.compile(r"^past(_key_values|_key|_value|\b)")


def role_of(name: str, dims: Sequence[int | str | None], axis: int) -> str | None:
    """Return the role of a varying dimension of an input, or None if it is unknown.

    Args:
        name: Name of the input.
        dims: Its dimensions: sizes and symbols; None where it has neither.
        axis: Index of the dimension.
    """
    dim = str(dims[axis] or "")
    return _role_by_name(dim) or (None if "*" in dim else _role_by_input(name, axis))


def _role_by_name(symbol: str) -> str | None:
    text = symbol.lower()
    # An exporter's placeholder repeats the input's name, which tells nothing about the dimension.
    # A multiple of a batch is not itself a batch.
    if "dynamic_axes" in text or "*" in text:
        return None
    if "total" in text or ("past" in text and "+" in text):
        return TOTAL_SEQUENCE
    if "past" in text or "cache" in text:
        return PAST_SEQUENCE
    if text.startswith("batch") or text in ("b", "n"):
        return BATCH
    if text == SAMPLES:
        return SAMPLES
    return SEQUENCE if "seq" in text else None


def is_batch(dim: int | str | None) -> bool:
    """Return whether a dimension's name says that it counts rows: ``batch``, ``image_batch``."""
    return isinstance(dim, str) and ("batch" in dim.lower() or _role_by_name(dim) == BATCH)


def _role_by_input(name: str, axis: int) -> str | None:
    if _PAST_INPUTS.match(name):
        return {0: BATCH, 2: PAST_SEQUENCE}.get(axis)
    if axis == 0:
        return BATCH
    if _TEXT_INPUTS.search(name) and axis == 1:
        return SEQUENCE
    return None
