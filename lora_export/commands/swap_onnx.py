"""`lora-export swap-onnx`: expose LoRA as inputs of a graph, beside the base's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.commands.options import adapter_options, expose_options, load_all, run_expose
from lora_export.commands.verb import Verb
from lora_export.commands.whole_numbers import Whole
from lora_export.storage.inputs import same_inputs


@click.command(
    "swap-onnx", cls=Verb, short_help="Expose LoRA as inputs of an ONNX graph: adapters change at run time."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Expose the modules that this adapter changes; repeat for several adapters.",
)
@click.option(
    "--target-modules",
    multiple=True,
    help="Expose these modules too, by the ends of their paths: q_proj,v_proj; or all-linear.",
)
@click.option(
    "--max-rank",
    type=Whole(),
    help="Largest rank of an adapter; by default 64, or --adapter's if that is larger.",
)
@click.option("--dora", is_flag=True, help="Also expose DoRA's factor.")
@expose_options
@adapter_options
@same_inputs(command=True)
def swap_onnx(
    base: Path, output: Path, adapters: tuple[Path, ...], target_modules: tuple[str, ...], **options: Any
) -> None:
    """Write the base with y = W x + (x·A)·B beside each target, A and B being inputs of the graph.

    One copy of the weights serves every adapter. Writes OUT.onnx, OUT.onnx.data and OUT.lora.json; if the
    base is in a folder of onnxruntime-genai, also copies the config and tokenizer there. Next:
    convert-adapter.

    \b
    Examples:
      lora-export swap-onnx --base model.onnx --adapter my-adapter -o swap/model.onnx
      lora-export swap-onnx --base model.onnx --target-modules q_proj,v_proj --max-rank 16 -o swap/model.onnx
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.modes import swap_onnx as mode

    names = [name.strip() for given in target_modules for name in given.split(",") if name.strip()]
    if not adapters and not names:
        raise click.UsageError("no modules to expose: give --adapter or --target-modules")
    options |= {"adapter": load_all(adapters, options), "target_modules": names}
    run_expose(
        mode.swap_onnx,
        base,
        output=output,
        arguments=(),
        options=options,
        companions=options["flavour"] == "ort",
    )
