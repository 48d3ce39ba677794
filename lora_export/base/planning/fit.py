"""Fit a module's canonical rows into a stored tensor: as they are, transposed, or one matrix of a stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_export.adapter import LoraModule
from lora_export.base.checkpoint.families import is_conv1d
from lora_export.base.checkpoint.names import StoredPart
from lora_export.base.checkpoint.vocabulary import rows_hint
from lora_export.base.planning.checkpoint_plan import NoSite
from lora_export.plan import Refusal
from lora_export.sites.experts import ExpertLayout, fit_matrix, fit_parameter, is_turned, unsettled
from lora_export.storage.patch import Placement
from lora_export.storage.safetensors import StoredTensor

# Placements, and their layout in words.
Fitted = tuple[list[Placement], str]


def fit_weight(
    module: LoraModule,
    part: StoredPart,
    span: tuple[int, int],
    tensor: StoredTensor,
    *,
    config: Mapping[str, Any],
    fan_in_fan_out: bool,
    may_resize: bool,
) -> Fitted:
    """Return the placements of canonical rows of a weight in a stored tensor.

    Args:
        module: The module.
        part: The tensor's part of the parameter.
        span: The canonical rows.
        tensor: The tensor as it will be stored.
        config: The base's config.
        fan_in_fan_out: True if the adapter's config says that the base stores the transposed weight.
        may_resize: True if ``--resize`` can be given, and was not.

    Raises:
        NoPlace: The shapes don't fit.
    """
    wanted = (span[1] - span[0], module.matrix_shape[1])
    shape = tensor.shape
    # kohya and diffusers write a 1×1 convolution's factors as a Linear's, or the reverse.
    plain = len(shape) >= 2 and all(size == 1 for size in (*shape[2:], *module.weight_shape[2:]))
    same = shape == module.weight_shape or (plain and shape[:2] == wanted)
    turned = module.kind == "linear" and shape == wanted[::-1]
    if not same and not turned:
        parameter = f"{module.path}.{module.parameter}"
        as_name = "" if tensor.name.endswith(parameter) else f" ({tensor.name})"
        raise NoSite(
            Refusal(
                "shape",
                f"stored with shape {tensor.shape}, the adapter fits {module.weight_shape}{as_name}",
                rows_hint(config, parameter, shape, module.weight_shape, may_resize=may_resize),
            )
        )
    transposed = turned and (not same or is_conv1d(config, tensor.name.rpartition(".")[0], fan_in_fan_out))
    if part.transposed:
        raise NoSite(
            Refusal("operator", f"{tensor.name} holds the transpose of it, by transformers' conversion")
        )
    return [Placement(rows=span, row=0, col=0, transposed=transposed)], "transposed" if transposed else ""


def fit_own_matrix(
    module: LoraModule,
    part: StoredPart,
    span: tuple[int, int],
    tensor: StoredTensor,
    held: ExpertLayout | None,
) -> Fitted:
    """Return the placements of a module's own parameter, or of some experts of one, in a stored tensor.

    PEFT adds to such a parameter as the module holds it. It is stored in the same way, unless
    transformers transposes it when it loads it.

    Args:
        module: The module.
        part: The tensor's part of the parameter.
        span: The canonical rows.
        tensor: The tensor as it will be stored.
        held: The parameter as the base's module holds it; None if that is not known.

    Raises:
        NoPlace: The shapes don't fit, or several orientations do.
    """
    if refusal := unsettled(module, held):
        raise NoSite(refusal)
    experts = module.experts
    if part.expert is not None:
        placed = fit_matrix((span[1] - span[0], module.weight_shape[1]), tensor.shape, part.transposed)
    else:
        turned = part.transposed or (held is not None and is_turned(tensor.shape, held.shape))
        placed = fit_parameter(module, tensor.shape, turned)
    if isinstance(placed, Refusal):
        raise NoSite(placed)
    layout = "transposed" if placed else ""
    if part.expert is not None or experts == 1:
        return [Placement(rows=span, row=0, col=0, transposed=placed, expert=part.expert or 0)], layout
    height = tensor.shape[1]
    placements = [
        Placement(rows=span, row=e * height, col=0, transposed=placed, expert=e) for e in range(experts)
    ]
    return placements, f"{experts} experts stacked" + (", transposed" if placed else "")
