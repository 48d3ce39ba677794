"""Capture a folder without its weights in memory: traced in outline, layers copied, weights attached.

The graph is the one that tracing the loaded model gives, from the model's own code. Where this way can't be
gone (`CannotCopy`, what transformers changes when it loads, a module that looks at values), the model is
loaded and traced as a whole (`capture`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.attach import shape_of_parts
from lora_export.base.capture.copy_layers import copy_layers
from lora_export.base.capture.export import quiet, share, simplify, trace_module
from lora_export.base.capture.fuse import fuse_nodes
from lora_export.base.capture.kept import Kept
from lora_export.base.capture.outline import CannotCopy, Stack, build_outline, cut, find_stacks
from lora_export.base.capture.traced import Traced
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.module_counts import few_modules
from lora_export.base.checkpoint.names import StoredPart, loaded_parts
from lora_export.progress import tell_stage

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

# Numbers that become each other by rounding.
_CODES = frozenset({"F64", "F32", "F16", "BF16"})


# Runs a model on the meta device and says how it is traced.
Prepare = Callable[[Any], Traced]


def graph_without_weights(
    checkpoint: Checkpoint,
    kind: Any,
    config: Any,
    *,
    dtype: torch.dtype,
    attention: str | None,
    prepare: Prepare,
    opset: int | None,
    fused: bool,
) -> Kept:
    """Return the graph of a checkpoint's model, and where its weights are.

    Args:
        checkpoint: The folder.
        kind: The model's class.
        config: Its config; the layers that are not traced are taken out of it.
        dtype: Of the weights.
        attention: Implementation of attention; None: transformers' choice.
        prepare: Looks at the cut model.
        opset: See `export.trace_module`.
        fused: Fuse what `fuse.fuse_nodes` takes.

    Raises:
        CannotCopy: The model has to be loaded.
        Exception: So it has where transformers, torch or the checkpoint raise something else.
    """
    _refuse_what_loading_changes(kind, config, dtype)
    with quiet(), few_modules(checkpoint.folder):
        model, buffers = build_outline(kind, copy.deepcopy(config), dtype, attention)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    parts = _stored(model, checkpoint, shapes)
    stacks = find_stacks(model, buffers)
    with quiet():
        restore = cut(model, stacks)
        traced = prepare(model)
        restore()
    graph = trace_module(
        model, traced.inputs, traced.shapes, traced.output_names, input_names=traced.input_names, opset=opset
    )
    _strip(graph.graph, frozenset(model.state_dict()), _as_cut(buffers, stacks))
    tell_stage("simplifying and copying the layers")
    simplify(graph)
    if fused:
        fuse_nodes(graph)
    for stack in stacks:
        copy_layers(graph.graph, stack, traced.has_cache)
    lacking = {name for name, value in graph.graph.initializers.items() if value.const_value is None}
    for name in lacking:
        if shapes.get(name) != _shape(graph.graph.initializers[name]):
            raise CannotCopy(f"{name} is not the model's")
    share(graph, lacking)
    return Kept(graph=graph, parts={name: parts[name] for name in lacking & set(graph.graph.initializers)})


def _refuse_what_loading_changes(kind: Any, config: Any, dtype: torch.dtype) -> None:
    import torch

    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if dtype != torch.float32 and any(getattr(kind, name, None) for name in names):
        raise CannotCopy("parts of the model stay in float32")
    if getattr(config, "quantization_config", None):
        raise CannotCopy("its weights are quantised")


def _stored(
    model: Any, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[StoredPart, ...]]:
    """Return the stored tensors of each parameter and buffer that a checkpoint has to have.

    Raises:
        CannotCopy: One is missing, has another shape or a dtype that transformers converts in its own way.
    """
    found = loaded_parts(checkpoint, model)
    ends: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        ends.setdefault(id(value), []).append(name)
    parts: dict[str, tuple[StoredPart, ...]] = {}
    for names in ends.values():
        stored = {found[name] for name in names if name in found}
        if len(stored) != 1:
            raise CannotCopy(f"{names[0]} is stored {len(stored)} times")
        parts |= dict.fromkeys(names, stored.pop())
    for name, own in parts.items():
        if shape_of_parts(checkpoint, own) != shapes[name]:
            raise CannotCopy(f"{name} has another shape")
        if any(checkpoint.tensors[part.tensor].code not in _CODES for part in own):
            raise CannotCopy(f"{name} is stored in another kind of numbers")
    return parts


def _as_cut(buffers: Mapping[str, torch.Tensor], stacks: Sequence[Stack]) -> dict[str, torch.Tensor]:
    """Return the values of buffers by their names in the cut model."""
    kept = dict(buffers)
    for stack in stacks:
        start = f"{stack.path}."
        inside = {name[len(start) :]: kept.pop(name) for name in buffers if name.startswith(start)}
        for position, index in enumerate(stack.chosen):
            for name, value in inside.items():
                number, _, rest = name.partition(".")
                if number == str(index):
                    kept[f"{start}{position}.{rest}"] = value
    return kept


def _strip(graph: ir.Graph, stored: Collection[str], buffers: Mapping[str, torch.Tensor]) -> None:
    """Take the weights, which have no values here, out of a graph, and put the buffers' values in."""
    for name, value in graph.initializers.items():
        constant = value.const_value
        raw = getattr(constant, "raw", None)
        if constant is not None and getattr(getattr(raw, "device", None), "type", "") != "meta":
            continue
        value.const_value = None
        if name not in stored:
            if name not in buffers:
                raise CannotCopy(f"{name} is computed from what has no values")
            value.const_value = _tensor(buffers[name], name)


def _tensor(values: torch.Tensor, name: str) -> ir.TensorProtocol:
    from onnx_ir.tensor_adapters import TorchTensor

    return TorchTensor(values.detach().clone(), name=name)


def _shape(value: ir.Value) -> tuple[object, ...]:
    return () if value.shape is None else tuple(value.shape)
