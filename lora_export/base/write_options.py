"""What every mode may be told of the base that it reads and of the files that it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lora_export.base.reads import CheckpointChoice


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """The options that all modes which write a graph have in common.

    Attributes:
        checkpoint: The folder that an ONNX file was exported from; None: the one that an adapter names as its
            base, if it is on this machine; False: none.
        dtype: To capture a folder in; float32 if left out.
        kv_cache: Capture a decoder with its key-value cache.
        share_base: Unchanged weights stay in the base's files.
        allow_unmatched: What has no place is left out.
        force: Existing outputs may be replaced.
        dry_run: Nothing is written.
        progress: Called with the number of bytes just written.
    """

    checkpoint: CheckpointChoice = None
    dtype: str | None = None
    kv_cache: bool = False
    share_base: bool = False
    allow_unmatched: bool = False
    force: bool = False
    dry_run: bool = False
    progress: Callable[[int], None] | None = None

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> WriteOptions:
        """Return the options from the ``locals()`` of a mode, which has arguments of the same names."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})
