"""`lora-export parity`: compare an export with what it was exported from; exit code 3 if they differ."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands.named_path import split_named
from lora_export.commands.options import (
    adapter_options,
    load_named,
    report_option,
    shape_option,
    whole_numbers,
)
from lora_export.commands.printing import print_error, print_json, print_lines
from lora_export.commands.verb import Verb
from lora_export.commands.whole_numbers import WholeNumber
from lora_export.errors import LoraExportError, ParityError
from lora_export.progress import is_terminal, stage_progress
from lora_export.storage.inputs import same_inputs

if TYPE_CHECKING:
    from lora_export.parity.result import ParityReport
    from lora_export.reports.files import ReportFile

_PATH = click.Path(path_type=Path)


def _finite(_context: click.Context, _parameter: click.Parameter, values: tuple[float, ...]) -> Any:
    """Refuse ``nan`` and ``inf``, which click accepts as numbers."""
    if wrong := [value for value in values if not math.isfinite(value)]:
        raise click.BadParameter(f"{', '.join(map(str, wrong))}: give a finite number")
    return values


@click.command(
    "parity", cls=Verb, short_help="Check an exported model against PyTorch: a numeric gate for CI."
)
@click.option(
    "--reference",
    required=True,
    type=_PATH,
    help="Checkpoint folder (run by PyTorch), an .onnx file, or saved outputs (.npz, .safetensors).",
)
@click.option(
    "--candidate", required=True, type=_PATH, help="The .onnx or .engine to check: merged, swap or bank."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]PATH",
    help="An adapter that is merged or loaded into the candidate, or in its slot NAME; repeat for several.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=float,
    callback=_finite,
    help="Weight of an adapter in a merged blend; one for each --adapter.",
)
@click.option("--base", type=_PATH, help="For a merged reference graph: the graph without the adapter.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where graphs run; by default cpu.")
@click.option(
    "--feeds", type=_PATH, help="Use inputs from a file (.npz, .safetensors) instead of generated ones."
)
@click.option("--batch", callback=whole_numbers, help="Batch sizes of generated inputs: 1,4.")
@click.option("--sequence", callback=whole_numbers, help="Lengths of generated inputs: 1,16,128.")
@shape_option
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of generated inputs.")
@click.option(
    "--samples", type=WholeNumber(1), default=8, show_default=True, help="How many inputs to generate."
)
@click.option(
    "--tolerance",
    default="auto",
    show_default=True,
    metavar="auto|RTOL,ATOL",
    help="auto: derived from the error of PyTorch itself in the candidate's dtype.",
)
@click.option("--generate", type=WholeNumber(0), default=0, help="Also compare this many greedy tokens.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "float16", "bfloat16"]),
    help="Type whose limits the candidate must keep; by default the type that it states.",
)
@click.option(
    "--reference-dtype", type=click.Choice(["float64", "float32"]), help="Type that PyTorch computes in."
)
@click.option("--no-localise", is_flag=True, help="Don't search for the module where an error begins.")
@click.option("--baseline", type=_PATH, help="The .json report of an earlier run: fail if this run is worse.")
@report_option("parity")
@click.option("--junit", type=_PATH, help="Write the report as JUnit XML, whatever the ending.")
@click.option("--html", type=_PATH, help="Write the report as one HTML page, whatever the ending.")
@click.option("--force", is_flag=True, help="Replace existing reports.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print no progress; if it passes, only notes and the last line.")
@adapter_options
def parity(
    reference: Path,
    candidate: Path,
    adapters: tuple[str, ...],
    baseline: Path | None,
    reports: tuple[Path, ...],
    junit: Path | None,
    html: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Run both on the same inputs, without an adapter and with each, and judge every difference.

    Limits are derived from the error of PyTorch itself in the candidate's dtype. If the reference can also
    run without the adapter, an export that lacks its adapter never passes, whatever the tolerance.

    Exit code 0: passed; 3: failed; 1: they could not be compared.

    \b
    Examples:
      lora-export parity --reference hf-folder --adapter my-adapter --candidate merged/model.onnx
      lora-export parity --reference hf-folder --adapter a --adapter b --candidate swap.onnx --report p.xml
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.parity.check import check_parity
    from lora_export.reports.files import asked_for
    from lora_export.reports.parity.files import ReadFiles, check_outputs
    from lora_export.reports.parity.to_json import read_report

    outputs = asked_for("parity", reports, junit=(junit, "xml"), html=(html, "html"))
    read = ReadFiles(
        candidate=candidate,
        reference=reference,
        base=options["base"],
        feeds=options["feeds"],
        baseline=baseline,
        adapters=_adapter_paths(adapters),
    )
    check_outputs(outputs, force, read)
    old = read_report(baseline) if baseline is not None else None
    options["localise"] = not options.pop("no_localise")
    options |= {"batches": options.pop("batch"), "sequences": options.pop("sequence")}
    with stage_progress(quiet) as progress, same_inputs(command=True):
        given = load_named(adapters, options)
        found = check_parity(reference, candidate, given, progress=progress, **options)
    # The verdict is printed first, so that a problem with a report or a baseline can't lose the run.
    _print(found, as_json, quiet)
    return _finish(found, outputs, old=old, force=force, reads=read.files())


def _adapter_paths(entries: tuple[str, ...]) -> tuple[Path, ...]:
    """Return every path that ``[NAME=]PATH`` can mean: a path may have a "=" in it."""
    parts = [part for entry in entries for part in (entry, split_named(entry)[1]) if part]
    return tuple(map(Path, parts))


def _print(found: ParityReport, as_json: bool, quiet: bool) -> None:
    from lora_export.reports.parity.to_json import report_json
    from lora_export.reports.parity.to_text import check_lines, note_lines

    if as_json:
        print_json(report_json(found))
        return
    text = check_lines(found, cut=is_terminal(sys.stdout))
    # Notes name what the gate did not check: they must be seen even with --quiet.
    print_lines([*note_lines(found), text[-1]] if quiet and found.passed else text)


def _finish(
    found: ParityReport,
    outputs: Sequence[ReportFile],
    old: ParityReport | None,
    force: bool,
    reads: Sequence[Path],
) -> int:
    """Write the reports, compare with the baseline, and return the exit code.

    A problem with one of them doesn't prevent the other, and an export that failed still gives exit code 3.

    Raises:
        LoraExportError: The export passed, but its reports can't be written or it can't be compared.
    """
    from lora_export.reports.files import write_reports
    from lora_export.reports.parity import baseline as parity_baseline

    errors: list[LoraExportError] = []
    worse = False
    try:
        write_reports("parity", found, files=outputs, force=force, reads=reads)
    except LoraExportError as error:
        errors.append(error)
    try:
        if old is not None:
            regressions = parity_baseline.compare_reports(old, found)
            worse = bool(regressions)
            print_lines(parity_baseline.regression_lines(regressions), err=True)
    except LoraExportError as error:
        errors.append(error)
    failed = worse or not found.passed
    last = errors.pop() if errors and not failed else None
    for problem in errors:
        print_error(problem)
    if last is not None:
        raise last
    return ParityError.exit_code if failed else 0
