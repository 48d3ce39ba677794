"""`lora-export capture-onnx`: write a checkpoint as a graph, without any adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import click

from lora_export.base.lowering import Runtime
from lora_export.commands.options import quantize_option, runtime_option
from lora_export.commands.printing import print_lines
from lora_export.commands.verb import Verb

_PATH = click.Path(path_type=Path)


@click.command(
    "capture-onnx", cls=Verb, short_help="Write a Hugging Face checkpoint as an ONNX graph: the base."
)
@click.argument("checkpoint", type=_PATH)
@click.option(
    "-o",
    "--output",
    required=True,
    type=_PATH,
    help="The .onnx file to write; of a diffusers pipeline, or with --kv-cache of an encoder–decoder or a "
    "vision–language model, the folder of its graphs.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of weights, inputs and outputs.",
)
@click.option(
    "--kv-cache",
    is_flag=True,
    help="Add the keys and values of past tokens as inputs and outputs; of an encoder–decoder, write two "
    "graphs, and of a vision–language model three, if OUT is no .onnx file.",
)
@click.option(
    "--trace",
    type=click.Choice(["auto", "loaded", "outline"]),
    default="auto",
    show_default=True,
    help="How the graph is made: from the model with its weights (loaded), or from one layer of each kind "
    "without weights (outline), for models larger than memory; auto: in outline where that is possible.",
)
@click.option(
    "--fused",
    is_flag=True,
    help="Write attention, rotary embeddings and RMS norms as one node each (opset 23).",
)
@runtime_option
@click.option(
    "--no-twin",
    is_flag=True,
    help="Do not compare the graph of a small model like this one with PyTorch first.",
)
@click.option("--share-base", is_flag=True, help="Leave the weights in CHECKPOINT's own files.")
@quantize_option
@click.option("--force", is_flag=True, help="Replace existing output files.")
@click.option("--quiet", is_flag=True, help="Print no summary.")
def capture_onnx(
    checkpoint: Path,
    output: Path,
    dtype: str,
    kv_cache: bool,
    trace: Literal["auto", "loaded", "outline"],
    fused: bool,
    runtime: Runtime,
    no_twin: bool,
    share_base: bool,
    quantize: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Write the graph of CHECKPOINT, a folder that save_pretrained wrote, as OUT.onnx and OUT.onnx.data.

    CHECKPOINT is a model of transformers or diffusers, or a pipeline of diffusers, of which OUT becomes a
    folder: OUT/unet/model.onnx, OUT/vae_decoder/model.onnx, … as optimum's pipelines read it. Of an
    encoder–decoder with --kv-cache, OUT becomes a folder with encoder_model.onnx and decoder_model.onnx; of a
    vision–language model one with vision.onnx, embedding.onnx and text.onnx, or OUT.onnx, its language model.

    merge-onnx, swap-onnx and bank-onnx also capture a folder themselves. Capture it once, and each of them
    takes seconds; with --share-base their graphs then use one copy of the weights. To merge into float16 or
    bfloat16, give merge-onnx the folder: it rounds W0 + ΔW once, while the W0 of a captured graph is rounded
    already.

    \b
    Examples:
      lora-export capture-onnx my-model --dtype float16 --kv-cache -o base/model.onnx
      lora-export capture-onnx my-pipeline -o graphs
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.base.checkpoint.checkpoint import read_config
    from lora_export.base.checkpoint.own_code import code_notes
    from lora_export.base.open_base import output_paths
    from lora_export.modes import capture_onnx as mode
    from lora_export.progress import byte_progress
    from lora_export.reports.merge import size_text
    from lora_export.reports.quantised import quantised_lines
    from lora_export.untrusted.places import is_file

    started = time.monotonic()
    with byte_progress(f"writing {output}", quiet) as progress:
        report = mode.capture(
            checkpoint,
            output,
            dtype=dtype,
            kv_cache=kv_cache,
            trace=trace,
            fused=fused,
            runtime=runtime,
            twin=not no_twin,
            share_base=share_base,
            quantize=quantize,
            force=force,
            progress=progress,
        )
    if not quiet:
        graphs = [path for path in report.written if path.suffix == ".onnx"]
        files = [file for graph in graphs for file in (graph, output_paths(graph)["data"]) if is_file(file)]
        size = size_text(sum(file.stat().st_size for file in files if file not in graphs))
        print_lines([f"captured {checkpoint} in {time.monotonic() - started:.1f} s: {size} of weights"])
        if report.quantised is not None:
            print_lines(quantised_lines(report.quantised.quantised))
            files = list(report.quantised.outputs.values())
        print_lines([f"wrote {file}" for file in files])
    print_lines([f"note: {note}" for note in code_notes(read_config(checkpoint))], err=True)
