"""Quantise the weights of a graph to 4 or 8 bits by ONNX Runtime's own quantisers, one weight at a time.

The graph may be captured here, or come from another exporter: weights behind a Transpose, in Gemm, fused by a
builder, beside exposed LoRA, in bodies of If and Loop. Nothing but one weight is in memory, so that the model
may be larger than that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_export.base.open_base import output_paths
from lora_export.errors import GraphError
from lora_export.graph.onnx_file import load_graph
from lora_export.modes.quantising.choice import QuantiseChoice, checked
from lora_export.modes.quantising.quantise import quantise
from lora_export.modes.quantising.write import QuantiseReport, manifest_of, weight_bytes, write_quantised
from lora_export.storage.beside import stage_beside
from lora_export.storage.hashes import hash_file
from lora_export.storage.inputs import same_inputs
from lora_export.storage.outputs import OutputSet, output_errors, refuse_inputs, refuse_replacing
from lora_export.untrusted.places import is_folder
from lora_export.untrusted.shown import command

PathLike = str | os.PathLike[str]


@same_inputs()
def quantize_onnx(
    graph: PathLike,
    output: PathLike,
    *,
    to: str = "int4",
    method: str = "rtn",
    block_size: int = 32,
    symmetric: bool | None = None,
    accuracy_level: int = 0,
    keep: Sequence[str] = (),
    head: bool = False,
    embeddings: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int], None] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> QuantiseReport:
    """Write ``graph`` with its weights as codes to ``output``, ``output.data`` and ``*.lora.json``.

    Args:
        graph: An ONNX file from any exporter; with exposed LoRA, its tensors stay as they are.
        output: The ``.onnx`` file to write.
        to: ``int4`` or ``int8``.
        method: ``rtn`` rounds to the nearest code; ``k-quant`` and ``hqq`` search scales and zero points,
            which takes some twenty times as long.
        block_size: Number of values that share a scale: 16, 32, 64 or 128.
        symmetric: Quantise without zero points, as TensorRT needs it; by default True for ``rtn``, False for
            the others, which can't.
        accuracy_level: How ONNX Runtime may round activations: 4 is 8 bits, faster on a CPU; 0 leaves it to
            ONNX Runtime.
        keep: Modules to leave in float: their path, or what it ends in.
        head: Quantise the head too, the product that makes the logits.
        embeddings: Quantise embeddings too.
        force: Replace existing output files.
        dry_run: Make the plan and write nothing.
        progress: Function that is called with the number of bytes just written.
        beside: Name → content of files that belong beside the graph: written with it, all or none. Existing
            ones stay.

    Returns:
        The plan for each weight, what it cost, and the files.

    Raises:
        GraphError: The graph can't be read, or has no weight that can be quantised like this.
        CheckpointError: A weight has values that are not finite.
        BackendUnavailable: A package that the method needs is not installed.
        OutputError: The output exists or can't be written.
    """
    choice = QuantiseChoice(
        to=to,
        method=method,
        block_size=block_size,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
        keep=tuple(keep),
        head=head,
        embeddings=embeddings,
    )
    choice, _ = checked(choice)
    return _quantise(
        Path(graph),
        Path(output),
        choice,
        force=force,
        dry_run=dry_run,
        progress=progress,
        beside=beside or {},
    )


def _quantise(
    base: Path,
    out: Path,
    choice: QuantiseChoice,
    *,
    force: bool,
    dry_run: bool,
    progress: Callable[[int], None] | None,
    beside: Mapping[str, bytes],
) -> QuantiseReport:
    if is_folder(base):
        capture = ["lora-export", "capture-onnx", base, "--quantize", choice.to, "-o", out]
        raise GraphError(
            f"{base} is a folder, not an ONNX file",
            "capture it first"
            + (f": {words}" if (words := command(capture)) else " with capture-onnx --quantize"),
        )
    paths = output_paths(out)
    refuse_inputs(paths.values(), [base])
    if not dry_run:
        refuse_replacing(list(paths.values()), force)
    opened = load_graph(base)
    reads = [base, *sorted(opened.data_files())]
    refuse_inputs(paths.values(), reads)
    before = weight_bytes(opened)
    quantising = quantise(opened, choice)
    report = QuantiseReport(
        quantised=quantising.quantised,
        outputs=paths,
        size_bytes=weight_bytes(opened),
        before_bytes=before,
        dry_run=dry_run,
    )
    if dry_run:
        return report
    hashes = [hash_file(path) for path in reads]
    with output_errors(out), OutputSet(force, reads) as outputs:
        others = {out.parent / name: content for name, content in beside.items()}
        check = stage_beside(outputs, others, force)
        report = write_quantised(
            quantising,
            report,
            mode="quantize-onnx",
            base=hashes,
            outputs=outputs,
            before=manifest_of(base),
            beside=beside,
            progress=progress,
        )
        outputs.commit(check)
    return report
