"""Capture a PyTorch module or a Hugging Face checkpoint as an ONNX graph, with torch.onnx's dynamo exporter.

The graph says in its metadata what it was captured from, see `lora_export.graph.captured`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_export.base.capture.attach import Weights
from lora_export.base.capture.attention import OPSET, use_node
from lora_export.base.capture.cache import name_total, switch_cache, with_cache
from lora_export.base.capture.export import (
    finish,
    first_line,
    named_tensors,
    quiet,
    require,
    run_module,
    tensor_names,
    trace_module,
)
from lora_export.base.capture.fuse import fuse_nodes
from lora_export.base.capture.loading import (
    EXPORT_YOURSELF,
    Loading,
    attention_of,
    load_model,
    look_at,
    refuse_lost,
)
from lora_export.base.capture.without_weights import Traced, graph_without_weights
from lora_export.base.capture.work import refuse_much_work
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.base.history.in_graph import CAPTURED_KEY, entries_before
from lora_export.base.kinds import kind_of
from lora_export.errors import CheckpointError, OutputError
from lora_export.graph.captured import (
    DTYPES,
    PAST_SEQUENCE,
    SEQUENCE,
    TOTAL_SEQUENCE,
    Captured,
)
from lora_export.graph.data_identity import mark_data
from lora_export.graph.onnx_file import save_graph
from lora_export.progress import tell_stage
from lora_export.storage.hashes import hash_written
from lora_export.untrusted.places import is_file

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from lora_export.base.kinds.model_kind import ModelKind

Trace = Literal["loaded", "outline"]
TRACES: tuple[Trace, ...] = ("loaded", "outline")
# The first opset in which Conv and pooling take bfloat16.
_BFLOAT16_OPSET = 22
# Smaller constants stay in the protobuf.
_INLINE_BYTES = 256


def capture_checkpoint(
    folder: str | os.PathLike[str],
    output: Path,
    *,
    dtype: str = "float32",
    kv_cache: bool = False,
    replaced: Collection[str] = (),
    trace: Trace = "loaded",
    fused: bool = False,
) -> Path:
    """Write the graph of a checkpoint folder, with dynamic batch and sequence axes.

    The model class is the one named in the config's ``architectures``.

    Args:
        folder: Folder that ``save_pretrained`` wrote.
        output: The ``.onnx`` file to write; its data goes beside it.
        dtype: Dtype of weights, inputs and outputs (except ids), one of `DTYPES`. The graph computes as the
            model does in PyTorch in that dtype; what transformers always computes in float32 stays float32.
        kv_cache: For decoders: keys and values of past tokens are inputs and outputs, see `capture_cache`.
        replaced: Parameters that are replaced afterwards; the checkpoint may lack them.
        trace: ``loaded``: the model with its weights is traced. ``outline``: the first and the last layer of
            each kind are traced without weights and copied for the others; weights are read as they are
            written, so that the model is never in memory. The graph computes the same.
        fused: Write attention, rotary embeddings and RMS norms as one node each (opset 23), which runtimes
            compute with kernels of their own.

    Returns:
        ``output``.

    Raises:
        BackendUnavailable: torch, transformers or onnxscript is missing.
        CheckpointError: The folder can't be loaded or lacks weights, its kind of input is unknown, it has no
            cache, or weights don't fit into the dtype.
        GraphError: torch.onnx can't export the model.
        OutputError: The dtype is unknown, or the options don't go together.
    """
    _refuse_options(dtype, trace, fused)
    require("torch", "transformers", "onnxscript")
    path = Path(folder)
    tell_stage(f"capturing {path} (seconds for a small model, minutes for 1B)")
    opset = OPSET if fused else _BFLOAT16_OPSET if dtype == "bfloat16" else None
    weights: Weights | None = None
    if trace == "outline":
        graph, captured, weights = _in_outline(path, look_at(path), dtype, kv_cache=kv_cache, opset=opset)
    else:
        graph, captured = _loaded(path, dtype, replaced, kv_cache=kv_cache, opset=opset, fused=fused)
    if kv_cache:
        name_total(graph)
    graph.metadata_props.update(captured.to_metadata())
    if before := entries_before(history_of(path / MANIFEST)):
        graph.metadata_props[CAPTURED_KEY] = before
    _save(graph, output)
    if weights is not None:
        refuse_lost(weights.lost, path, dtype)
    return output


def _refuse_options(dtype: str, trace: Trace, fused: bool) -> None:
    if dtype not in DTYPES:
        raise OutputError(f"there is no dtype {dtype!r} to capture in", f"one of: {', '.join(DTYPES)}")
    if fused and trace == "outline":
        raise OutputError(
            "attention as one node is tried with the model's weights, which an outline does not have",
            "give --trace loaded, or omit --fused",
        )


def _loaded(
    path: Path,
    dtype: str,
    replaced: Collection[str],
    kv_cache: bool,
    opset: int | None,
    fused: bool,
) -> tuple[ir.Model, Captured]:
    """Return the graph of a checkpoint's model with its weights in memory, and what it was captured from."""
    model, _ = load_model(path, dtype, replaced)
    traced, captured = _prepare(model, path, dtype, kv_cache, fused=fused)
    graph = trace_module(
        model,
        traced.inputs,
        traced.shapes,
        traced.output_names,
        input_names=traced.input_names,
        opset=opset,
    )
    graph = finish(graph)
    if fused:
        fuse_nodes(graph)
    return graph, captured


def _in_outline(
    path: Path, loading: Loading, dtype: str, kv_cache: bool, opset: int | None
) -> tuple[ir.Model, Captured, Weights]:
    """Return a checkpoint's graph, what it was captured from, and the weights, read when it is saved.

    Raises:
        CheckpointError: The model can't be traced without its weights.
    """
    import torch

    described: list[Captured] = []

    def prepare(model: Any) -> Traced:
        traced, captured = _prepare(model, path, dtype, kv_cache)
        described.append(captured)
        return traced

    try:
        graph, weights = graph_without_weights(
            path,
            loading.kind,
            loading.config,
            dtype=getattr(torch, dtype),
            attention=attention_of(loading.config),
            prepare=prepare,
            opset=opset,
        )
    except CheckpointError:
        raise
    except Exception as error:  # also of transformers, torch and onnxscript, without values to work with
        raise CheckpointError(
            f"{path} can't be traced without its weights: {first_line(error)}", "give --trace loaded"
        ) from error
    return graph, described[-1], weights


def _prepare(
    model: Any, path: Path, dtype: str, kv_cache: bool, *, fused: bool = False
) -> tuple[Traced, Captured]:
    """Run a model on example inputs; have it attend in one node, and read and return its cache, if wanted."""
    import torch

    _batch_experts(model)
    with torch.device(model.device):
        kind = _kind_of(model, path)
        inputs = example_inputs(model, path)
        if fused:
            switch_cache(model, False)
            use_node(model, inputs, path)
        switch_cache(model, True)
        outputs = run_module(model, inputs)
        switch_cache(model, False)
        captured = _describe(model, kind, outputs, dtype=dtype, kv_cache=kv_cache)
        if not kv_cache:
            shapes = {name: _dynamic(kind, name, captured.smallest) for name in inputs}
            return Traced(inputs=inputs, shapes=shapes, output_names=_only_tensors(model, outputs)), captured
        made = with_cache(model, inputs, outputs, str(path))
    traced = Traced(
        inputs=made.inputs,
        shapes=made.shapes,
        output_names=made.output_names,
        input_names=made.input_names,
        has_cache=True,
    )
    return traced, captured


def _only_tensors(model: Any, outputs: Any) -> list[str] | None:
    """Return the names of the outputs that are tensors, and have the model return only these.

    The exporter would take others apart (an output of each of CLIP's towers) or fail on them (a cache).
    """
    names = tensor_names(outputs)
    if names is None or all(
        value is None or hasattr(value, "shape") or isinstance(value, tuple | list)
        for value in outputs.values()
    ):
        return names
    forward = model.forward

    # With the parameters of the model's own, by which the exporter calls it.
    @functools.wraps(forward)
    def tensors(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
        return named_tensors(forward(*given, **named))

    model.forward = tensors
    return names


def capture_module(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    output: Path,
    dynamic_shapes: Any = None,
) -> Path:
    """Write the graph of a module.

    Args:
        module: Module in the mode (eval, dtype) in which it is captured.
        example_inputs: Positional or keyword inputs.
        output: The ``.onnx`` file to write; its data goes beside it.
        dynamic_shapes: As for `torch.export.export`.

    Returns:
        ``output``.

    Raises:
        BackendUnavailable: torch or onnxscript is missing.
        GraphError: torch.onnx can't export the module.
    """
    require("torch", "onnxscript")
    names = tensor_names(run_module(module, example_inputs))
    return _save(finish(trace_module(module, example_inputs, dynamic_shapes, names)), output)


def _save(graph: ir.Model, output: Path) -> Path:
    from onnx_ir.external_data import unload_from_model

    tell_stage("writing the graph as it was traced")
    data = output.parent / f"{output.name}.data"
    graph = unload_from_model(graph, output.parent, data.name, size_threshold_bytes=_INLINE_BYTES)
    if is_file(data):
        mark_data(graph, {data.name: hash_written(data, data.name)})
    save_graph(graph, output)
    return output


def _describe(
    model: Any, kind: ModelKind, outputs: Mapping[str, Any], dtype: str, kv_cache: bool
) -> Captured:
    largest = kind.largest(model)
    if kv_cache and SEQUENCE in largest:
        largest |= dict.fromkeys((PAST_SEQUENCE, TOTAL_SEQUENCE), largest[SEQUENCE])
    return Captured(
        kind=kind.word(outputs),
        kv_cache=kv_cache,
        dtype=dtype,
        vocab_size=kind.vocab_size(model),
        largest=largest,
        smallest=kind.smallest(model),
    )


def _batch_experts(model: Any) -> None:
    """Make a mixture of experts multiply with each token's own experts, for which ONNX has operators.

    transformers 5's default groups the tokens by expert (``torch._grouped_mm``), and its loop over the
    experts depends on the values; neither can be exported. The sums are the same.
    """
    if hasattr(model, "set_experts_implementation"):
        with quiet():
            model.set_experts_implementation("batched_mm")


def example_inputs(model: Any, path: Path) -> dict[str, Any]:
    """Return inputs that a model runs with.

    Args:
        model: A transformers model.
        path: Its folder.

    Raises:
        CheckpointError: The model's kind of input is unknown, the folder does not say what it is like, or the
            model would compute too much on it.
    """
    kind = _kind_of(model, path)
    inputs = kind.example_inputs(model, path)
    refuse_much_work(model, kind, inputs, path)
    return inputs


def _kind_of(model: Any, path: Path) -> ModelKind:
    if kind := kind_of(model):
        return kind
    raise CheckpointError(
        f"{path}: no example inputs are known for a model that reads {model.main_input_name!r}",
        EXPORT_YOURSELF,
    )


def _dynamic(kind: ModelKind, name: str, smallest: Mapping[str, int]) -> dict[int, Any]:
    import torch

    return {
        axis: torch.export.Dim(dim, min=smallest.get(dim, 0) or None) for axis, dim in kind.axes(name).items()
    }
