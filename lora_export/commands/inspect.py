"""`lora-export inspect`: what an adapter file holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands.options import adapter_options, load_adapters, report_option
from lora_export.commands.printing import print_json, print_lines
from lora_export.progress import spoken
from lora_export.reports import PICTURES

if TYPE_CHECKING:
    from lora_export.adapter import Adapter


# What --plot took before there was --report.
_PLOTS = ("html", *PICTURES)


@click.command(short_help="Show what an adapter holds (modules, ranks, scaling, ‖ΔW‖), or an engine.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Base model, to say the share: a Hugging Face folder or an ONNX file.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Everything as one JSON object, singular values included."
)
@report_option("adapter")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help=f"Draw the spectra: .{', .'.join(_PLOTS)}, as --report does.",
)
@click.option("--force", is_flag=True, help="Replace reports that exist.")
@adapter_options
def inspect(
    adapter: Path,
    base: Path | None,
    as_json: bool,
    reports: tuple[Path, ...],
    plot: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Show what ADAPTER holds: a PEFT folder, or a .safetensors, .bin or .pt file; or what an .engine is.

    For each module: rank, alpha, scaling, shapes, dtype, ‖ΔW‖, and how many directions hold 90 % and 99 % of
    its energy, which is why small ranks suffice. For an engine: what it takes, which GPUs it is for.

    \b
    Examples:
      lora-export inspect my-adapter --base my-model --report spectra.html
      lora-export inspect engines/model.rtx-4090.engine
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.engines.record import is_engine

    if is_engine(adapter):
        _inspect_engine(
            adapter, as_json, {"--base": base, "--report": reports or None, "--plot": plot, **options}
        )
        return
    from lora_export.reports.adapter.facts import inspect_adapter
    from lora_export.reports.adapter.to_json import report_json
    from lora_export.reports.adapter.to_text import plain_lines, print_table
    from lora_export.reports.files import asked_for, ending_problem, write_reports

    if plot is not None and plot.suffix[1:] not in _PLOTS:
        raise click.BadParameter(f"{plot} doesn't end in .{', .'.join(_PLOTS)}", param_hint="--plot")
    files = asked_for("adapter", reports, plot=(plot, plot.suffix[1:] if plot is not None else ""))
    if problems := [why for file in files if (why := ending_problem("adapter", file))]:
        raise click.UsageError("; ".join(problems))
    (loaded,) = load_adapters([adapter], options)
    report = inspect_adapter(loaded, base)
    if files:
        for path in write_reports("adapter", report, files, force, _files_read(loaded, base)):
            print_lines([f"wrote {path}"], err=True)
    if as_json:
        print_json(report_json(report).rstrip("\n"))
    elif sys.stdout.isatty():
        spoken(lambda: print_table(report))
    else:
        print_lines(plain_lines(report))


def _inspect_engine(engine: Path, as_json: bool, others: dict[str, Any]) -> None:
    from lora_export.engines.record import read_engine
    from lora_export.reports.engine import record_lines

    if given := [name for name, value in others.items() if value is not None]:
        named = ", ".join(f"--{name.lstrip('-')}" for name in given)
        raise click.UsageError(f"{engine} is an engine: leave out {named}")
    record = read_engine(engine)
    if as_json:
        print_json(record.to_json())
    else:
        print_lines(record_lines(record))


def _files_read(adapter: Adapter, base: Path | None) -> list[Path]:
    from lora_export.base.reads import files_read, graph_files
    from lora_export.formats.reading.weights_files import files_of
    from lora_export.graph.onnx_file import load_graph

    if base is None:
        return files_of(adapter.source)
    data = [] if base.is_dir() else graph_files(load_graph(base))
    return [*data, *files_read(base, [adapter])]
