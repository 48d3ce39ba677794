"""The record of a captured graph's model: its kind, and the largest sizes of its dimensions.

It is two entries of the graph's own metadata, each JSON, so that the graph can be compiled or served without
the checkpoint: `MODEL_KEY` ``{"kind", "kv_cache", "dtype", "vocab_size", "padding"}`` and `DIMS_KEY`
``{"sequence": {"max": 2048}, "samples": {"min": 720}, …}``, by the names that the graph's inputs give their
dimensions. A dimension without a limit has no entry; ``padding`` stands there if it is not ``any``.
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
# Models with two batches: every text is compared with every image.
TEXT_BATCH, IMAGE_BATCH = "text_batch", "image_batch"
SAMPLES = "samples"
# Of diffusion models: latents, videos and images; patches of latents that are given as a sequence, and text.
HEIGHT, WIDTH, FRAMES = SIDES = ("height", "width", "frames")
IMAGE_SEQUENCE, TEXT_SEQUENCE = "image_sequence", "text_sequence"
# Of all images of a batch together, in the places of as many tokens of its texts.
IMAGE_TOKENS = "image_tokens"
# One for all rows, or one a row.
TIMESTEPS = "timesteps"
Kind = Literal[
    "decoder",
    "encoder",
    "vision",
    "embedding",
    "audio",
    "text-image",
    "encoder-decoder",
    "denoiser",
    "vae-decoder",
    "vae-encoder",
]


@dataclass(frozen=True)
class _Dim:
    """An entry of `DIMS_KEY`."""

    max: Size | None = None
    min: Size | None = None


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The record of a captured graph.

    Attributes:
        kind: Kind of the model.
        kv_cache: True if keys and values of past tokens are inputs and outputs.
        dtype: Type that it computes in, one of `DTYPES`.
        vocab_size: Number of token ids, if it reads tokens.
        largest: Name of a dimension → the largest size that the model has positions for.
        smallest: Name of a dimension → the smallest size that the model can read, if that is not 1.
        padding: Sides on which rows may be padded, ``any`` or ``right``. With ``right`` several tokens behind
            a past are for one row, a new token behind a past is never padding, and positions count a row's
            tokens, whatever ``position_ids`` say.
    """

    kind: Kind
    kv_cache: bool
    dtype: str
    vocab_size: Size | None = None
    largest: Mapping[str, Size] = field(default_factory=dict)
    smallest: Mapping[str, Size] = field(default_factory=dict)
    padding: Literal["any", "right"] = "any"

    def to_metadata(self) -> dict[str, str]:
        """Return the entries of a graph's metadata."""
        model: dict[str, object] = {"kind": self.kind, "kv_cache": self.kv_cache, "dtype": self.dtype}
        if self.vocab_size is not None:
            model["vocab_size"] = self.vocab_size
        if self.padding != "any":
            model["padding"] = self.padding
        dims: dict[str, dict[str, int]] = {}
        for limit, sizes in (("max", self.largest), ("min", self.smallest)):
            for name, size in sizes.items():
                dims.setdefault(name, {})[limit] = size
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
        largest, smallest = {}, {}
        try:
            found = check_plain(Mapping[str, _Dim], dims, "dims")
            problems += [
                f"dims.{name}: no max and no min" for name, dim in found.items() if dim.max is dim.min is None
            ]
            largest = {name: dim.max for name, dim in found.items() if dim.max is not None}
            smallest = {name: dim.min for name, dim in found.items() if dim.min is not None}
        except FieldError as error:
            problems += error.problems
        try:
            # Written flat: the sizes have an entry of their own.
            record = from_plain(
                cls, {**model, "largest": largest, "smallest": smallest} if isinstance(model, dict) else model
            )
            if record.dtype not in DTYPES:
                problems.append(f"dtype: {record.dtype!r}, wanted one of {', '.join(DTYPES)}")
        except FieldError as error:
            problems += error.problems
        if problems:
            raise GraphError("the graph's record of its model is damaged", _AGAIN, problems)
        return record
