"""Define the options of all modes on the base that they read and the files that they write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lora_export.base.lowering import Runtime
from lora_export.base.parts import Part
from lora_export.base.reads import CheckpointChoice


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """Options of all modes that write a graph.

    Attributes:
        checkpoint: Folder that an ONNX file was exported from; None for the one that an adapter names as its
            base, if it is on this machine; False for none.
        dtype: Dtype in which a folder is captured; float32 if None.
        kv_cache: Capture a decoder with its key-value cache.
        fused: Capture attention, rotary embeddings and RMS norms as one node each.
        runtime: Runtime that a captured folder is lowered for.
        quantize: Type to quantise the written weights to, ``int4`` or ``int8``; None: they stay floats.
        share_base: Leave unchanged weights in the base's files.
        allow_unmatched: Leave out parameters that have no site.
        force: Replace existing outputs.
        dry_run: Write nothing.
        progress: Function that is called with the number of bytes just written.
        part: Use of a captured model in a pipeline, if its graph differs for it; not a mode's argument.
        packed: Capture queries, keys and values in one product, where the runtime has that; not a mode's
            argument either.
    """

    checkpoint: CheckpointChoice = None
    dtype: str | None = None
    kv_cache: bool = False
    fused: bool = False
    runtime: Runtime = "portable"
    quantize: str | None = None
    share_base: bool = False
    allow_unmatched: bool = False
    force: bool = False
    dry_run: bool = False
    progress: Callable[[int], None] | None = None
    part: Part = ""
    packed: bool = False

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> WriteOptions:
        """Return the options from the ``locals()`` of a mode, which has arguments of the same names."""
        names = [option.name for option in fields(cls) if option.name not in ("part", "packed")]
        return cls(**{name: arguments[name] for name in names})
