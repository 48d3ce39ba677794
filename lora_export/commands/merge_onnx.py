"""`lora-export merge-onnx`: adapters into the weights of an ONNX graph."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from lora_export.commands.options import adapter_options, load_adapters

_PATH = click.Path(path_type=Path)


@click.command("merge-onnx", short_help="Merge adapters into an ONNX graph, or into a checkpoint as ONNX.")
@click.option("--base", required=True, type=_PATH, help="An ONNX file, or a Hugging Face checkpoint folder.")
@click.option(
    "--adapter", "adapters", required=True, multiple=True, type=_PATH, help="Folder or file; repeat to blend."
)
@click.option("-o", "--output", required=True, type=_PATH, help="The .onnx file to write.")
@click.option(
    "--checkpoint",
    type=_PATH,
    help="Folder of the checkpoint that the graph was exported from: find and verify weights by value.",
)
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Factor on an adapter; one for each --adapter."
)
@click.option("--share-base", is_flag=True, help="Leave unchanged weights in the base's own data files.")
@click.option(
    "--rounding",
    type=click.Choice(["sample", "exact"]),
    default="sample",
    show_default=True,
    help="Measure what rounding cost on evenly spaced blocks of large weights, or on every element.",
)
@adapter_options
@click.option("--allow-unmatched", is_flag=True, help="Go on without the tensors that have no place.")
@click.option("--force", is_flag=True, help="Replace existing output files.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress and no summary; warnings stay.")
def merge_onnx(
    base: Path, adapters: tuple[Path, ...], output: Path, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Merge adapters into an ONNX graph: W' = W0 + scaling·B·A, at no cost when the model runs.

    Writes OUT.onnx, OUT.onnx.data and OUT.lora.json (what went where, hashes, what rounding cost).

    \b
    Examples:
      lora-export merge-onnx --base model.onnx --adapter my-adapter -o merged/model.onnx
      lora-export merge-onnx --base hf-folder --adapter my-adapter -o merged/model.onnx
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.modes import merge_onnx as mode
    from lora_export.progress import byte_progress
    from lora_export.reports import merge as text

    loaded = load_adapters(adapters, options)
    started = time.monotonic()
    if base.is_dir() and not quiet:
        click.echo(
            f"capturing {base} with torch.onnx (seconds for a small model, minutes for 1B) …", err=True
        )
    with byte_progress(f"writing {output}", quiet or options["dry_run"]) as progress:
        report = mode.merge_onnx(base, loaded, output, progress=progress, **options)
    if as_json:
        click.echo(text.merge_json(report))
    elif report.dry_run:
        click.echo("\n".join(text.plan_lines(report)))
    elif not quiet:
        click.echo("\n".join(text.summary_lines(report, time.monotonic() - started)))
        if options["checkpoint"] is None and not base.is_dir():
            click.echo("note: found by name alone; --checkpoint BASE_DIR would also compare the values")
    finer = "a float32 or float16 base keeps more of it, and so does serving the adapter unmerged"
    for line in text.warning_lines(report, finer):
        click.echo(line, err=True)
