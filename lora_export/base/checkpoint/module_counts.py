"""Limit the parts of a model that a config makes transformers build, whatever the config's key is called.

Any number in a config may be one of modules: ``num_feedforward_networks``, ``num_hash_functions``, the length
of ``hidden_sizes``. So what is built is counted while it is built, and compared with the size of the weights.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_export.errors import CheckpointError
from lora_export.untrusted.places import listed

# A module, a parameter or a buffer takes some 3 kB and 0.1 ms. Of published models, the smallest have
# about 20 kB of weights for each: a thousand batch norms in 20 MB.
_SMALL_COUNT, _BYTES_EACH = 1 << 14, 1024


def weights_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weights files."""
    files = [path for suffix in ("safetensors", "bin", "pt") for path in listed(folder, f"*.{suffix}")]
    return sum(path.stat().st_size for path in files)


@contextlib.contextmanager
def few_modules(folder: Path) -> Iterator[None]:
    """Count modules, parameters and buffers of the models that this thread makes in the block.

    Args:
        folder: Of the checkpoint.

    Raises:
        CheckpointError: There are more than the weights can be for.
    """
    from torch.nn.modules import module as torch_modules

    stored, thread, count = weights_bytes(folder), threading.get_ident(), 0
    most = _SMALL_COUNT + stored // _BYTES_EACH

    def made(*_registered: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise CheckpointError(
                f"{folder}/config.json asks for a model of more than {most} modules and tensors, but its "
                f"weights are {stored} bytes",
                "download it again, or write the numbers that the weights have",
            )

    hooks = [
        torch_modules.register_module_module_registration_hook(made),
        torch_modules.register_module_parameter_registration_hook(made),
        torch_modules.register_module_buffer_registration_hook(made),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
