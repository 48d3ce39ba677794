"""`lora-export quantize-onnx`: quantise the weights of an ONNX graph."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from lora_export.commands.printing import print_json, print_lines, print_warnings
from lora_export.commands.verb import Verb
from lora_export.commands.whole_numbers import WholeNumber
from lora_export.modes.quantising import METHODS
from lora_export.storage.inputs import same_inputs

_PATH = click.Path(path_type=Path)


@click.command("quantize-onnx", cls=Verb, short_help="Quantise the weights of an ONNX graph to 4 or 8 bits.")
@click.argument("graph", type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="The .onnx file to write.")
@click.option("--to", type=click.Choice(["int4", "int8"]), required=True, help="Type of the codes.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="rtn",
    show_default=True,
    help="ONNX Runtime's quantiser: rtn rounds to the nearest code; k-quant and hqq lose less, have zero "
    "points, and take some twenty times as long.",
)
@click.option(
    "--block-size",
    type=click.Choice(["16", "32", "64", "128"]),
    default="32",
    show_default=True,
    help="How many values share a scale.",
)
@click.option(
    "--asymmetric",
    is_flag=True,
    help="With zero points, which TensorRT doesn't take; k-quant and hqq always have them.",
)
@click.option(
    "--accuracy-level",
    type=WholeNumber(0),
    default=0,
    show_default=True,
    help="How ONNX Runtime may round activations: 4 to 8 bits, which is faster on a CPU; 0: as it likes.",
)
@click.option(
    "--keep", multiple=True, metavar="NAME", help="Leave modules in float, by the end of their path; repeat."
)
@click.option("--head", is_flag=True, help="Quantise the head too, the product that makes the logits.")
@click.option("--embeddings", is_flag=True, help="Quantise embeddings too.")
@click.option("--force", is_flag=True, help="Replace existing output files.")
@click.option("--dry-run", is_flag=True, help="Print what would happen to each weight; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print no progress and no summary.")
@same_inputs(command=True)
def quantize_onnx(graph: Path, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write GRAPH with the weights of its products as codes with scales: MatMulNBits, of ONNX Runtime.

    One weight is in memory at a time. Exposed LoRA stays as it is. Embeddings and the head stay in float
    unless asked for. Writes OUT.onnx, OUT.onnx.data and OUT.lora.json (each weight, and what it lost); if the
    graph is in a folder of onnxruntime-genai, also copies the config and tokenizer there.

    \b
    Examples:
      lora-export quantize-onnx base/model.onnx --to int4 -o int4/model.onnx
      lora-export quantize-onnx swap/model.onnx --to int8 --head --keep down_proj -o int8/model.onnx
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.base.reads import files_read
    from lora_export.modes import quantize_onnx as mode
    from lora_export.packages.onnxruntime_genai import companions_of
    from lora_export.progress import byte_progress
    from lora_export.reports import quantise as text

    options["block_size"] = int(options["block_size"])
    options["symmetric"] = False if options.pop("asymmetric") else None
    dry_run: bool = options["dry_run"]
    started = time.monotonic()
    beside = companions_of(graph, output, options["force"])
    if not dry_run:
        beside.check(files_read(graph, ()))
        options["beside"] = beside.files
    with byte_progress(f"writing {output}", quiet or dry_run) as progress:
        report = mode.quantize_onnx(graph, output, progress=progress, **options)
    if as_json:
        print_json(text.report_json(report))
    elif dry_run:
        print_lines(text.plan_lines(report))
    elif not quiet:
        copied = [f"wrote {output.parent / name}" for name in beside.files]
        print_lines([*text.summary_lines(report, time.monotonic() - started), *copied])
    print_warnings(beside.notes)
