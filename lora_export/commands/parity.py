"""`lora-export parity`: an exported model against what it was exported from; exit code 3 where it differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.commands.options import adapter_options, named_adapters, whole_numbers
from lora_export.errors import ParityError

_PATH = click.Path(path_type=Path)


@click.command("parity", short_help="Check an exported model against PyTorch: a numeric gate for CI.")
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
    help="What is merged into it, loaded into it, or in its slot NAME; repeat for several.",
)
@click.option("--weight", "weights", multiple=True, type=float, help="Of an adapter in a merged blend.")
@click.option("--base", type=_PATH, help="With a merged reference graph: the graph without the adapter.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where graphs run; cpu if left out.")
@click.option("--feeds", type=_PATH, help="Inputs from a file (.npz, .safetensors) instead of made ones.")
@click.option("--batch", callback=whole_numbers, help="Batch sizes of made inputs: 1,4.")
@click.option("--sequence", callback=whole_numbers, help="Lengths of made inputs: 1,16,128.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of made inputs.")
@click.option("--samples", type=int, default=8, show_default=True, help="How many inputs are made.")
@click.option(
    "--tolerance",
    default="auto",
    show_default=True,
    metavar="auto|RTOL,ATOL",
    help="auto: from what PyTorch itself loses in the candidate's dtype.",
)
@click.option("--generate", type=click.IntRange(0), default=0, help="Compare this many greedy tokens too.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "float16", "bfloat16"]),
    help="What the candidate is held to; what it says of itself if left out.",
)
@click.option(
    "--reference-dtype", type=click.Choice(["float64", "float32"]), help="What PyTorch computes in."
)
@click.option("--no-localise", is_flag=True, help="Don't look for the module where an error begins.")
@click.option("--baseline", type=_PATH, help="The report of an earlier run: fail where this one is worse.")
@click.option("--report", type=_PATH, help="Write the report as JSON.")
@click.option("--junit", type=_PATH, help="Write it as JUnit XML.")
@click.option("--html", type=_PATH, help="Write it as one HTML page.")
@click.option("--force", is_flag=True, help="Replace existing reports.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress; of what passed, the last line only.")
@adapter_options
def parity(
    reference: Path,
    candidate: Path,
    adapters: tuple[str, ...],
    baseline: Path | None,
    report: Path | None,
    junit: Path | None,
    html: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Run both on the same inputs, without adapter and with each, and judge every difference.

    Limits come from what PyTorch itself loses in the candidate's dtype. An export without its adapter never
    passes, whatever the tolerance, where the reference can be run without it too.

    Exit code 0: passed; 3: not; 1: they could not be compared.

    \b
    Examples:
      lora-export parity --reference hf-folder --adapter my-adapter --candidate merged/model.onnx
      lora-export parity --reference hf-folder --adapter a --adapter b --candidate swap.onnx --junit p.xml
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.parity.check import check_parity
    from lora_export.progress import stage_progress
    from lora_export.reports import parity_baseline
    from lora_export.reports.parity_files import check_outputs, write_reports
    from lora_export.reports.parity_json import read_report, report_json
    from lora_export.reports.parity_text import lines

    outputs = {"json": report, "junit": junit, "html": html}
    check_outputs(outputs, force, baseline)
    old = read_report(baseline) if baseline is not None else None
    given = named_adapters(adapters, options)
    options["localise"] = not options.pop("no_localise")
    options |= {"batches": options.pop("batch"), "sequences": options.pop("sequence")}
    with stage_progress(quiet) as progress:
        found = check_parity(reference, candidate, given, progress=progress, **options)
    write_reports(found, outputs)  # before the comparison: a baseline that is refused loses no run
    regressions = parity_baseline.compare(old, found) if old is not None else []
    if as_json:
        click.echo(report_json(found))
    else:
        text = lines(found)
        click.echo("\n".join(text[-1:] if quiet and found.passed else text))
    for line in parity_baseline.lines(regressions) if old is not None else ():
        click.echo(line, err=True)
    return 0 if found.passed and not regressions else ParityError.exit_code
