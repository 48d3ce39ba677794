"""Write the base graph of a checkpoint, from which merge, swap and bank graphs can then be made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lora_export.base.capture.capture import Trace, capture_checkpoint
from lora_export.base.open_base import output_paths
from lora_export.base.pipeline_graphs import is_pipeline
from lora_export.base.reads import files_read
from lora_export.errors import OutputError
from lora_export.modes.pipelines.capture import capture_pipeline
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.inputs import same_inputs
from lora_export.storage.outputs import OutputSet, make_parent, output_errors, refuse_replacing
from lora_export.untrusted.places import is_file

PathLike = str | os.PathLike[str]


@same_inputs()
def capture_onnx(
    checkpoint: PathLike,
    output: PathLike,
    *,
    dtype: str = "float32",
    kv_cache: bool = False,
    trace: Trace = "auto",
    fused: bool = False,
    twin: bool = True,
    share_base: bool = False,
    force: bool = False,
) -> tuple[Path, ...]:
    """Write a Hugging Face checkpoint as ``output`` and ``output.data``, or a pipeline as a folder of graphs.

    Args:
        checkpoint: Folder that ``save_pretrained`` wrote: of a model of transformers or diffusers, or of a
            pipeline of diffusers.
        output: The ``.onnx`` file to write; of a pipeline, the folder.
        dtype: Dtype of weights, inputs and outputs: ``float32``, ``float16`` or ``bfloat16``.
        kv_cache: Make keys and values of past tokens inputs and outputs; for decoders.
        trace: ``loaded`` traces the model with its weights; ``outline`` traces a layer of each kind without
            weights, so that a model larger than memory can be captured; ``auto`` is ``outline`` wherever that
            is possible.
        fused: Write attention, rotary embeddings and RMS norms as one node each (opset 23).
        twin: Compare the graph with PyTorch in ONNX Runtime before it is written: that of a small model with
            its own weights, that of a large one by a twin, a small random model that is captured in the same
            way. The graph's metadata says what was compared.
        share_base: Leave weights in the checkpoint's own files, where these hold them in this dtype; for an
            output in the checkpoint's folder or above it. There may then be no data file.
        force: Replace existing output files.

    Returns:
        The graph and its data; of a pipeline, all graphs.

    Raises:
        LoraExportError: As `capture.capture_checkpoint`; `OutputError` if a file exists or the name does not
            end in ``.onnx``.
    """
    graph = Path(output)
    if is_pipeline(Path(checkpoint)):
        given = {"--kv-cache": kv_cache, "--fused": fused, "--share-base": share_base}
        _refuse_options(Path(checkpoint), given | {"--trace outline": trace == "outline"})
        return capture_pipeline(Path(checkpoint), graph, dtype, force=force, proven=twin)
    data = output_paths(graph)["data"]
    reads = files_read(Path(checkpoint), ())
    refuse_replacing([graph, data], force, reads)
    make_parent(graph)
    with (
        output_errors(graph),
        OutputSet(force, reads) as outputs,
        # The folder is beside the output, so that gigabytes are renamed and not copied.
        scratch_folder(graph.parent) as scratch,
    ):
        made = scratch / graph.name
        capture_checkpoint(
            checkpoint,
            made,
            dtype=dtype,
            kv_cache=kv_cache,
            trace=trace,
            fused=fused,
            proven=twin,
            share_from=graph.parent if share_base else None,
        )
        has_data = is_file(made.with_name(data.name))
        if has_data:
            made.with_name(data.name).replace(outputs.stage(data))
        made.replace(outputs.stage(graph))
        outputs.commit()
        if not has_data:
            data.unlink(missing_ok=True)  # of the graph that was here before
    return graph, data


def _refuse_options(pipeline: Path, flags: Mapping[str, bool]) -> None:
    """Refuse options for one model of transformers."""
    given = " and ".join(flag for flag, is_given in flags.items() if is_given)
    if given:
        raise OutputError(
            f"{pipeline} is a pipeline of several models, for which there is no {given}",
            f"omit {given}, or give the folder of one of its models",
        )
