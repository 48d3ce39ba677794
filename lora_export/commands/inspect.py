"""`lora-export inspect`: show what an adapter file holds, or what an engine is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands.options import adapter_options, load_all, report_option
from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb
from lora_export.progress import is_terminal, spoken
from lora_export.reports import PICTURES
from lora_export.storage.inputs import same_inputs
from lora_export.untrusted.json_text import json_text
from lora_export.untrusted.places import is_folder

if TYPE_CHECKING:
    from lora_export.adapter import Adapter


# What --plot took before there was --report.
_PLOTS = ("html", *PICTURES)


@click.command(
    cls=Verb, short_help="Show what an adapter holds (modules, ranks, scaling, ‖ΔW‖), or what a file is."
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Base of the adapter, to show what share of it changes: a Hugging Face folder or an ONNX file.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print everything as one JSON object, singular values included."
)
@report_option("adapter")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help=f"Draw the spectra: .{', .'.join(_PLOTS)}, as --report does.",
)
@click.option("--force", is_flag=True, help="Replace existing reports.")
@click.option("--modules", is_flag=True, help="List all modules of a large adapter, not their kinds.")
@adapter_options
def inspect(
    adapter: Path,
    base: Path | None,
    as_json: bool,
    reports: tuple[Path, ...],
    plot: Path | None,
    force: bool,
    modules: bool,
    **options: Any,
) -> None:
    """Show what ADAPTER holds: a PEFT folder, or a .safetensors, .bin or .pt file.

    Or what else lora-export reads and writes is: an .onnx graph, its manifest, an .engine or its record, a
    build kit, a folder for onnxruntime-genai.

    For each module: rank, alpha, scaling, shapes, dtype, ‖ΔW‖, and how many directions hold 90 % and 99 % of
    its energy (few do, which is why small ranks suffice). Of many modules the kinds come first; --modules
    lists all.

    \b
    Examples:
      lora-export inspect my-adapter --base my-model --report spectra.html
      lora-export inspect swap/model.onnx
      lora-export inspect engines/model.rtx-4090.engine
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.reports.artefact import read_artefact

    if (found := read_artefact(adapter)) is not None:
        given = {"--base": base, "--report": reports or None, "--plot": plot, **options}
        _refuse_options(found.kind, adapter, given)
        if as_json:
            print_json(json_text(found.as_dict(), sort_keys=True, allow_nan=False, default=list))
        else:
            print_lines(found.lines)
        return
    from lora_export.reports.adapter.facts import inspect_adapter
    from lora_export.reports.adapter.to_json import report_json
    from lora_export.reports.adapter.to_text import plain_lines, print_table
    from lora_export.reports.files import asked_for, ending_problem, write_reports

    if plot is not None and plot.suffix[1:] not in _PLOTS:
        raise click.BadParameter(f"{plot} doesn't end in .{' or .'.join(_PLOTS)}", param_hint="--plot")
    files = asked_for("adapter", reports, plot=(plot, plot.suffix[1:] if plot is not None else ""))
    if problems := [why for file in files if (why := ending_problem("adapter", file))]:
        raise click.UsageError("; ".join(problems))
    with same_inputs(at_end=True):
        (loaded,) = load_all([adapter], options)
        report = inspect_adapter(loaded, base)
    if files:
        for path in write_reports(
            "adapter", report, files=files, force=force, reads=_files_read(loaded, base)
        ):
            print_lines([f"wrote {path}"], err=True)
    if as_json:
        print_json(report_json(report).rstrip("\n"))
    elif is_terminal(sys.stdout):
        spoken(lambda: print_table(report, modules))
    else:
        print_lines(plain_lines(report, modules))


def _refuse_options(kind: str, path: Path, others: dict[str, Any]) -> None:
    """Raise a usage error for options that are about adapters."""
    if given := [name for name, value in others.items() if value is not None]:
        named = ", ".join(f"--{name.lstrip('-')}" for name in given)
        article = "an" if kind[0] in "aeio" else "a"
        raise click.UsageError(f"{path} is {article} {kind}: omit {named}")


def _files_read(adapter: Adapter, base: Path | None) -> list[Path]:
    from lora_export.base.reads import files_read, graph_files
    from lora_export.formats.reading.weights_files import files_of
    from lora_export.graph.onnx_file import load_graph

    if base is None:
        return files_of(adapter.source)
    data = [] if is_folder(base) else graph_files(load_graph(base))
    return [*data, *files_read(base, [adapter])]
