"""Refuse a base that contains an adapter: the same one merged already, or another one's layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.errors import AdapterError, CheckpointError
from lora_export.sites.naming.adapter_layers import adapters_among


def refuse_contained(checkpoint: Checkpoint) -> None:
    """Refuse a base that was saved with an adapter's layers: another adapter would be added to that one.

    Raises:
        CheckpointError: Tensors of the base have names that only such layers have.
    """
    names = adapters_among(checkpoint.tensors)
    if names:
        raise CheckpointError(
            f"{checkpoint.folder} contains an adapter already (saved from a PEFT model without "
            "merge_and_unload): another one would be added to it",
            "where it was saved: on the PeftModel, model.merge_and_unload().save_pretrained(DIR) keeps what "
            "that adapter has learnt, model.unload().save_pretrained(DIR) is the base without it; or give "
            "the base as it was before that training",
            names,
        )


def refuse_merged(base: Path, adapters: Sequence[Adapter]) -> None:
    """Refuse an adapter that is in the base already, by the manifests of the merges that led to it.

    Args:
        base: A checkpoint's folder.
        adapters: The adapters to merge.

    Raises:
        AdapterError: Some of the adapters, or parts of their files, are in it.
    """
    history = history_of(base / MANIFEST)
    twice = [found for adapter in adapters if (found := history.merged(adapter))]
    if twice:
        raise AdapterError(
            f"the base {base} has this adapter merged into it already",
            f"merge into the original base; or, if it is meant twice, remove {MANIFEST} from the base",
            twice,
        )
