"""`lora-export merge-onnx`: merge adapters into the weights of an ONNX graph."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from lora_export.commands.options import (
    capture_options,
    checkpoint_options,
    load_all,
    merge_options,
    print_merge,
    quantize_option,
    read_checkpoint_options,
)
from lora_export.commands.printing import print_lines
from lora_export.commands.verb import Verb
from lora_export.storage.inputs import same_inputs
from lora_export.untrusted.places import is_folder

_PATH = click.Path(path_type=Path)


@click.command(
    "merge-onnx",
    cls=Verb,
    short_help="Merge adapters into an ONNX graph, or export a merged checkpoint to ONNX.",
)
@click.option(
    "--base", required=True, type=_PATH, help="An ONNX file, or a folder of transformers or diffusers."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=_PATH,
    help="The .onnx file to write; of a diffusers pipeline, or with --kv-cache of an encoder–decoder or a "
    "vision–language model, the folder of its graphs.",
)
@checkpoint_options
@capture_options
@quantize_option
@click.option("--share-base", is_flag=True, help="Leave unchanged weights in the base's data files.")
@click.option("--force", is_flag=True, help="Replace existing output files.")
@merge_options
@same_inputs(command=True)
def merge_onnx(
    base: Path, adapters: tuple[Path, ...], output: Path, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Merge adapters into an ONNX graph: W' = W0 + scaling·B·A. The model runs as fast as the base.

    Writes OUT.onnx, OUT.onnx.data and OUT.lora.json (what went where, hashes, what rounding cost). Of a
    pipeline of diffusers it writes OUT/unet/model.onnx, OUT/text_encoder/model.onnx, …: an adapter file with
    several components goes into all of them at once.

    \b
    Examples:
      lora-export merge-onnx --base model.onnx --adapter my-adapter -o merged/model.onnx
      lora-export merge-onnx --base hf-folder --kv-cache --dtype float16 --adapter my-adapter -o m/model.onnx
      lora-export merge-onnx --base sdxl-pipeline --adapter lora.safetensors -o graphs
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.modes import merge_onnx as mode
    from lora_export.progress import byte_progress

    read_checkpoint_options(options)
    loaded = load_all(adapters, options)
    started = time.monotonic()
    with byte_progress(f"writing {output}", quiet or options["dry_run"]) as progress:
        report = mode.merge_onnx(base, loaded, output, progress=progress, **options)
    finer = "a float32 or float16 base keeps more of it; so does serving the adapter unmerged"
    print_merge(report, time.monotonic() - started, as_json=as_json, quiet=quiet, finer=finer)
    compared = any(row.proof == "values" for row in report.plan.placed)
    if options["checkpoint"] is None and not (compared or is_folder(base) or as_json or quiet):
        print_lines(
            ["note: weights were found by name alone; --checkpoint BASE_DIR would also compare their values"],
            err=True,
        )
