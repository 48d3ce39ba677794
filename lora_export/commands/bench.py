"""`lora-export bench`: time models side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands.named_path import split_named
from lora_export.commands.options import report_option, shape_option, whole_numbers, whole_numbers_from_0
from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb
from lora_export.commands.whole_numbers import Whole
from lora_export.untrusted.places import exists, is_folder

if TYPE_CHECKING:
    from lora_export.bench.plan import BenchRequest
    from lora_export.reports.files import ReportFile

_PATH = click.Path(path_type=Path)


@click.command(
    cls=Verb, short_help="Time models side by side: latency, ratio with an interval, memory, loading."
)
@click.argument("model", type=_PATH)
@click.option("--against", multiple=True, type=_PATH, help="Another model; repeat for several.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    help="For models with exposed LoRA; NAME alone for a slot of a bank. A swap model runs with the first; "
    "with two or more, switching between them is timed as well.",
)
@click.option(
    "--batch", "batches", default="1", show_default=True, callback=whole_numbers, help="Batch sizes: 1,8."
)
@click.option(
    "--sequence",
    "sequences",
    callback=whole_numbers,
    help="Tokens of a row: 1,128; by default 128, or fewer if the model has fewer positions.",
)
@click.option(
    "--past",
    "pasts",
    callback=whole_numbers_from_0,
    help="Tokens in the key-value cache when one more is decoded; by default as --sequence.",
)
@shape_option
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where graphs run; engines always run on a GPU.",
)
@click.option(
    "--threads",
    type=Whole(),
    help="ONNX Runtime's threads within one operator; by default one for each core.",
)
@click.option("--cuda-graph", is_flag=True, help="Replay runs as CUDA graphs.")
@click.option(
    "--seconds",
    type=float,
    default=60.0,
    show_default=True,
    help="Time for all timed runs; opening is extra.",
)
@click.option(
    "--narrow",
    type=float,
    default=0.02,
    show_default=True,
    help="Stop when the 95 % interval of each ratio (of the time, for a single model) is narrower than this "
    "share of the value.",
)
@click.option(
    "--seed", type=Whole(), default=0, show_default=True, help="Seed of the feeds and of the models' order."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@report_option("bench")
@click.option("--plot", type=_PATH, help="Draw the report: .png or .svg, as --report does.")
@click.option("--html", type=_PATH, help="Write the report as one HTML page, whatever the ending.")
@click.option("--force", is_flag=True, help="Replace these files if they exist.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check options, files, sizes and adapters, and print the plan; open no model.",
)
@click.option("--quiet", is_flag=True, help="No progress.")
def bench(model: Path, as_json: bool, force: bool, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Time MODEL, and others against it: .onnx files of ONNX Runtime or .engine files of TensorRT.

    All models take turns in every round, in shuffled order, so that a machine that slows down slows all of
    them. Each is compared with MODEL: the ratio of their times, with a 95 % interval. Models with a key-value
    cache are timed twice: prefill is a prompt with an empty cache (time to the first token), decode is one
    token with a full cache. Before that, each model is opened alone in a separate process, to measure the
    time and the memory that this takes. Then all models are open at once: there must be memory for all.

    \b
    Example:
      lora-export bench merged.onnx --against swap.onnx --adapter sql=my-adapter --batch 1,8 --report out.html
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.bench.outputs import files_of_models
    from lora_export.bench.plan import plan_bench
    from lora_export.bench.run import carry_out
    from lora_export.progress import stage_progress
    from lora_export.reports import PICTURES
    from lora_export.reports.bench.to_json import report_json
    from lora_export.reports.bench.to_text import plan_lines, report_lines
    from lora_export.reports.files import asked_for, write_reports

    plot = options.pop("plot")
    drawn = plot.suffix[1:] if plot is not None and plot.suffix[1:] in PICTURES else ""
    files = asked_for("bench", options.pop("reports"), plot=(plot, drawn), html=(options.pop("html"), "html"))
    outputs = {str(file): file.path for file in files}
    plan = plan_bench(_request(model, options), _file_problems(files, force), outputs)
    if dry_run:
        print_lines(plan_lines(plan))
        return
    with stage_progress(quiet) as progress:
        report = carry_out(plan, progress)
    # Printed first: a full disk must not cost the user what was measured.
    if as_json:
        print_json(report_json(report).rstrip("\n"))
    else:
        print_lines(report_lines(report))
    reads = files_of_models(plan.request.models, plan.models, plan.request.adapters)
    for path in write_reports("bench", report, files=files, force=force, reads=reads):
        if not quiet:
            print_lines([f"wrote {path}"], err=True)


def _request(model: Path, options: dict[str, Any]) -> BenchRequest:
    """Return the request that the options state."""
    from lora_export.bench.contenders import AdapterChoice
    from lora_export.bench.opened import Opening
    from lora_export.bench.plan import BenchRequest

    named = map(split_named, options["adapters"])
    return BenchRequest(
        models=(model, *options["against"]),
        adapters=tuple(AdapterChoice(name, None if path is None else Path(path)) for name, path in named),
        batches=_each_once(options["batches"]),
        sequences=None if options["sequences"] is None else _each_once(options["sequences"]),
        pasts=_each_once(options["pasts"] or ()),
        opening=Opening(options["provider"], options["threads"], options["cuda_graph"]),
        seconds=options["seconds"],
        narrow=options["narrow"],
        seed=options["seed"],
        shapes=options["shapes"],
    )


def _each_once(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(numbers))


def _file_problems(files: Sequence[ReportFile], force: bool) -> list[str]:
    """Return why files can't be written, so that the user learns it before the timing, not after."""
    from lora_export.errors import LoraExportError
    from lora_export.reports import PICTURES
    from lora_export.reports.files import ending_problem
    from lora_export.reports.picture import check_matplotlib
    from lora_export.storage.outputs import refuse_replacing

    problems = []
    for file in files:
        # A missing folder is created when the file is written, after the timing.
        path = file.path.absolute()
        above = next((parent for parent in path.parents if exists(parent)), path)
        if not is_folder(above):
            problems.append(f"{file}: {above} is a file, not a folder (choose another name)")
        elif not os.access(above, os.W_OK | os.X_OK):
            problems.append(f"{file}: nothing can be written into {above} (choose another folder)")
        try:
            refuse_replacing([file.path], force)
            if file.ending in PICTURES:
                check_matplotlib()
        except LoraExportError as error:
            problems.append(f"{file}: {error.message} ({error.hint})")
        if file.option == "--plot" and not file.ending:
            problems.append(f"{file}: the name must end in .{' or .'.join(PICTURES)}")
        elif why := ending_problem("bench", file):
            problems.append(why)
    given = [file.path.resolve() for file in files]
    if len(set(given)) < len(given):
        problems.append("--report, --plot, --html: two of them are the same file")
    return problems
