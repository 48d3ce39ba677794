"""Build the model of a checkpoint with transformers on torch's meta device: structure without memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.adapter import Kind
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.layer_counts import refuse_large_numbers, refuse_many_layers
from lora_export.base.checkpoint.module_counts import few_modules
from lora_export.base.checkpoint.own_code import model_class, never_asked, why_not_built
from lora_export.errors import CheckpointError
from lora_export.storage.commit.leftovers import scratch_folder


def build_model(checkpoint: Checkpoint, changed: Mapping[str, Any] | None = None) -> Any:
    """Return the ``PreTrainedModel`` that the checkpoint's config describes, its weights on meta.

    Args:
        checkpoint: The base.
        changed: Config to use instead of the checkpoint's.

    Raises:
        CheckpointError: Building would run code of the checkpoint's own, or make too many modules.
        ImportError: torch or transformers is missing.
        Exception: transformers doesn't know the model, or can't build it.
    """
    import torch
    import transformers

    config = checkpoint.config if changed is None else changed
    if why := why_not_built(config):
        raise CheckpointError(why)
    kind = model_class((checkpoint.config.get("architectures") or [""])[0])
    with (
        quiet_config(checkpoint, changed) as made,
        few_modules(checkpoint.folder),
        torch.device("meta"),
    ):
        return kind(made) if kind else transformers.AutoModel.from_config(made, trust_remote_code=False)


@contextlib.contextmanager
def quiet_config(
    checkpoint: Checkpoint, changed: Mapping[str, Any] | None = None, **more: Any
) -> Iterator[Any]:
    """Yield transformers' config of a checkpoint; while it is in use, transformers logs only errors.

    transformers never asks whether to run a checkpoint's own code.

    Args:
        checkpoint: The base.
        changed: See `build_model`.
        more: Settings to change.
    """
    import transformers

    refuse_many_layers(checkpoint.folder, checkpoint.config)
    verbosity = transformers.logging.get_verbosity()
    # transformers' remarks about the config are for people who run the model.
    transformers.logging.set_verbosity_error()
    try:
        with _folder_of(checkpoint, changed) as folder, never_asked():
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **more
            )
            refuse_large_numbers(checkpoint.folder, config)
            yield config
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _folder_of(checkpoint: Checkpoint, changed: Mapping[str, Any] | None) -> Iterator[Path]:
    """Yield a folder to read the config from, so that it is judged as it will be when it is loaded."""
    if changed is None:
        yield checkpoint.folder
        return
    with scratch_folder() as folder:
        (folder / "config.json").write_text(json.dumps(changed), "utf-8")
        yield folder


def module_kind(module: Any) -> Kind | None:
    """Return the kind of a PyTorch module as adapters know it; None for any other class."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    return "conv" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


class LoadedNames:
    """Names that transformers gives to stored tensors when it loads them.

    Source: transformers 5, ``conversion_mapping.get_model_conversion_mapping`` and
    ``core_model_loading.rename_source_key``.

    Args:
        model: Result of `build_model`.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._meta = model.state_dict()
        self._owner = {p: converter for converter in self._converters for p in converter.source_patterns}

    def loaded(self, stored: str) -> tuple[str, str | None, Any]:
        """Return a stored tensor's name in the model, with the pattern and converter that would change it."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(
            stored,
            self._renamings,
            self._converters,
            base_model_prefix=self._model.base_model_prefix,
            meta_state_dict=self._meta,
        )
        return name, pattern, None if pattern is None else self._owner[pattern]

    def stored(self, name: str) -> str:
        """Return the name under which transformers would store a parameter, if loading leads back to it."""
        from transformers.core_model_loading import revert_weight_conversion

        reverted = list(revert_weight_conversion(self._model, {name: self._meta[name]}))
        if len(reverted) == 1 and self.loaded(reverted[0])[:2] == (name, None):
            return str(reverted[0])
        return name


def loaded_names(renaming: LoadedNames, tensors: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the model's name and the stored name of each tensor that is loaded as it is."""
    for stored in tensors:
        name, pattern, _ = renaming.loaded(stored)
        if pattern is None:
            yield name, stored
