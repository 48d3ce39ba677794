"""`lora-export verify`: check that files are still what was written."""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb
from lora_export.untrusted.json_text import json_text


@click.command(
    cls=Verb, short_help="Check files that lora-export wrote by full hashes: one flipped bit is found."
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the state of each file as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print only files that failed the check.")
@click.option(
    "--allow-sampled",
    is_flag=True,
    help="Accept sets of earlier versions: files known by a sample of their bytes, or by name alone.",
)
def verify(paths: tuple[Path, ...], as_json: bool, quiet: bool, allow_sampled: bool) -> None:
    """Check that each PATH is what was written, bit for bit.

    PATH is a graph, an engine, a converted adapter, a manifest or any file of a set (the whole set is
    checked), or a folder: a merged one, a kit, or any with such files in it. After --share-base the base's
    files are checked as well. Prints for each file: ok, changed, missing, outside (of the folder), not
    described.

    The exit code is 0 if at least one file was checked, all described files are right by a hash of the whole
    file, and nothing else lies there that a program may load: anything but texts, pictures, logs and our
    reports. With --allow-sampled, files that earlier versions hashed in part, or not at all, pass as well.

    A hash shows that nothing was damaged, not who wrote it: whoever can change the files can change the
    hashes.

    \b
    Examples:
      lora-export verify merged/model.onnx
      lora-export verify merged-folder engines kits/swap.orin-nano-8gb.kit
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.errors import LoraExportError
    from lora_export.integrity.check import verify as check
    from lora_export.progress import byte_progress
    from lora_export.reports.verify import file_lines, last_line, problem_line

    with byte_progress("reading", quiet or as_json) as progress:
        report = check(paths, progress)
    failures = report.failures(allow_sampled)
    if as_json:
        print_json(json_text(report.as_dict() | {"passed": not failures}))
    else:
        print_lines(file_lines(report, quiet))
        if not failures and not quiet:
            print_lines([last_line(report)])
    if failures:
        earlier = all(found.state in ("sampled", "unhashed") for found in failures)
        raise LoraExportError(
            f"{len(failures)} of {len(report.files)} files are not known to be what was written",
            "write the set again with this version, or accept that with --allow-sampled"
            if earlier
            else "copy the set again from where it was made, or make it again",
            [problem_line(found) for found in failures],
        )
