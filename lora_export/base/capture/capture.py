"""Capture a PyTorch module or a Hugging Face checkpoint as an ONNX graph, with torch.onnx's dynamo exporter.

The graph says in its metadata what it was captured from, see `lora_export.graph.captured`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_export.base.capture.attach import Weights
from lora_export.base.capture.attention import OPSET
from lora_export.base.capture.cache import name_total
from lora_export.base.capture.export import (
    finish,
    first_line,
    require,
    run_module,
    tensor_names,
    trace_module,
)
from lora_export.base.capture.fuse import fuse_nodes
from lora_export.base.capture.loading import Loading, attention_of, load_model, look_at, refuse_lost
from lora_export.base.capture.prepared import Traced, prepare
from lora_export.base.capture.prove import is_own_twin, not_proven, prove_by_twin, prove_model
from lora_export.base.capture.without_weights import graph_without_weights
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.base.history.in_graph import CAPTURED_KEY, entries_before
from lora_export.errors import CheckpointError, OutputError
from lora_export.graph.captured import DTYPES, Captured
from lora_export.graph.data_identity import mark_data
from lora_export.graph.onnx_file import save_graph
from lora_export.graph.proof import Proof
from lora_export.progress import tell_stage
from lora_export.storage.hashes import hash_written
from lora_export.untrusted.places import is_file

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


Trace = Literal["auto", "loaded", "outline"]
TRACES: tuple[Trace, ...] = ("auto", "loaded", "outline")
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
    trace: Trace = "auto",
    fused: bool = False,
    proven: bool = True,
) -> Proof:
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
            written, so that the model is never in memory. The graph computes the same. ``auto``: in outline,
            and loaded where that can't be.
        fused: Write attention, rotary embeddings and RMS norms as one node each (opset 23), which runtimes
            compute with kernels of their own.
        proven: Compare the graph with PyTorch in ONNX Runtime: a small model's own, a large model's by a
            twin, which is captured in the same way. The graph's metadata says so (`lora_export.graph.proof`).

    Returns:
        What was compared.

    Raises:
        BackendUnavailable: torch, transformers or onnxscript is missing.
        CheckpointError: The folder can't be loaded or lacks weights, its kind of input is unknown, it has no
            cache, or weights don't fit into the dtype.
        GraphError: torch.onnx can't export the model, or the graph computes something else.
        OutputError: The dtype is unknown.
    """
    if dtype not in DTYPES:
        raise OutputError(f"there is no dtype {dtype!r} to capture in", f"one of: {', '.join(DTYPES)}")
    require("torch", "transformers", "onnxscript")
    path = Path(folder)
    way = Way(dtype=dtype, kv_cache=kv_cache, replaced=tuple(replaced), fused=fused)
    tell_stage(f"capturing {path} (seconds for a small model, minutes for 1B)")
    loading = look_at(path)
    if trace == "loaded" or (trace == "auto" and replaced):
        return _write(path, output, loading, way, proven=proven)
    try:
        return _write(path, output, loading, replace(way, in_outline=True), proven=proven)
    except CannotOutline as error:
        if trace == "outline":
            raise CheckpointError(error.message, "give --trace loaded") from error
        tell_stage(f"{error.message}: loading it")
    return _write(path, output, look_at(path), way, proven=proven)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a folder is captured.

    Attributes:
        dtype: As for `capture_checkpoint`.
        kv_cache: As for `capture_checkpoint`.
        fused: As for `capture_checkpoint`.
        replaced: As for `capture_checkpoint`.
        in_outline: Trace without weights.
    """

    dtype: str
    kv_cache: bool
    fused: bool
    replaced: tuple[str, ...] = ()
    in_outline: bool = False

    @property
    def opset(self) -> int | None:
        """Version of ONNX's operators; None for the exporter's own choice."""
        return OPSET if self.fused else _BFLOAT16_OPSET if self.dtype == "bfloat16" else None


class CannotOutline(Exception):
    """A model can't be traced without its weights."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def _write(path: Path, output: Path, loading: Loading, way: Way, proven: bool) -> Proof:
    """Write a folder's graph, proven."""

    def capture(folder: Path, graph: Path, dtype: str) -> None:
        own = replace(way, dtype=dtype, replaced=())
        _write(folder, graph, look_at(folder), own, proven=False)

    proof = not_proven(proven)
    is_own = is_own_twin(path, way.dtype) and not way.replaced
    if proof is None and not is_own:
        proof = prove_by_twin(path, loading, way.dtype, output.parent, capture)
        if way.fused and way.in_outline and proof.of == "nothing":
            raise CannotOutline(f"{path} is traced with its weights, because {proof.reason}")
    graph, captured, weights = _graph_of(path, loading, way)
    if way.kv_cache:
        name_total(graph)
    graph.metadata_props.update(captured.to_metadata())
    if before := entries_before(history_of(path / MANIFEST)):
        graph.metadata_props[CAPTURED_KEY] = before
    graph = _save(graph, output)
    if weights is not None:
        refuse_lost(weights.lost, path, way.dtype)
    if proof is None:
        proof = prove_model(output, path, way.dtype)
    graph.metadata_props.update(proof.to_metadata())
    save_graph(graph, output)
    return proof


def _graph_of(path: Path, loading: Loading, way: Way) -> tuple[ir.Model, Captured, Weights | None]:
    if way.in_outline:
        return _in_outline(path, loading, way)
    return (*_loaded(path, way), None)


def _loaded(path: Path, way: Way) -> tuple[ir.Model, Captured]:
    """Return the graph of a checkpoint's model with its weights in memory, and what it was captured from."""
    model, _ = load_model(path, way.dtype, way.replaced)
    traced, captured = prepare(model, path, way.dtype, way.kv_cache, fused=way.fused)
    graph = trace_module(
        model,
        traced.inputs,
        traced.shapes,
        traced.output_names,
        input_names=traced.input_names,
        opset=way.opset,
    )
    graph = finish(graph)
    if way.fused:
        fuse_nodes(graph)
    return graph, captured


def _in_outline(path: Path, loading: Loading, way: Way) -> tuple[ir.Model, Captured, Weights]:
    """Return a checkpoint's graph, what it was captured from, and the weights, read when it is saved.

    Raises:
        CannotOutline: The model can't be traced without its weights.
    """
    import torch

    described: list[Captured] = []

    def prepared(model: Any) -> Traced:
        traced, captured = prepare(model, path, way.dtype, way.kv_cache, fused=way.fused)
        described.append(captured)
        return traced

    try:
        graph, weights = graph_without_weights(
            path,
            loading.kind,
            loading.config,
            dtype=getattr(torch, way.dtype),
            attention=attention_of(loading.config),
            prepare=prepared,
            opset=way.opset,
            fused=way.fused,
        )
    except CheckpointError:
        raise
    except Exception as error:  # also of transformers, torch and onnxscript, without values to work with
        raise CannotOutline(f"{path} can't be traced without its weights: {first_line(error)}") from error
    return graph, described[-1], weights


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
    _save(finish(trace_module(module, example_inputs, dynamic_shapes, names)), output)
    return output


def _save(graph: ir.Model, output: Path) -> ir.Model:
    """Write a graph and its data; return it with the data outside."""
    from onnx_ir.external_data import unload_from_model

    tell_stage("writing the graph as it was traced")
    data = output.parent / f"{output.name}.data"
    graph = unload_from_model(graph, output.parent, data.name, size_threshold_bytes=_INLINE_BYTES)
    if is_file(data):
        mark_data(graph, {data.name: hash_written(data, data.name)})
    save_graph(graph, output)
    return graph
