"""`lora-export bank-onnx`: keep several adapters in one graph, chosen for each row of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.commands.named_path import split_named
from lora_export.commands.options import adapter_options, expose_options, load_all, run_expose
from lora_export.commands.verb import Verb
from lora_export.commands.whole_numbers import Whole
from lora_export.storage.inputs import same_inputs


def _slots(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse slots without a name or path, or of one name; a callback for click."""
    named = [split_named(entry) for entry in value]
    if wrong := [entry for entry, pair in zip(value, named, strict=True) if not all(pair)]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=PATH", param_hint="--adapter")
    names = [name for name, _ in named]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise click.BadParameter(f"two slots are called {', '.join(sorted(twice))}", param_hint="--adapter")
    return value


@click.command(
    "bank-onnx", cls=Verb, short_help="Keep several adapters in one ONNX graph, chosen by each row."
)
@click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    callback=_slots,
    metavar="NAME=PATH",
    help="A slot's name and its adapter; repeat for each slot.",
)
@click.option(
    "--resident",
    type=click.Choice(["initializers", "inputs"]),
    default="initializers",
    show_default=True,
    help="Adapters as constants, or as inputs, whose slots can be replaced while the graph runs.",
)
@click.option(
    "--slot-rank", type=Whole(), help="With --resident inputs: the largest rank that a slot can hold."
)
@click.option(
    "--batch-input",
    help="Input whose first axis is the batch; by default the first one with a free first axis.",
)
@expose_options
@adapter_options
@same_inputs(command=True)
def bank_onnx(base: Path, output: Path, adapters: tuple[str, ...], **options: Any) -> None:
    """Write a graph of the base with all adapters in it and an input that chooses one for each row.

    ``lora.adapter_weights`` is ``[batch, slots]``: a one-hot row chooses an adapter, zeros choose the base,
    other values blend.

    \b
    Example:
      lora-export bank-onnx --base model.onnx --adapter emotion=a --adapter topic=b -o bank/model.onnx
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.modes import bank_onnx as mode

    named = {name: Path(path) for name, path in map(split_named, adapters) if path}
    loaded = load_all(list(named.values()), options)
    slots = dict(zip(named, loaded, strict=True))
    run_expose(mode.bank_onnx, base, output=output, arguments=(slots,), options=options, companions=False)
