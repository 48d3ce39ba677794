"""Limit what a model computes on its example before it is run: its config, not its weights, says how much.

Attention over the pixels of an image, or a convolution with steps of one, has the same few kilobytes of
weights for images of any size: a model of 200 kB took 2.3 GB, one of 10 kB more time than anyone has. So a
copy without values runs first, on torch's meta device. Models whose code looks at values can't run so, and
are not limited.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.export import quiet
from lora_export.base.checkpoint.module_counts import weights_bytes
from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    from lora_export.base.kinds.model_kind import ModelKind

# Of published models, Segformer-B0 for 1024 × 1024 pixels computes most for each byte of its weights (8 MB in
# 16 bits): 180 billion operations, and a tensor of its attention has 540 MB.
_SMALL_COUNT, _COUNT_EACH = 10**11, 30_000
_SMALL_BYTES, _BYTES_EACH = 128 << 20, 64
# Inputs of these alone are a few tokens.
_TOKENS = ("ids", "mask")


def refuse_much_work(model: Any, kind: ModelKind, inputs: Mapping[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` if a model would compute much more on its example than suits its weights.

    Args:
        model: A transformers model.
        kind: Its kind.
        inputs: The example.
        folder: Its folder.
    """
    if model.device.type == "meta" or all(name.endswith(_TOKENS) for name in inputs):
        return
    try:
        count, largest = _work_of(model, kind, folder)
    except Exception:  # of the model's own code, where there are no values
        return
    stored = weights_bytes(folder)
    if count > _SMALL_COUNT + _COUNT_EACH * stored or largest > _SMALL_BYTES + _BYTES_EACH * stored:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise CheckpointError(
            f"{folder}: {type(model).__name__} would compute {count:.2g} operations on {shapes}, with a "
            f"tensor of {largest} bytes, for weights of {stored} bytes",
            "write the sizes that the model is for into config.json (of images, of steps, of patches)",
        )


def _work_of(model: Any, kind: ModelKind, folder: Path) -> tuple[int, int]:
    """Return the number of operations of a run, and the bytes of the largest tensor in it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    largest = 0

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        """Looks at the size of what each operator returns."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            tensors = [one for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
            largest = max([largest, *(one.untyped_storage().nbytes() for one in tensors)])
            return found

    attention = getattr(model.config, "_attn_implementation", None)
    with quiet(), torch.no_grad(), torch.device("meta"):
        twin = type(model)._from_config(
            copy.deepcopy(model.config), dtype=model.dtype, attn_implementation=attention
        )
        inputs = kind.example_inputs(twin.eval(), folder)
        with FakeTensorMode(allow_non_fake_inputs=True), Watch(), FlopCounterMode(display=False) as counter:
            twin(**inputs)
    return int(counter.get_total_flops()), largest
