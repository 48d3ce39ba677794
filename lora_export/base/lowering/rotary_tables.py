"""Compute the cosines and sines of all positions, for an attention that turns queries and keys itself.

``GroupQueryAttention`` takes tables ``[positions, size / 2]`` and the positions that it counts: those of a
row's tokens. Rules, without which a rotary embedding stays a node of its own:

1. The angles depend on ``position_ids`` alone, each on its own position: not on how many there are, as with
   dynamic scaling, nor on the cache. They are computed for all positions, and for some in other company.
2. The number of positions is known, and the tables take at most 128 MB.
3. A head has a multiple of 16 values, as ONNX Runtime wants it here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.base.lowering.evaluating import CannotCompute, opened_for
from lora_export.graph.captured import TOTAL_SEQUENCE, Captured

_POSITIONS, _PAST = "position_ids", "past_key_values."
# Tokens in the cache of positions that are tried alone.
_BEFORE = 3
_MOST_BYTES = 128 << 20
# Difference of one cosine that is computed twice: a vector's last numbers may be computed one by one.
_FLOAT_STEP = 1e-6
_STEPS = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
_HALF = 8
_NAMES = ("lowered.cosines", "lowered.sines")


class RotaryTables:
    """Tables of a graph's rotary embeddings, made where they are asked for.

    Args:
        model: The graph.
        captured: Its record.
    """

    def __init__(self, model: ir.Model, captured: Captured) -> None:
        self._model, self._positions = model, captured.largest.get(TOTAL_SEQUENCE)
        self._made: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}

    def of(self, query: ir.Node, key: ir.Node) -> tuple[ir.Value, ir.Value] | None:
        """Return the tables of cosines and sines for two embeddings; None if a rule does not hold."""
        angles = query.inputs[1], query.inputs[2]
        if angles != (key.inputs[1], key.inputs[2]) or query.attributes != key.attributes:
            return None
        cosine, sine = angles
        if cosine is None or sine is None or set(query.attributes) - {"interleaved"}:
            return None
        if (cosine, sine) not in self._made:
            self._made[cosine, sine] = self._tables(cosine, sine)
        return self._made[cosine, sine]

    def _tables(self, cosine: ir.Value, sine: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        half = None if cosine.shape is None else cosine.shape[-1]
        count, dtype = self._positions, cosine.dtype
        if count is None or dtype is None or not isinstance(half, int) or half % _HALF:
            return None
        if 2 * count * half * dtype.itemsize > _MOST_BYTES:
            return None
        try:
            session = opened_for(self._model, [cosine, sine])
        except CannotCompute:
            return None
        others = {port.name for port in session.get_inputs()} - {_POSITIONS}
        if any(not name.startswith(_PAST) for name in others):
            return None

        def asked(places: Array, past: int) -> list[Array]:
            """Return the angles; a trace may take the number of rows from a cache."""
            empty = np.zeros((len(places), 1, past, 1), np.float32)
            return list(session.run(None, {_POSITIONS: places} | dict.fromkeys(others, empty)))

        step = _STEPS.get(dtype, _FLOAT_STEP)
        every = asked(np.arange(count)[None], 0)
        for places in ([[0, 1, 2]], [[count - 1]], [[count // 2, 0], [1, count // 3]]):
            alone = asked(np.array(places), _BEFORE)
            pairs = zip(alone, every, strict=True)
            if not all(np.allclose(one, table[0][places], rtol=0, atol=step) for one, table in pairs):
                return None
        return self._registered(every[0][0], dtype, 0), self._registered(every[1][0], dtype, 1)

    def _registered(self, table: Array, dtype: ir.DataType, which: int) -> ir.Value:
        name = f"{_NAMES[which]}.{len(self._made)}"
        value = ir.val(name, const_value=ir.tensor(table.astype(dtype.numpy()), dtype=dtype, name=name))
        self._model.graph.register_initializer(value)
        return value
