"""`lora-export merge-onnx`: adapters into the weights of an ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lora_export.modes.merge_onnx import MergeReport

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
@click.option("--rounding", type=click.Choice(["sample", "exact"]), default="sample", show_default=True)
@click.option("--alpha", type=float, help="Numerator of the scaling, where the adapter's file lacks it.")
@click.option("--rank", type=int, help="Rank, where the adapter's file lacks it.")
@click.option("--component", help="Only this part of the adapter's file: unet, text_encoder, …")
@click.option("--allow-unmatched", is_flag=True, help="Go on without the tensors that have no place.")
@click.option("--force", is_flag=True, help="Replace existing output files.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def merge_onnx(
    base: Path,
    adapters: tuple[Path, ...],
    output: Path,
    alpha: float | None,
    rank: int | None,
    component: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge adapters into an ONNX graph: W' = W0 + scaling·B·A, no cost when the model runs.

    Writes OUT.onnx, OUT.onnx.data and OUT.lora.json (what went where, hashes, rounding).

    \b
    Examples:
      lora-export merge-onnx --base model.onnx --adapter my-adapter -o merged/model.onnx
      lora-export merge-onnx --base hf-folder --adapter my-adapter -o merged/model.onnx
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.formats import load_adapter
    from lora_export.modes import merge_onnx as mode
    from lora_export.progress import byte_progress

    loaded = [load_adapter(path, alpha=alpha, rank=rank, component=component) for path in adapters]
    with byte_progress(f"writing {output}", quiet or dry_run) as progress:
        report = mode.merge_onnx(
            base,
            loaded,
            output,
            weights=options.pop("weights"),
            dry_run=dry_run,
            progress=progress,
            **options,
        )
    _print(report, dry_run, as_json, quiet)


def _print(report: MergeReport, dry_run: bool, as_json: bool, quiet: bool) -> None:
    from lora_export.reports import merge as text

    if as_json:
        click.echo(text.merge_json(report.plan, report.rounding, report.outputs))
    elif dry_run:
        click.echo("\n".join(report.plan.lines()))
    elif not quiet:
        click.echo("\n".join(text.merge_summary(report.plan, report.rounding, report.outputs)), err=True)
    for warning in text.rounding_warnings(report.rounding, "onnx"):
        click.echo(f"warning: {warning}", err=True)
