"""`lora-export doctor`: report what this machine can build and run."""

from __future__ import annotations

import json

import click

from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb


@click.command(cls=Verb, short_help="Report what this machine can build and run, and how to fix the rest.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def doctor(as_json: bool) -> None:
    """Examine the GPUs and packages of this machine: what works, what doesn't, and the command that fixes it.

    Packages are imported in a separate process, so that a broken one can't stop the report. The exit code is
    0 whatever is found. What stopped runs have left in the current folder, in the system's temporary folder
    and in the engine cache is put in order; nothing else is changed.

    \b
    Example:
      lora-export doctor
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.doctor.doctor import examine
    from lora_export.reports.doctor import doctor_lines

    report = examine()
    if as_json:
        print_json(json.dumps(report.as_dict(), indent=1, ensure_ascii=False))
    else:
        print_lines(doctor_lines(report))
