"""Tell a causal mask from others by its values, for small inputs and for one token behind all others.

What a graph computes its mask with depends on the model and on transformers' version, what comes out does
not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.base.lowering.evaluating import CannotCompute, opened_for
from lora_export.graph.captured import TOTAL_SEQUENCE, Captured

if TYPE_CHECKING:
    import onnxruntime as ort

# Rows, tokens before and new tokens of the inputs that are tried.
_TRIALS = ((3, 0, 7), (3, 5, 1), (1, 5, 4))
_PADDED = 2
# Tokens of the long row: as many as the model has positions for, or so many.
_MOST = 1 << 20


def is_causal(model: ir.Model, mask: ir.Value, captured: Captured) -> bool:
    """Return whether a mask lets each token see itself and all tokens before it, except padding.

    Args:
        model: The graph, whose inputs have the names of `capture.cache`.
        mask: The mask of an attention, ``[batch, 1, sequence, total_sequence]``.
        captured: The graph's record, with the number of positions.
    """
    if mask.dtype != ir.DataType.BOOL:
        return False
    try:
        session = opened_for(model, [mask])
    except CannotCompute:
        return False
    longest = min(captured.largest.get(TOTAL_SEQUENCE, _MOST), _MOST)
    return all(_agrees(session, *sizes) for sizes in (*_TRIALS, (1, longest - 1, 1)))


def _agrees(session: ort.InferenceSession, rows: int, past: int, tokens: int) -> bool:
    """Return whether the mask is causal for inputs of some sizes; a prompt is padded on the right."""
    given = np.ones((rows, past + tokens), np.int64)
    if rows > 1 and not past:
        given[-1, -_PADDED:] = 0
    feeds = {port.name: _values(port.name, given, past) for port in session.get_inputs()}
    (found,) = session.run(None, feeds)
    queries, keys = np.arange(past, past + tokens), np.arange(past + tokens)
    wanted = (keys <= queries[:, None]) & given[:, None, None, :].astype(bool)
    read = given[:, past:].astype(bool)
    return found.shape == wanted.shape and bool((found == wanted)[:, 0][read].all())


def _values(name: str, given: Array, past: int) -> Array:
    rows, tokens = len(given), given.shape[1] - past
    if name == "attention_mask":
        return given
    if name == "position_ids":
        places: Array = np.maximum(given.cumsum(1) - 1, 0)
        return places[:, past:]
    if name == "input_ids":
        return np.zeros((rows, tokens), np.int64)
    return np.zeros((rows, 1, past, 1), np.float32)
