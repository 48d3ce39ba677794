"""`lora-export merge`: merge adapters into a Hugging Face folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from lora_export.commands.options import load_all, merge_options, print_merge
from lora_export.commands.verb import Verb
from lora_export.storage.inputs import same_inputs

_FINER = (
    "--dtype float32 keeps all of it, float16 is 8 times finer than bfloat16; or serve the adapter unmerged"
)
# Written out because the module that defines them imports numpy, and --help has to be quick.
DTYPES = ("float32", "float16", "bfloat16")


@click.command(cls=Verb, short_help="Merge adapters into a Hugging Face folder, with little memory.")
@click.option("--base", required=True, type=click.Path(path_type=Path), help="Folder of the base model.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Type of the written weights; by default the base's."
)
@click.option(
    "--resize", is_flag=True, help="Add rows for new tokens to the base, where the adapter holds them whole."
)
@click.option("--force", is_flag=True, help="Replace the output folder if an earlier merge wrote it.")
@merge_options
@same_inputs(command=True)
def merge(
    base: Path, adapters: tuple[Path, ...], output: Path, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write the base with the adapters merged into it: W0 + Σ weight · scaling · B · A.

    It is computed in float32 and rounded once; what the rounding cost is printed. The output loads like the
    base.

    \b
    Examples:
      lora-export merge --base my-model --adapter my-adapter -o merged
      lora-export merge --base my-model --adapter a --weight 0.7 --adapter b --weight 0.3 -o blend
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.modes.merge_checkpoint import merge_checkpoint
    from lora_export.progress import byte_progress

    loaded = load_all(adapters, options)
    started = time.monotonic()
    with byte_progress(f"writing {output}", quiet or options["dry_run"]) as progress:
        report = merge_checkpoint(base, loaded, output, progress=progress, **options)
    print_merge(report, time.monotonic() - started, as_json=as_json, quiet=quiet, finer=_FINER)
