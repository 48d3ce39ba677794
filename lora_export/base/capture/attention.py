"""Have a transformers model write its attention as one node of ONNX (operator ``Attention``, opset 23).

transformers lets others implement the attention of its models (``AttentionInterface``) and the masks for it.
Ours calls ``torch.onnx.ops.attention``, which torch.onnx exports as that operator and PyTorch computes as the
operator is defined, so that a model is tried with it before it is traced:
https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.export import first_line, named_tensors, quiet, run_module
from lora_export.base.capture.gap import padded
from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# The first opset with the operator.
OPSET = 23

_NAME = "lora_export_node"
_OMIT = "omit --fused (fused=True)"
# Relative difference of two ways to add up; the mask of a wrong row moves far more. Halves round each step.
_DIFFERENCE, _HALVES_DIFFERENCE = 2e-5, 0.05
# Arguments that change what attention computes and that the operator has no place for.
_NOT_TAKEN = ("s_aux", "head_mask", "cache")


def use_node(model: Any, inputs: Mapping[str, Any], path: Path) -> None:
    """Switch a model's attention to the operator, once it computes the same with it.

    It is compared on the inputs, and on the same with padding on the left and on the right. A model on the
    meta device computes nothing to compare: its graph has to be.

    Args:
        model: A transformers model, as it was loaded.
        inputs: Inputs that it runs with.
        path: Its folder, for messages.

    Raises:
        CheckpointError: The model does not attend through transformers' interface, or not as the operator
            does, or computes something else with it.
    """
    kind = type(model).__name__
    if not hasattr(model, "set_attn_implementation"):
        raise CheckpointError(f"{path}: {kind} does not attend through transformers' interface", _OMIT)
    trials = [inputs, *padded(inputs)]
    wanted = [named_tensors(run_module(model, trial)) for trial in trials]
    calls: list[str] = []
    _register(calls)
    try:
        with quiet():
            model.set_attn_implementation(_NAME)
        got = [named_tensors(run_module(model, trial)) for trial in trials]
    except Exception as error:  # of the model's own code, which may check what it is called with
        reason = first_line(error.__cause__ or error)
        raise CheckpointError(
            f"{path}: {kind} does not run with ONNX's Attention: {reason}", _OMIT
        ) from error
    if not calls:
        raise CheckpointError(f"{path}: {kind} does not attend through transformers' interface", _OMIT)
    if model.device.type == "meta":
        return
    for trial, before, after in zip(trials, wanted, got, strict=True):
        gap, output = max((_gap(before[name], after[name], trial), name) for name in before)
        limit = _HALVES_DIFFERENCE if model.dtype.itemsize == 2 else _DIFFERENCE
        if not gap <= limit:
            raise CheckpointError(
                f"{path}: {kind} computes something else with ONNX's Attention (relative difference "
                f"{gap:.2g} in {output})",
                _OMIT,
            )


def _register(calls: list[str]) -> None:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def attend(module: Any, *given: Any, **named: Any) -> tuple[torch.Tensor, None]:
        calls.append(type(module).__name__)
        return _attend(module, *given, **named), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Return ``[batch, sequence, heads, head_dim]`` of queries ``[batch, heads, sequence, head_dim]``."""
    import torch

    if taken := [name for name in _NOT_TAKEN if others.get(name) is not None]:
        raise CheckpointError(f"its attention takes {', '.join(taken)}", _OMIT)
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    # A cache of a fixed size is longer than the mask of what is in it.
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    if position_bias is not None:
        # T5's, added to the scores as the operator adds a mask of numbers, which then has to hold all.
        bias = position_bias.to(query.dtype)
        if causal and mask is None:
            sizes = query.shape[2], key.shape[2]
            mask = torch.ones(sizes, dtype=torch.bool, device=query.device).tril(sizes[1] - sizes[0])
        mask = bias if mask is None else torch.where(mask, bias, torch.finfo(query.dtype).min)
    found = torch.onnx.ops.attention(
        query,
        key,
        value,
        mask,
        scale=scaling,
        softcap=softcap or 0.0,
        is_causal=bool(causal) and mask is None and query.shape[2] > 1,
    )
    answer: torch.Tensor = found[0].transpose(1, 2).contiguous()
    return answer


def _gap(wanted: torch.Tensor, got: torch.Tensor, inputs: Mapping[str, Any]) -> float:
    """Return the relative difference of an output, without its padded tokens: nobody reads them."""
    import torch

    if not wanted.is_floating_point():
        return 0.0
    exact, found = wanted.double(), got.double()
    mask = inputs.get("attention_mask")
    if mask is not None and exact.shape[:2] == mask.shape:
        exact, found = exact[mask.bool()], found[mask.bool()]
    gap = torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact).clamp_min(1e-30)
    return float("inf") if gap.isnan() else float(gap)
