"""The record of a captured graph's model: its kind, and the largest sizes of its dimensions.

It is two entries of the graph's own metadata, each JSON, so that the graph can be compiled or served without
the checkpoint: `MODEL_KEY` ``{"kind", "kv_cache", "dtype", "vocab_size"}`` and `DIMS_KEY` ``{"sequence":
{"max": 2048}, …}``, by the names that the graph's inputs give their dimensions. A dimension without a limit
has no entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_export.errors import GraphError
from lora_export.untrusted.documents import json_of
from lora_export.untrusted.fields import FieldError, Size, check_plain, from_plain

MODEL_KEY = "lora_export.model"
DIMS_KEY = "lora_export.dims"
_AGAIN = "capture the checkpoint again"
DTYPES = ("float32", "float16", "bfloat16")
BATCH, SEQUENCE, DECODER_SEQUENCE = "batch", "sequence", "decoder_sequence"
PAST_SEQUENCE, TOTAL_SEQUENCE = "past_sequence", "total_sequence"
Kind = Literal["decoder", "encoder", "vision", "encoder-decoder"]


@dataclass(frozen=True)
class _Dim:
    """An entry of `DIMS_KEY`."""

    max: Size


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The record of a captured graph.

    Attributes:
        kind: Kind of the model.
        kv_cache: True if keys and values of past tokens are inputs and outputs.
        dtype: Type that it computes in, one of `DTYPES`.
        vocab_size: Number of token ids, if it reads tokens.
        largest: Name of a dimension → the largest size that the model has positions for.
    """

    kind: Kind
    kv_cache: bool
    dtype: str
    vocab_size: Size | None = None
    largest: Mapping[str, Size] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Return the entries of a graph's metadata."""
        model: dict[str, object] = {"kind": self.kind, "kv_cache": self.kv_cache, "dtype": self.dtype}
        if self.vocab_size is not None:
            model["vocab_size"] = self.vocab_size
        dims = {name: {"max": size} for name, size in self.largest.items()}
        return {MODEL_KEY: json.dumps(model, sort_keys=True), DIMS_KEY: json.dumps(dims, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Captured | None:
        """Read the entries that `to_metadata` wrote; None if we did not capture the graph.

        Args:
            metadata: ``metadata_props`` of an ONNX file, or ONNX Runtime's ``custom_metadata_map``.

        Raises:
            GraphError: The entries are damaged.
        """
        if MODEL_KEY not in metadata:
            return None
        model, dims = (
            json_of(metadata.get(key, "{}"), f"the graph's metadata entry {key!r}", GraphError, _AGAIN)
            for key in (MODEL_KEY, DIMS_KEY)
        )
        problems: list[str] = []
        largest = {}
        try:
            found = check_plain(Mapping[str, _Dim], dims, "dims")
            largest = {name: dim.max for name, dim in found.items()}
        except FieldError as error:
            problems += error.problems
        try:
            # Written flat: the sizes have an entry of their own.
            record = from_plain(cls, {**model, "largest": largest} if isinstance(model, dict) else model)
            if record.dtype not in DTYPES:
                problems.append(f"dtype: {record.dtype!r}, wanted one of {', '.join(DTYPES)}")
        except FieldError as error:
            problems += error.problems
        if problems:
            raise GraphError("the graph's record of its model is damaged", _AGAIN, problems)
        return record
