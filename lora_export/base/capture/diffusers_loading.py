"""Load a model of diffusers from its component folder, with plain inputs under optimum's names."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lora_export.base.capture.export import first_line, quiet, require
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.diffusers_config import EXPORT, refuse_config
from lora_export.base.checkpoint.module_counts import few_modules
from lora_export.base.checkpoint.weight_files import find_weights
from lora_export.base.checkpoint.widths import refuse_wide
from lora_export.base.kinds import DIFFUSERS, diffusers_kind
from lora_export.errors import CheckpointError


def load_component(path: Path, dtype: str, kind: str = "") -> tuple[Any, Collection[str]]:
    """Return the model of a component folder, and the parameters that its weights lack.

    Args:
        path: Folder that diffusers' ``save_pretrained`` wrote.
        dtype: Dtype of the weights.
        kind: Key of `KINDS` for the part of the model that is wanted; by default that of its class.

    Raises:
        BackendUnavailable: diffusers is missing.
        CheckpointError: The folder can't be loaded, or not without running code of its own.
    """
    import torch

    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    refuse_config(path, config)
    described = diffusers_kind(kind or DIFFUSERS[checkpoint.diffusers_class])
    described.refuse_unsupported(path, config)
    require("diffusers", extra="diffusion")
    import diffusers

    found = getattr(diffusers, checkpoint.diffusers_class)
    weights = find_weights(path, is_diffusers=True, config=config)
    refuse_wide(path, found.from_config, dict(config))
    # Parts that a class keeps in float32 would stay so beside float64, where nothing is gained by it.
    is_exact = dtype == "float64"
    with quiet(), _put_back(), few_modules(path):
        try:
            model, loading = found.from_pretrained(
                path,
                torch_dtype=torch.float32 if is_exact else getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                variant=(weights.variant if weights else "") or None,
                output_loading_info=True,
            )
        except CheckpointError:
            raise
        except Exception as error:  # diffusers, safetensors and torch raise many kinds
            raise CheckpointError(
                f"diffusers can't load {path}: {first_line(error)}",
                f"give the folder that save_pretrained wrote, or {EXPORT}",
            ) from error
    described.prepare(model)
    return model.double() if is_exact else model, loading["missing_keys"]


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """Have diffusers log errors only, and put back what it leaves changed.

    Its remarks on versions and devices are not for our user. A load that fails leaves torch's default dtype
    that of the load.
    """
    import torch
    from diffusers.utils import logging

    verbosity, dtype = logging.get_verbosity(), torch.get_default_dtype()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        torch.set_default_dtype(dtype)
