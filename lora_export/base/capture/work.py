"""Limit what a model computes on its example before it is run: its config, not its weights, says how much.

Attention over the pixels of an image, or a convolution with steps of one, has the same few kilobytes of
weights for images of any size: a model of 200 kB took 2.3 GB, one of 10 kB more time than anyone has. A few
tokens can do the same: state-space models and attention in windows fill them up to the size of a window,
which is only a number in the config. So a copy without values runs first, on torch's meta device. A model
whose code looks at values can't run so: it runs as it is, and before each operator the size of its result is
looked at.
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
# Operators of torch: a layer of a decoder has some sixty, and the deepest published model 1000 layers.
_SMALL_STEPS, _STEP_BYTES = 1 << 15, 256


class _TooMuch(Exception):
    """The model computes more than suits its weights."""


def refuse_much_work(model: Any, kind: ModelKind, inputs: Mapping[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` if a model would compute much more on its example than suits its weights.

    Args:
        model: A transformers model.
        kind: Its kind.
        inputs: The example.
        folder: Its folder.
    """
    if model.device.type == "meta":
        return
    stored = weights_bytes(folder)
    try:
        try:
            _work_of(model, kind, folder, stored)
        except _TooMuch:
            raise
        except Exception:  # of the model's own code, where there are no values
            _watch_run(model, inputs, stored)
    except _TooMuch as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise CheckpointError(
            f"{folder}: {type(model).__name__} would compute {error} on {shapes}, for weights of {stored} "
            "bytes",
            "write the sizes that the model is for into config.json (of images, steps, patches, windows, "
            "chunks, and how often layers are repeated)",
        ) from error


def _work_of(model: Any, kind: ModelKind, folder: Path, stored: int) -> tuple[int, int]:
    """Return the number of operations of a run, and the bytes of the largest tensor in it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    attention = getattr(model.config, "_attn_implementation", None)
    with quiet(), torch.no_grad(), torch.device("meta"):
        twin = type(model)._from_config(
            copy.deepcopy(model.config), dtype=model.dtype, attn_implementation=attention
        )
        inputs = kind.example_inputs(twin.eval(), folder)
        with FakeTensorMode(allow_non_fake_inputs=True), _watch(stored) as watch:
            twin(**inputs)
    return watch.count, watch.largest


def _watch_run(model: Any, inputs: Mapping[str, Any], stored: int) -> None:
    """Run a model as it is; raise `_TooMuch` before an operator that would make too much."""
    import torch

    with quiet(), torch.no_grad(), _watch(stored, has_values=True):
        try:
            model(**inputs)
        except _TooMuch:
            raise
        except Exception:  # the run that counts says so
            return


def _watch(stored: int, has_values: bool = False) -> Any:
    """Return a context in which the size and the work of each operator are added up, and limited.

    Args:
        stored: Bytes of the model's weights.
        has_values: False where tensors take no memory; True to look at each operator before it runs.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map
    from torch.utils.flop_counter import flop_registry

    def without_values(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        """Looks at the size of what each operator returns."""

        count = steps = largest = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            named = kwargs or {}
            if not has_values:
                found = func(*args, **named)
                self._add(func, args, named, found)
                return found
            try:
                planned = func(*tree_map(without_values, args), **tree_map(without_values, named))
            except Exception:  # its result depends on values, and is not larger than what they are of
                planned = None
            self._add(func, args, named, planned)
            return func(*args, **named)

        def _add(self, func: Any, args: Any, named: Any, found: Any) -> None:
            tensors = [one for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
            self.largest = max([self.largest, *(one.untyped_storage().nbytes() for one in tensors)])
            self.steps += 1
            if tensors and (rule := flop_registry.get(func._overloadpacket)):
                self.count += int(rule(*args, **named, out_val=found))
            if self.count > _SMALL_COUNT + _COUNT_EACH * stored:
                raise _TooMuch(f"more than {self.count:.2g} operations")
            if self.largest > _SMALL_BYTES + _BYTES_EACH * stored:
                raise _TooMuch(f"a tensor of {self.largest} bytes")
            if self.steps > _SMALL_STEPS + stored // _STEP_BYTES:
                raise _TooMuch(f"more than {self.steps} steps")

    return Watch()
