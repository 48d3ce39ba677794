"""Add a LoRA module's product to the output of a PyTorch module, or to a parameter without such an output.

Products are computed in the dtype of W0, and DoRA's factor in float32 or better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.adapter import MERGE_ROWS, Array, LoraModule
from lora_export.base.checkpoint.meta_model import module_kind
from lora_export.base.checkpoint.names import StoredPart
from lora_export.runtimes.torch.find_parameters import TRAINED_ON, NoParameter, OwnedTensor
from lora_export.sites.experts import ExpertLayout, unsettled
from lora_export.sites.kinds import unsettled_kind

if TYPE_CHECKING:
    import torch

_ROWS = 1 << 16  # Number of rows of W0 that are widened at once for DoRA's norm.
# A forward hook with a further argument ``strength``: scaling times the adapter's weight.
Hook = Callable[..., Any]


def tensor_of(values: Array) -> torch.Tensor:
    """Return a copy of an array as a tensor of the same dtype; bfloat16 arrays are ml_dtypes'."""
    import torch

    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16).copy()).view(torch.bfloat16)
    if values.dtype.kind == "V":  # float8 and its like
        values = values.astype(np.float32)
    return torch.from_numpy(np.array(values))


def array_of(tensor: torch.Tensor) -> Array:
    """Return a tensor's values in the same dtype; bfloat16 becomes ml_dtypes'."""
    import ml_dtypes
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        halves: Array = tensor.view(torch.uint16).numpy().copy()
        return halves.view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy().copy()
    return array


# --- products ----------------------------------------------------------------------------------------


def hook_of(lora: LoraModule, owner: OwnedTensor, part: StoredPart | None) -> Hook | None:
    """Return a hook that adds a module's product to its output; None if W0 itself has to be changed.

    Args:
        lora: The adapter's module.
        owner: Owner of W0.
        part: The expert and rows of W0 that the module changes; None for all of it.

    Raises:
        NoPlace: The PyTorch module is of another kind, or the shapes don't fit.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    module = owner.module
    if lora.scale is not None:
        raise NoParameter("DoRA, converted for a graph", "give the adapter that it was made from")
    if refusal := unsettled_kind(
        lora, lambda _: ExpertLayout(tuple(owner.get().shape), None, module_kind(module))
    ):
        raise NoParameter(refusal.detail, refusal.hint or TRAINED_ON)
    plain = lora.parameter == "weight" and part is None and lora.kind != "parameter"
    if plain and isinstance(module, nn.Embedding):
        return _embedding(lora, owner)
    if plain and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _convolution(lora, owner)
    if plain and isinstance(module, nn.Linear | Conv1D):
        return _linear(lora, owner, isinstance(module, Conv1D))
    if lora.magnitude is not None or lora.lora_bias is not None:
        raise NoParameter(f"DoRA or a LoRA bias on a {type(module).__name__} is not supported", MERGE_ROWS)
    _orientation(lora, owner, part)
    return None


def _linear(lora: LoraModule, owner: OwnedTensor, transposed: bool) -> Hook:
    import torch.nn.functional as F

    weight = owner.get()
    seen = tuple(weight.shape[::-1]) if transposed else tuple(weight.shape)
    _check(lora, ("linear", "conv"), seen=seen, fitting=_plain_shape(lora), owner=owner)
    # kohya and diffusers write a Linear's factors as those of a 1×1 convolution, and vice versa.
    a = tensor_of(lora.lora_a).to(weight.dtype).flatten(1)
    b = tensor_of(lora.lora_b).to(weight.dtype).flatten(1)

    def product(x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x.to(a.dtype), a), b)

    return _adding(product, lora, owner=owner, axis=-1, transposed=transposed)


def _plain_shape(lora: LoraModule) -> tuple[int, ...]:
    """Return the shape of the weight, without the axes of a kernel of ones."""
    shape = lora.weight_shape
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _convolution(lora: LoraModule, owner: OwnedTensor) -> Hook:
    import torch.nn.functional as F

    module: Any = owner.module
    weight = owner.get()
    kernel = tuple(weight.shape[2:])
    shape = (lora.weight_shape[0], lora.lora_a.shape[1], *(lora.lora_a.shape[2:] or (1,) * len(kernel)))
    seen = (module.out_channels, module.in_channels, *kernel)
    _check(lora, ("linear", "conv"), seen=seen, fitting=shape, owner=owner)
    if lora.groups not in (1, module.groups):
        raise NoParameter(
            f"the model's convolution has {module.groups} groups, the adapter's B {lora.groups}"
        )
    if module.groups > 1 and lora.groups == 1:
        raise NoParameter(f"the model's convolution has {module.groups} groups, the adapter's factors one")
    if lora.magnitude is not None and lora.groups > 1:
        raise NoParameter("DoRA on a convolution with groups is not supported", MERGE_ROWS)
    ones = (1,) * len(kernel)
    a = tensor_of(lora.lora_a).to(weight.dtype).reshape(-1, module.in_channels, *kernel)
    b = tensor_of(lora.lora_b).to(weight.dtype)
    b = b.reshape(*b.shape[:2], *ones)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]

    def product(x: torch.Tensor) -> torch.Tensor:
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        down = convolve(x.to(a.dtype), a, stride=module.stride, padding=padding, dilation=module.dilation)
        return convolve(down, b, groups=lora.groups)

    return _adding(product, lora, owner=owner, axis=1, transposed=False)


def _embedding(lora: LoraModule, owner: OwnedTensor) -> Hook:
    import torch.nn.functional as F

    weight = owner.get()
    _check(lora, ("embedding",), seen=tuple(weight.shape), fitting=lora.weight_shape, owner=owner)
    a = tensor_of(lora.lora_a).to(weight.dtype).T.contiguous()
    b = tensor_of(lora.lora_b).to(weight.dtype)

    def product(ids: torch.Tensor) -> torch.Tensor:
        change = F.linear(F.embedding(ids, a), b)
        # Gemma's embeddings scale the rows that they look up.
        scale = getattr(owner.module, "embed_scale", None)
        return change if scale is None else change * scale

    return _adding(product, lora, owner=owner, axis=-1, transposed=False)


def _check(
    lora: LoraModule,
    kinds: Sequence[str],
    seen: tuple[int, ...],
    fitting: tuple[int, ...],
    owner: OwnedTensor,
) -> None:
    kind = type(owner.module).__name__
    if lora.kind not in kinds:
        raise NoParameter(
            f"the model has a {kind} {seen} there, the adapter's factors are of kind {lora.kind}"
        )
    if seen != fitting:
        raise NoParameter(f"the model's {kind} has a weight {seen}, the adapter fits {fitting}")


def _adding(
    product: Callable[[Any], Any], lora: LoraModule, owner: OwnedTensor, axis: int, transposed: bool
) -> Hook:
    """Return a forward hook; ``axis`` is the axis of the output channels in the module's output."""
    bias = None if lora.lora_bias is None else tensor_of(lora.lora_bias).to(owner.get().dtype)

    # Cached: apart from this module only the adapter's own extras change W0, and they do so in every run.
    factor = functools.cache(lambda: dora_factor(lora, owner, transposed))

    def along(values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return values if axis == -1 else values.view(-1, *(1,) * (output.dim() - axis - 1))

    def hook(module: Any, args: Any, kwargs: Any, output: Any, strength: float) -> Any:
        change = product(args[0] if args else next(iter(kwargs.values())))
        if bias is not None:
            change = change + along(bias, output)
        change = change * strength
        if lora.magnitude is not None:
            share = along(factor(), output)
            own = getattr(module, "bias", None)
            plain = output if own is None else output - along(own, output)
            # In the factor's dtype: share - 1 is small, and would lose most of its digits in float16.
            change = (share - 1) * plain + share * change
        return (output + change).to(output.dtype)

    return hook


def dora_factor(lora: LoraModule, owner: OwnedTensor, transposed: bool) -> torch.Tensor:
    """Return m/‖W0 + ΔW‖ for each output, ``(out_dim,)``, in float64 for a float64 model, else in float32.

    Args:
        lora: A module with a magnitude.
        owner: Owner of W0.
        transposed: True if W0 is stored as ``(in_dim, out_dim)``.
    """
    import torch

    assert lora.magnitude is not None
    weight = owner.get().T if transposed else owner.get()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = (torch.from_numpy(factor) for factor in lora.factors(dtype=_numpy(wide)))
    by_row = lora.magnitude_axis == 0
    squares = []
    for row in range(0, len(weight), _ROWS):
        rows = weight[row : row + _ROWS].flatten(1).to(wide) + left[row : row + _ROWS] @ right
        squares.append(rows.double().square().sum(1 if by_row else 0))
    norm = (torch.cat(squares) if by_row else torch.stack(squares).sum(0)).sqrt()
    magnitude = tensor_of(lora.magnitude).double()
    # A row of zeros with a magnitude of zero stays zero, whatever the factor.
    factor = torch.where((norm == 0) & (magnitude == 0), torch.zeros_like(norm), magnitude / norm)
    return factor.to(wide)


def _numpy(dtype: torch.dtype) -> type[np.floating[Any]]:
    import torch

    return np.float64 if dtype == torch.float64 else np.float32


# --- changed parameters ------------------------------------------------------------------------------


def changed(lora: LoraModule, owner: OwnedTensor, part: StoredPart | None, weight: float) -> torch.Tensor:
    """Return W0 + weight·scaling·B·A, rounded once to W0's dtype.

    Args:
        lora: A module for which `hook_of` returned None.
        owner: Owner of W0.
        part: The expert and rows of W0 that the module changes; None for all of it.
        weight: Weight of the adapter.
    """
    import torch

    values = owner.get().clone()
    transposed = _orientation(lora, owner, part)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    for expert in range(lora.experts):
        left, right = (torch.from_numpy(factor) for factor in lora.factors(expert, _numpy(wide)))
        change = (left @ right) * weight
        target = _target(values, lora, part, expert)
        change = change.T if transposed else change.reshape(target.shape)
        target.copy_(target.to(wide) + change)
    return values


def _target(values: torch.Tensor, lora: LoraModule, part: StoredPart | None, expert: int) -> torch.Tensor:
    """Return the view of a parameter that one product changes."""
    if part is not None:
        whole = values if part.expert is None else values[part.expert]
        index, count = part.piece
        height = len(whole) // count
        return whole[height * index : height * (index + 1)]
    stacked = values.dim() == 3 and lora.kind == "parameter"
    return values[expert] if stacked else values


def _orientation(lora: LoraModule, owner: OwnedTensor, part: StoredPart | None) -> bool:
    """Return True if W0 is stored transposed.

    Raises:
        NoPlace: The shapes fit in neither orientation.
    """
    values = owner.get()
    stacked = values.dim() == 3 and lora.kind == "parameter" and part is None
    if stacked and len(values) != lora.experts:
        raise NoParameter(f"the model has {len(values)} experts, the adapter {lora.experts}")
    if lora.experts > 1 and not stacked:
        raise NoParameter(
            f"the model has one weight {tuple(values.shape)}, the adapter {lora.experts} experts"
        )
    seen = tuple(_target(values, lora, part, 0).shape)
    if lora.kind == "parameter":
        return _parameter_turned(lora, seen, part)
    is_plain = all(size == 1 for size in seen[2:])
    fits = seen == lora.weight_shape or (is_plain and seen[:2] == _plain_shape(lora))
    turned = len(seen) == 2 and seen[::-1] == lora.matrix_shape
    if not fits and not turned:
        raise NoParameter(f"the model has a weight {seen}, the adapter fits {lora.weight_shape}")
    return turned and not fits


def _parameter_turned(lora: LoraModule, seen: tuple[int, ...], part: StoredPart | None) -> bool:
    """Return False if a module's own parameter fits, as PEFT has it untransposed; or raise `NoParameter`."""
    rows, cols = lora.matrix_shape
    rows = rows if part is None else rows // part.piece[1]
    if refusal := unsettled(lora, ExpertLayout(seen, None)):
        raise NoParameter(refusal.detail, refusal.hint or TRAINED_ON)
    if seen != (rows, cols):
        raise NoParameter(f"the model holds matrices {seen}, the adapter fits {(rows, cols)}")
    return False
