"""Write the base graph of a checkpoint, from which merge, swap and bank graphs can then be made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_export.base.capture.capture import Trace, capture_checkpoint
from lora_export.base.checkpoint.quantised import refuse_packed
from lora_export.base.lowering import Runtime
from lora_export.base.open_base import output_paths
from lora_export.base.pipeline_graphs import open_several
from lora_export.base.reads import files_read
from lora_export.errors import OutputError
from lora_export.graph.onnx_file import load_graph
from lora_export.modes.pipelines.capture import capture_pipeline
from lora_export.modes.quantising.choice import QuantiseChoice, choice_of
from lora_export.modes.quantising.quantise import quantise
from lora_export.modes.quantising.write import QuantiseReport, weight_bytes, write_quantised
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.hashes import FileHash, hash_file
from lora_export.storage.inputs import same_inputs
from lora_export.storage.outputs import OutputSet, make_parent, output_errors, refuse_replacing
from lora_export.untrusted.places import is_file, listed

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CaptureReport:
    """Result of a capture.

    Attributes:
        written: The graph and its data; of several graphs, these.
        quantised: Report of quantising it; None if the weights stay floats.
    """

    written: tuple[Path, ...]
    quantised: QuantiseReport | None = None


@same_inputs()
def capture_onnx(
    checkpoint: PathLike,
    output: PathLike,
    *,
    dtype: str = "float32",
    kv_cache: bool = False,
    trace: Trace = "auto",
    fused: bool = False,
    runtime: Runtime = "portable",
    twin: bool = True,
    share_base: bool = False,
    quantize: str | None = None,
    force: bool = False,
) -> tuple[Path, ...]:
    """Write a Hugging Face checkpoint as ``output`` and ``output.data``, or a pipeline as a folder of graphs.

    Args:
        checkpoint: Folder that ``save_pretrained`` wrote: of a model of transformers or diffusers, or of a
            pipeline of diffusers.
        output: The ``.onnx`` file to write; of a pipeline, or with ``kv_cache`` an encoder–decoder or a
            vision–language model, the folder. Of the last one, a file is its language model alone.
        dtype: Dtype of weights, inputs and outputs: ``float32``, ``float16`` or ``bfloat16``.
        kv_cache: Make keys and values of past tokens inputs and outputs; of an encoder–decoder, write two
            graphs, of a vision–language model three.
        trace: ``loaded`` traces the model with its weights; ``outline`` traces a layer of each kind without
            weights, so that a model larger than memory can be captured; ``auto`` is ``outline`` wherever that
            is possible.
        fused: Write attention, rotary embeddings and RMS norms as one node each (opset 23).
        runtime: ``portable``: operators of ONNX alone. ``ort-cuda``: fused, and with operators of ONNX
            Runtime's own that its CUDA provider is fastest with. Attention over the cache then takes rows
            that are padded on the right only, and several tokens behind a past in one row only.
        twin: Compare the graph with PyTorch in ONNX Runtime before it is written: that of a small model with
            its own weights, that of a large one by a twin, a small random model that is captured in the same
            way. The graph's metadata says what was compared.
        share_base: Leave weights in the checkpoint's own files, where these hold them in this dtype; for an
            output in the checkpoint's folder or above it. There may then be no data file.
        quantize: Quantise the weights to ``int4`` or ``int8`` as `quantize_onnx` does by default; a manifest
            ``*.lora.json`` is written as well.
        force: Replace existing output files.

    Returns:
        The graph and its data; of a pipeline, all graphs.

    Raises:
        LoraExportError: As `capture.capture_checkpoint`; `OutputError` if a file exists or the name does not
            end in ``.onnx``.
    """
    report = capture(
        checkpoint,
        output,
        dtype=dtype,
        kv_cache=kv_cache,
        trace=trace,
        fused=fused,
        runtime=runtime,
        twin=twin,
        share_base=share_base,
        quantize=quantize,
        force=force,
    )
    return report.written


@same_inputs()
def capture(
    checkpoint: PathLike,
    output: PathLike,
    *,
    dtype: str,
    kv_cache: bool,
    trace: Trace,
    fused: bool,
    runtime: Runtime,
    twin: bool,
    share_base: bool,
    quantize: str | None,
    force: bool,
    progress: Callable[[int], None] | None = None,
) -> CaptureReport:
    """Capture as `capture_onnx` does, and return the report; ``progress`` gets the bytes just written."""
    choice = choice_of(quantize)
    if choice is not None and share_base:
        raise _codes_are_new()
    graph = Path(output)
    pipeline = open_several(Path(checkpoint), kv_cache, graph)
    if pipeline is not None:
        pipeline.refuse_options(
            {"--share-base": share_base, "--quantize": choice is not None}
            | ({"--kv-cache": kv_cache, "--fused": fused} if pipeline.index else {})
            | {"--runtime": runtime != "portable", "--trace outline": trace == "outline"}
        )
        written = capture_pipeline(pipeline, graph, dtype, fused=fused, force=force, proven=twin)
        return CaptureReport(written)
    paths = output_paths(graph)
    if choice is None:
        del paths["manifest"]
    refuse_packed(Path(checkpoint))
    reads = files_read(Path(checkpoint), ())
    refuse_replacing(list(paths.values()), force, reads)
    make_parent(graph)
    with (
        output_errors(graph),
        OutputSet(force, reads) as outputs,
        # The folder is beside the output, so that gigabytes are renamed and not copied.
        scratch_folder(graph.parent) as scratch,
    ):
        made = capture_checkpoint(
            checkpoint,
            scratch / graph.name,
            dtype=dtype,
            kv_cache=kv_cache,
            trace=trace,
            fused=fused,
            runtime=runtime,
            packed=not share_base,  # what is packed is in no file of the checkpoint
            proven=twin,
            share_from=graph.parent if share_base else None,
        )
        if choice is None:
            _put_in_place(made, graph, paths["data"], outputs)
            return CaptureReport((graph, paths["data"]))
        weights = [hash_file(path) for path in _weights(Path(checkpoint))]
        report = _quantised(made, choice, paths, weights, outputs=outputs, progress=progress)
        outputs.commit()
    return CaptureReport((graph, paths["data"]), report)


def _put_in_place(made: Path, graph: Path, data: Path, outputs: OutputSet) -> None:
    """Give the captured graph and its data, which it may lack, their names."""
    has_data = is_file(made.with_name(data.name))
    if has_data:
        made.with_name(data.name).replace(outputs.stage(data))
    made.replace(outputs.stage(graph))
    outputs.commit()
    if not has_data:
        data.unlink(missing_ok=True)  # of the graph that was here before


def _weights(checkpoint: Path) -> list[Path]:
    return sorted([*listed(checkpoint, "*.safetensors"), *listed(checkpoint, "config.json")])


def _quantised(
    made: Path,
    choice: QuantiseChoice,
    paths: dict[str, Path],
    base: list[FileHash],
    *,
    outputs: OutputSet,
    progress: Callable[[int], None] | None,
) -> QuantiseReport:
    """Quantise the captured graph on its way to the output."""
    opened = load_graph(made)
    before = weight_bytes(opened)
    quantising = quantise(opened, choice)
    report = QuantiseReport(
        quantised=quantising.quantised, outputs=paths, size_bytes=weight_bytes(opened), before_bytes=before
    )
    return write_quantised(
        quantising, report, mode="capture-onnx", base=base, outputs=outputs, progress=progress
    )


def _codes_are_new() -> OutputError:
    return OutputError(
        "codes are new bytes, which the checkpoint's files don't hold",
        "omit --share-base, or capture without --quantize",
    )
