"""Capture a PyTorch module or a Hugging Face checkpoint as an ONNX graph, with torch.onnx's dynamo exporter.

The graph says in its metadata what it was captured from, see `lora_export.graph.captured`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_export.base.capture.attach import Weights, stacked
from lora_export.base.capture.attention import OPSET
from lora_export.base.capture.cache import name_total
from lora_export.base.capture.estimate import tell_and_refuse
from lora_export.base.capture.export import (
    finish,
    first_line,
    require,
    run_module,
    tensor_names,
    trace_module,
)
from lora_export.base.capture.fuse import fuse_nodes
from lora_export.base.capture.kept import Kept, find, keep, key_of
from lora_export.base.capture.loading import (
    Loading,
    attention_of,
    check_folder,
    load_model,
    look_at,
    refuse_lost,
)
from lora_export.base.capture.prepared import prepare
from lora_export.base.capture.prove import is_own_twin, not_proven, prove_by_twin, prove_model
from lora_export.base.capture.timestep import spread_timestep
from lora_export.base.capture.traced import Traced
from lora_export.base.capture.without_weights import graph_without_weights
from lora_export.base.checkpoint.checkpoint import Checkpoint, diffusers_class
from lora_export.base.checkpoint.names import refuse_stored_twice
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.base.history.in_graph import CAPTURED_KEY, entries_before
from lora_export.base.lowering import RUNTIMES, Runtime
from lora_export.base.lowering.lower import lower_graph
from lora_export.base.parts import OF_ONE_MODEL, Part
from lora_export.errors import CheckpointError, OutputError
from lora_export.graph.captured import DTYPES, Captured
from lora_export.graph.data_identity import mark_data
from lora_export.graph.onnx_file import save_graph
from lora_export.graph.proof import Proof
from lora_export.progress import tell_stage
from lora_export.storage.hashes import hash_shared, hash_written
from lora_export.untrusted.places import is_file, is_folder

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
    runtime: Runtime = "portable",
    packed: bool = False,
    proven: bool = True,
    share_from: Path | None = None,
    part: Part = "",
) -> Path:
    """Write the graph of a checkpoint folder, with dynamic batch and sequence axes.

    The model class is the one named in the config's ``architectures``, or of diffusers ``_class_name``.

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
        runtime: Runtime that the graph is lowered for (`lora_export.base.lowering`), fused first; of the
            portable graph only ONNX's operators are asked.
        packed: Compute queries, keys and values in one product, if the runtime has an attention for that: for
            a graph whose projections get no branches of LoRA.
        proven: Compare the graph with PyTorch in ONNX Runtime: a small model's own, a large model's by a
            twin, which is captured in the same way. The graph's metadata says so (`lora_export.graph.proof`).
        share_from: Leave weights in the checkpoint's own files, where these hold them in the graph's dtype
            and orientation, and refer to them from this folder, into which the output is moved afterwards.
            It has to be the checkpoint's folder or one above it: ONNX Runtime finds them nowhere else.
        part: Use of the model in a pipeline, if its graph differs for it.

    Returns:
        ``output``.

    Raises:
        BackendUnavailable: torch, transformers or onnxscript is missing.
        CheckpointError: The folder can't be loaded or lacks weights, its kind of input is unknown, it has no
            cache, or weights don't fit into the dtype.
        GraphError: torch.onnx can't export the model, or the graph computes something else.
        OutputError: The dtype or runtime is unknown, or the checkpoint's weights can't stay where they are.
    """
    if dtype not in DTYPES:
        raise OutputError(f"there is no dtype {dtype!r} to capture in", f"one of: {', '.join(DTYPES)}")
    if runtime not in RUNTIMES:
        raise OutputError(f"there is no runtime {runtime!r} to capture for", f"one of: {', '.join(RUNTIMES)}")
    is_lowered = runtime != "portable"
    require("torch", "transformers", "onnxscript")
    if is_lowered:
        require("onnxruntime", extra="cpu")
    path = Path(folder)
    refuse_stored_twice(path)
    way = Way(
        dtype=dtype,
        kv_cache=kv_cache,
        replaced=tuple(replaced),
        fused=fused or is_lowered,
        runtime=runtime,
        packed=packed and is_lowered,
        part=part,
    )
    if share_from is not None:
        _refuse_sharing(path, share_from, trace, replaced)
        trace = "outline"
    tell_stage(f"capturing {path} (seconds for a small model, minutes for 1B)")
    is_outlined = not (replaced or part or (is_folder(path) and diffusers_class(path)))
    if trace == "outline" or (trace == "auto" and is_outlined):
        try:
            _write_outlined(path, output, replace(way, in_outline=True), proven=proven, share_from=share_from)
            return output
        except CannotOutline as error:
            if trace == "outline":
                way_out = "give --trace loaded" if share_from is None else "omit --share-base"
                raise CheckpointError(error.message, f"{way_out}{error.or_else}") from error
            tell_stage(f"{error.message}: loading it")
    _write_loaded(path, output, way, proven=proven)
    return output


@dataclass(frozen=True, kw_only=True)
class Way:
    """Options of a capture.

    Attributes:
        dtype: As for `capture_checkpoint`.
        kv_cache: As for `capture_checkpoint`.
        fused: As for `capture_checkpoint`.
        runtime: As for `capture_checkpoint`.
        packed: As for `capture_checkpoint`.
        replaced: As for `capture_checkpoint`.
        in_outline: Trace without weights.
        part: As for `capture_checkpoint`.
    """

    dtype: str
    kv_cache: bool
    fused: bool
    runtime: Runtime = "portable"
    packed: bool = False
    replaced: tuple[str, ...] = ()
    in_outline: bool = False
    part: Part = ""

    @property
    def opset(self) -> int | None:
        """Version of ONNX's operators; None for the exporter's own choice."""
        return OPSET if self.fused else _BFLOAT16_OPSET if self.dtype == "bfloat16" else None


class CannotOutline(Exception):
    """A model can't be traced without its weights."""

    def __init__(self, message: str, or_else: str = "") -> None:
        super().__init__(message)
        self.message, self.or_else = message, or_else


def _write_outlined(
    path: Path,
    output: Path,
    way: Way,
    *,
    proven: bool,
    share_from: Path | None = None,
    is_twin: bool = False,
) -> None:
    """Write a folder's graph, traced without its weights or kept from a folder of the same config."""
    check_folder(path)
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:  # other files than safetensors, which transformers may read
        raise CannotOutline(f"{path} can't be traced without its weights: {error.message}") from error
    if not is_twin:
        tell_and_refuse(path, output, way.dtype, in_outline=True, shares_weights=share_from is not None)
    if share_from is not None:
        _refuse_links_out(checkpoint, share_from)
    key = key_of(checkpoint, asdict(way) | {"proven": proven, "shared": share_from is not None})
    # A twin's folder is of this capture alone.
    kept = None if is_twin else find(key, checkpoint.tensors)
    if kept is None:
        loading = look_at(path)
        # First, because it refuses a folder that lacks weights.
        kept = _in_outline(checkpoint, loading, way)
        proof = _twin_proof(path, output, loading, way, proven=proven, in_place=share_from is None)
        # Copied layers and fused nodes are believed only where they were compared.
        missing = proof.reason if proof is not None and proof.of == "nothing" and proven else ""
        if missing and (way.fused or not_proven(proven) is None):
            raise CannotOutline(
                f"{path} is traced with its weights, because {missing}",
                "; or --no-twin, to write a graph that was not compared with PyTorch",
            )
        if proof is not None:
            kept.graph.metadata_props.update(proof.to_metadata())
        # Why there is no proof may be over the next time.
        if not (is_twin or missing):
            keep(key, kept)
    weights = Weights(checkpoint, kept.parts)
    linked = set()
    for name in kept.parts:
        value = kept.graph.graph.initializers[name]
        if share_from is not None and weights.link(value, name, share_from):
            linked.add(value)
        else:
            weights.attach(value, name)
    if share_from is not None and not linked:
        raise OutputError(
            f"no weight can stay in {path}, whose dtype is not {way.dtype}",
            "give the checkpoint's --dtype, or omit --share-base",
        )
    graph = _save(_with_history(kept.graph, path), output, linked, share_from)
    refuse_lost(weights.lost, path, way.dtype)
    proof = Proof.from_metadata(graph.metadata_props) or _prove_saved(graph, output, path, way)
    if not is_twin:
        tell_stage(f"{path}: {proof}")


def _write_loaded(path: Path, output: Path, way: Way, *, proven: bool, is_twin: bool = False) -> None:
    """Write a folder's graph, traced with its weights in memory."""
    is_diffusers = is_folder(path) and bool(diffusers_class(path))
    if is_folder(path) and not is_twin:
        tell_and_refuse(path, output, way.dtype, in_outline=False)
    # First, because it refuses a folder that lacks weights.
    graph, captured = _loaded(path, way)
    proof = _twin_proof(path, output, None if is_diffusers else look_at(path), way, proven=proven)
    graph.metadata_props.update(captured.to_metadata() | (proof.to_metadata() if proof else {}))
    graph = _save(_with_history(graph, path), output)
    proof = proof or _prove_saved(graph, output, path, way)
    if not is_twin:
        tell_stage(f"{path}: {proof}")


def _twin_proof(
    path: Path, output: Path, loading: Loading | None, way: Way, *, proven: bool, in_place: bool = True
) -> Proof | None:
    """Return the proof by a twin, or why there is none; None for a model that is compared itself.

    Args:
        path: The folder.
        output: The graph's file.
        loading: The folder's class and config; None for a model of diffusers.
        way: How it is captured.
        proven: True if a proof is wanted.
        in_place: True if the graph finds its weights where it is written.
    """

    def capture(folder: Path, graph: Path, dtype: str) -> None:
        own = replace(way, dtype=dtype, replaced=())
        if way.in_outline:
            _write_outlined(folder, graph, own, proven=False, is_twin=True)
        else:
            _write_loaded(folder, graph, own, proven=False, is_twin=True)

    if proof := not_proven(proven):
        return proof
    if in_place and is_own_twin(path, way.dtype) and not way.replaced:
        return None
    if loading is None or (way.part and way.part not in OF_ONE_MODEL):
        return Proof(of="nothing", reason="no small twin is made for a model of a pipeline")
    return prove_by_twin(path, loading, way.dtype, way.part, beside=output.parent, capture=capture)


def _prove_saved(graph: ir.Model, output: Path, path: Path, way: Way) -> Proof:
    """Compare a written graph with its model, and write that into it."""
    proof = prove_model(output, path, way.dtype, way.part)
    graph.metadata_props.update(proof.to_metadata())
    save_graph(graph, output)
    return proof


def _with_history(graph: ir.Model, path: Path) -> ir.Model:
    if before := entries_before(history_of(path / MANIFEST)):
        graph.metadata_props[CAPTURED_KEY] = before
    return graph


def _loaded(path: Path, way: Way) -> tuple[ir.Model, Captured]:
    """Return the graph of a checkpoint's model with its weights in memory, and what it was captured from."""
    model, _ = load_model(path, way.dtype, way.replaced, way.part)
    traced, captured = prepare(model, path, way.dtype, way.kv_cache, fused=way.fused, part=way.part)
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
    if traced.has_cache:
        name_total(graph)
    if captured.kind == "denoiser":
        spread_timestep(graph)
    return graph, lower_graph(graph, captured, way.runtime, pack=way.packed).captured


def _in_outline(checkpoint: Checkpoint, loading: Loading, way: Way) -> Kept:
    """Return a checkpoint's graph without its weights.

    Raises:
        CannotOutline: The model can't be traced without its weights.
    """
    import torch

    path, described = checkpoint.folder, list[Captured]()

    def prepared(model: Any) -> Traced:
        traced, captured = prepare(model, path, way.dtype, way.kv_cache, fused=way.fused)
        described.append(captured)
        return traced

    try:
        kept = graph_without_weights(
            checkpoint,
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
    if way.kv_cache:
        name_total(kept.graph)
    lowered = lower_graph(kept.graph, described[-1], way.runtime, pack=way.packed)
    kept.graph.metadata_props.update(lowered.captured.to_metadata())
    parts = {name: own for name, own in kept.parts.items() if name in kept.graph.graph.initializers}
    parts |= {name: stacked([kept.parts[one] for one in of]) for name, of in lowered.packed.items()}
    return replace(kept, parts=parts)


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


def _refuse_sharing(path: Path, folder: Path, trace: Trace, replaced: Collection[str]) -> None:
    if trace == "loaded" or replaced:
        raise OutputError(
            "weights of a model that is loaded do not stay in the checkpoint's files",
            "omit --share-base, or --trace loaded",
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OutputError(
            f"the weights in {path} can't be shared from {folder}: ONNX Runtime reads external data only "
            "from the model's own folder or below it",
            f"write the output into {path}, or omit --share-base",
        )


def _refuse_links_out(checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse weights that lie elsewhere by a link, as in Hugging Face's cache."""
    outside = [
        str(shard.path)
        for shard in checkpoint.shards
        if not shard.path.resolve().is_relative_to(folder.resolve())
    ]
    if outside:
        raise OutputError(
            f"the weights in {checkpoint.folder} can't be shared: they are links out of {folder}, where ONNX "
            "Runtime does not read them",
            "omit --share-base, or copy the folder with what its links lead to",
            outside,
        )


def _save(
    graph: ir.Model, output: Path, linked: Collection[ir.Value] = (), folder: Path | None = None
) -> ir.Model:
    """Write a graph and its data; return it with the data outside.

    Args:
        graph: The graph.
        output: The file.
        linked: Constants that stay where they are.
        folder: Folder that these are named from.
    """
    import onnx_ir as ir
    from onnx_ir.external_data import unload_from_model

    tell_stage("writing the graph as it was traced")
    data = output.parent / f"{output.name}.data"
    kept = {value: value.const_value for value in linked}
    for value in linked:
        value.const_value = None
    graph = unload_from_model(graph, output.parent, data.name, size_threshold_bytes=_INLINE_BYTES)
    for value, tensor in kept.items():
        value.const_value = tensor
    if is_file(data) and not data.stat().st_size:
        data.unlink()
    files = {data.name: hash_written(data, data.name)} if is_file(data) else {}
    for place in {str(tensor.location) for tensor in kept.values() if isinstance(tensor, ir.ExternalTensor)}:
        files[place] = hash_shared((folder or output.parent) / place)
    mark_data(graph, files)
    save_graph(graph, output)
    return graph
