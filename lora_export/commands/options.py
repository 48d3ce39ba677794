"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_export.formats import FORMATS, load_adapter

if TYPE_CHECKING:
    from lora_export.adapter import Adapter

Command = TypeVar("Command", bound=Callable[..., Any])

_ADAPTER_OPTIONS = [
    click.option("--alpha", type=float, help="Numerator of the scaling, where the file doesn't say it."),
    click.option("--rank", type=int, help="Rank, checked against the tensors."),
    click.option("--rslora", is_flag=True, default=None, help="The scaling is alpha / √rank."),
    click.option("--format", "format", type=click.Choice(list(FORMATS)), help="Where names don't tell it."),
    click.option("--component", help="Only this part of the file: unet, text_encoder, …"),
]


def adapter_options(command: Command) -> Command:
    """Add the options that say what an adapter's file does not; they arrive as `load_adapter` takes them."""
    for option in reversed(_ADAPTER_OPTIONS):
        command = option(command)
    return command


def load_adapters(paths: Iterable[Path], options: dict[str, Any]) -> list[Adapter]:
    """Take the options of `adapter_options` out of ``options`` and load each path with them."""
    taken = {name: options.pop(name) for name in ("alpha", "rank", "rslora", "format", "component")}
    return [load_adapter(path, **taken) for path in paths]
