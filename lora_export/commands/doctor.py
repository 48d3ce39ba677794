"""`lora-export doctor`: what this machine can build and run."""

from __future__ import annotations

import json

import click

from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb


@click.command(cls=Verb, short_help="Say what this machine can build and run, and what would mend the rest.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def doctor(as_json: bool) -> None:
    """Look at the GPUs and packages of this machine: what works, why not, the command that mends it.

    Packages are imported in a process of their own, so one that is broken is reported, whatever it does.
    The exit code is 0 whatever is found. What runs that were ended have left in the current folder, in the
    system's temporary one and in the cache of engines is put in order; nothing else is changed.

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
