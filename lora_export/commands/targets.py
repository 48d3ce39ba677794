"""`lora-export targets`: list the GPUs that engines are built for."""

from __future__ import annotations

import json

import click

from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb
from lora_export.errors import BackendError
from lora_export.machines.targets import COMPILERS, PRECISIONS, select_targets

# The user has just run the verb: only filters and options have to go.
_ALL = "omit filters and options to list all GPUs"


@click.command(cls=Verb, short_help="List GPUs: compute capability, memory, precisions, compilers.")
@click.argument("words", metavar="[FILTER]...", nargs=-1)
@click.option("--compiler", type=click.Choice(COMPILERS), help="Only GPUs that this compiler builds for.")
@click.option("--compute-capability", metavar="X.Y", help="Only GPUs of this compute capability: 8.9, sm89.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help="Only GPUs whose tensor cores have this precision."
)
@click.option(
    "--min-memory", type=click.FloatRange(min=0), metavar="GB", help="Only GPUs with at least this memory."
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, with each GPU's source.")
def targets(
    words: tuple[str, ...],
    compiler: str | None,
    compute_capability: str | None,
    precision: str | None,
    min_memory: float | None,
    as_json: bool,
) -> None:
    """List the GPUs that engines are built for; each FILTER is part of the name.

    Memory, bandwidth and precisions are the vendor's figures, not measured; int4 means 4-bit weights.
    tensorrt-rtx builds on any machine, tensorrt on a GPU of the same kind.

    \b
    Examples:
      lora-export targets laptop --min-memory 8
      lora-export targets orin
      lora-export targets --compiler tensorrt-rtx --precision fp8
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.reports.targets import hint_lines, target_lines

    try:
        found = select_targets(
            words,
            compiler=compiler,
            compute_capability=compute_capability,
            precision=precision,
            min_memory_gb=min_memory,
        )
    except BackendError as error:
        error.hint = _ALL
        raise
    if as_json:
        print_json(json.dumps([target.as_dict() for target in found], indent=1, ensure_ascii=False))
    elif found:
        print_lines(target_lines(found))
        print_lines(hint_lines(found), err=True)
    if not found:
        raise BackendError("no GPU meets all of these conditions", _ALL)
