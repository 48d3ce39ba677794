"""`lora-export convert-adapter`: write an adapter as the tensors that a graph with exposed LoRA takes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands.options import load_all, reading_options
from lora_export.commands.printing import print_json, print_lines, print_warnings
from lora_export.commands.verb import Verb
from lora_export.formats import WRITERS
from lora_export.storage.inputs import same_inputs
from lora_export.untrusted.places import exists
from lora_export.untrusted.shown import limited

if TYPE_CHECKING:
    from lora_export.modes.convert_adapter import ConvertReport

_PATH = click.Path(path_type=Path)


@click.command("convert-adapter", cls=Verb, short_help="Convert an adapter for a graph with exposed LoRA.")
@click.argument("adapter", type=_PATH)
@click.option("--for", "graph", required=True, type=_PATH, help="The .onnx file that the adapter is for.")
@click.option("-o", "--output", required=True, type=_PATH, help="File or folder to write.")
@click.option("--format", type=click.Choice(list(WRITERS)), help="By default chosen by the output's name.")
@click.option("--any-base", is_flag=True, help="Accept an adapter of another base.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--allow-unmatched", is_flag=True, help="Leave out modules that have no site in the graph.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print no summary; only warnings.")
@reading_options
@same_inputs(command=True)
def convert_adapter(adapter: Path, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write ADAPTER as tensors for the LoRA inputs of a graph: checked, in its layout, scaling folded in.

    Formats: onnx_adapter for onnxruntime and onnxruntime-genai; safetensors for AdapterSession, with the
    adapter's whole provenance; edge-llm, a folder for TensorRT-Edge-LLM; genai for graphs whose LoRA inputs
    were made by onnxruntime-genai's own builder.

    \b
    Examples:
      lora-export convert-adapter my-adapter --for swap.onnx -o my-adapter.onnx_adapter
      lora-export convert-adapter my-adapter --for swap.onnx -o edge --format edge-llm
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.modes import convert_adapter as convert

    started = time.monotonic()
    target = options.pop("format")
    options["format"] = options.pop("from_format")
    (loaded,) = load_all([adapter], options)
    report = convert.convert_adapter(loaded, output=output, format=target, **options)
    if as_json:
        print_json(json.dumps(report.as_dict(), indent=1, sort_keys=True, ensure_ascii=False))
    elif report.dry_run or not quiet:
        _print(report, time.monotonic() - started)
    print_warnings(
        [
            *(f"warning: {warning}" for warning in report.warnings),
            *(f"warning: left out: {row.parameter}: {row.reason}" for row in report.plan.refused),
        ]
    )


def _print(report: ConvertReport, seconds: float) -> None:
    from lora_export.reports.merge import size_text

    size = size_text(report.size_bytes)
    if report.dry_run:
        lines = [*report.plan.lines(), f"dry run: {size} would be written"]
        if exists(report.output):
            lines.append(f"note: {report.output} exists already: give --force to replace it")
        print_lines(lines)
        return
    ranks = sorted(set(report.ranks.values()))
    rank_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}"
    done = (
        f"converted {len(report.ranks)} modules ({rank_text}, {size}) for {report.graph} in {seconds:.1f} s"
    )
    notes = [f"note: {note}" for note in report.notes if note not in report.warnings]
    print_lines([done, *limited(notes, "notes"), f"wrote {report.output}"])
