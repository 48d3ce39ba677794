"""`lora-export inspect`: what an adapter file holds."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands.options import adapter_options, load_adapters
from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb
from lora_export.progress import spoken
from lora_export.reports import ADAPTER_PLOTS
from lora_export.storage.inputs import same_inputs

if TYPE_CHECKING:
    from lora_export.adapter import Adapter
    from lora_export.reports.adapter.facts import AdapterReport


@click.command(
    cls=Verb, short_help="Show what an adapter holds (modules, ranks, scaling, ‖ΔW‖), or what a file is."
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Base model, to say the share: a Hugging Face folder or an ONNX file.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Everything as one JSON object, singular values included."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help=f"Also draw the spectra: .{', .'.join(ADAPTER_PLOTS)}."
)
@click.option("--force", is_flag=True, help="Replace the plot if it exists.")
@click.option("--modules", is_flag=True, help="List all modules of a large adapter, not their kinds.")
@adapter_options
def inspect(
    adapter: Path,
    base: Path | None,
    as_json: bool,
    plot: Path | None,
    force: bool,
    modules: bool,
    **options: Any,
) -> None:
    """Show what ADAPTER holds: a PEFT folder, or a .safetensors, .bin or .pt file.

    Or what else lora-export reads and writes is: an .onnx graph, its manifest, an .engine or its record, a
    build kit, a folder for onnxruntime-genai.

    For each module: rank, alpha, scaling, shapes, dtype, ‖ΔW‖, and how many directions hold 90 % and 99 % of
    its energy, which is why small ranks suffice. Of many modules the kinds come first; --modules lists all.

    \b
    Examples:
      lora-export inspect my-adapter --base my-model --plot spectra.html
      lora-export inspect swap/model.onnx
      lora-export inspect engines/model.rtx-4090.engine
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.reports.artefact import read_artefact

    if (found := read_artefact(adapter)) is not None:
        _refuse_options(found.kind, adapter, {"--base": base, "--plot": plot, **options})
        if as_json:
            print_json(
                json.dumps(found.as_dict(), indent=1, sort_keys=True, ensure_ascii=False, default=list)
            )
        else:
            print_lines(found.lines)
        return
    from lora_export.reports.adapter.facts import inspect_adapter
    from lora_export.reports.adapter.to_text import plain_lines, print_table

    if plot is not None and plot.suffix[1:] not in ADAPTER_PLOTS:
        raise click.BadParameter(f"{plot} doesn't end in .{', .'.join(ADAPTER_PLOTS)}", param_hint="--plot")
    with same_inputs(at_end=True):
        (loaded,) = load_adapters([adapter], options)
        report = inspect_adapter(loaded, base)
    if plot is not None:
        _draw(report, plot, force, _files_read(loaded, base))
    if as_json:
        print_json(json.dumps(report.to_json(), indent=2))
    elif sys.stdout.isatty():
        spoken(lambda: print_table(report, modules))
    else:
        print_lines(plain_lines(report, modules))


def _refuse_options(kind: str, path: Path, others: dict[str, Any]) -> None:
    """Raise a usage error for options that are about adapters."""
    if given := [name for name, value in others.items() if value is not None]:
        named = ", ".join(f"--{name.lstrip('-')}" for name in given)
        article = "an" if kind[0] in "aeio" else "a"
        raise click.UsageError(f"{path} is {article} {kind}: leave out {named}")


def _files_read(adapter: Adapter, base: Path | None) -> list[Path]:
    from lora_export.base.reads import files_read, graph_files
    from lora_export.formats.reading.weights_files import files_of
    from lora_export.graph.onnx_file import load_graph

    if base is None:
        return files_of(adapter.source)
    data = [] if base.is_dir() else graph_files(load_graph(base))
    return [*data, *files_read(base, [adapter])]


def _draw(report: AdapterReport, plot: Path, force: bool, reads: list[Path]) -> None:
    from lora_export.storage.outputs import OutputSet

    module, _, attribute = ADAPTER_PLOTS[plot.suffix[1:]].partition(":")
    with OutputSet(force, reads) as outputs:
        getattr(import_module(module), attribute)(report, outputs.stage(plot), plot.suffix[1:])
        outputs.commit()
    print_lines([f"wrote {plot}"], err=True)
