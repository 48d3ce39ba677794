"""`lora-export merge`: adapters into a Hugging Face folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_export.plan import align
from lora_export.progress import byte_progress
from lora_export.rounding import WARN_LOST, WARN_RELATIVE

if TYPE_CHECKING:
    from lora_export.modes.merge_checkpoint import MergeReport

_WORST = 3
# Written out, as the module that knows them imports numpy: --help has to be quick.
DTYPES = ("float32", "float16", "bfloat16")


@click.command(short_help="Merge adapters into a Hugging Face folder, streamed, in little memory.")
@click.option("--base", required=True, type=click.Path(path_type=Path), help="Folder of the base model.")
@click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Trained adapter; several are added up.",
)
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Factor of each adapter, in their order."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Type of the weights written; as the base's if left out."
)
@click.option(
    "--rounding",
    type=click.Choice(["sample", "exact"]),
    default="sample",
    show_default=True,
    help="Measure what rounding cost on evenly spaced blocks of large weights, or on every element.",
)
@click.option("--allow-unmatched", is_flag=True, help="Leave out what has no place in the base.")
@click.option("--force", is_flag=True, help="Replace the output if it is a model's folder.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress and no summary; warnings stay.")
@click.option("--alpha", type=float, help="Numerator of the scaling, where the file doesn't say it.")
@click.option("--rank", type=int, help="Rank, checked against the tensors.")
def merge(
    base: Path,
    adapters: tuple[Path, ...],
    weights: tuple[float, ...],
    output: Path,
    dtype: str | None,
    rounding: str,
    allow_unmatched: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    alpha: float | None,
    rank: int | None,
) -> None:
    """Write the base with the adapters merged into it: W0 + Σ weight · scaling · B · A.

    Computed in float32, rounded once; says what the rounding cost. The output loads like the base.

    \b
    Examples:
      lora-export merge --base my-model --adapter my-adapter -o merged
      lora-export merge --base my-model --adapter a --weight 0.7 --adapter b --weight 0.3 -o blend
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.formats import load_adapter
    from lora_export.modes.merge_checkpoint import merge_checkpoint

    loaded = [load_adapter(path, alpha=alpha, rank=rank) for path in adapters]
    started = time.monotonic()
    with byte_progress("merging", quiet or dry_run) as progress:
        report = merge_checkpoint(
            base,
            loaded,
            output,
            weights=weights or None,
            dtype=dtype,
            allow_unmatched=allow_unmatched,
            force=force,
            dry_run=dry_run,
            rounding="exact" if rounding == "exact" else "sample",
            progress=progress,
        )
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=1, ensure_ascii=False))
    elif dry_run:
        click.echo("\n".join(report.plan.lines()))
        click.echo(f"dry run: {report.size_bytes / 1e9:.3f} GB would be written to {output}")
    elif not quiet:
        click.echo("\n".join(_summary(report, seconds)))
    for line in _warnings(report):
        click.echo(line, err=True)


def _summary(report: MergeReport, seconds: float) -> list[str]:
    placed, total = report.plan.placed, report.total
    lines = [
        f"{report.output}: {len(placed)} parameters merged, "
        f"{report.size_bytes / 1e9:.3f} GB in {seconds:.1f} s"
    ]
    lines += [f"note: {note}" for note in report.plan.notes]
    if not report.roundings:
        return lines
    worst = sorted(report.roundings.values(), key=lambda r: (-r.relative, r.label))[:_WORST]
    table = [("rounding", "error / ‖ΔW‖", "changes lost", "measured")]
    table += [
        (r.label, f"{r.relative:.2%}", f"{r.lost_share:.2%}", f"{r.sampled_share:.0%}")
        for r in [total, *worst]
    ]
    return [*lines, *align(table)]


def _warnings(report: MergeReport) -> Iterator[str]:
    if report.plan.refused:
        names = ", ".join(row.parameter for row in report.plan.refused[:_WORST])
        count = len(report.plan.refused)
        yield f"warning: {count} parameters were left out ({names}, …); lora.json lists them"
    if report.left_out:
        yield f"warning: not copied, they hold unmerged weights: {', '.join(report.left_out)}"
    total = report.total
    if total.relative > WARN_RELATIVE or total.lost_share > WARN_LOST:
        yield (
            "warning: rounding to the stored type lost much of the adapter: "
            f"error {total.relative:.0%} of ‖ΔW‖, {total.lost_share:.0%} of the changed weights are as before"
        )
        yield (
            "hint: --dtype float32 keeps it all, float16 is 8 times finer than bfloat16; "
            "or serve the adapter unmerged"
        )
