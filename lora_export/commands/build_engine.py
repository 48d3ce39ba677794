"""`lora-export build-engine`: compile a graph to engines for GPUs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands.printing import print_json, print_lines, print_warnings
from lora_export.commands.verb import Verb
from lora_export.commands.whole_numbers import WholeNumber
from lora_export.machines.targets import COMPILERS

if TYPE_CHECKING:
    from lora_export.engines.build import BuildReport
    from lora_export.engines.plan import BuildRequest
    from lora_export.engines.profiles import ProfileRequest
    from lora_export.packages.build_kit import KitReport

_PATH = click.Path(path_type=Path)
_MIB = 1 << 20


def _known(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    from lora_export.engines.plan import find_targets

    find_targets(value)
    return value


def _shapes(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> Mapping[str, str]:
    from lora_export.engines.profiles import parse_shapes

    return parse_shapes(value)


def _profiles(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> list[ProfileRequest]:
    from lora_export.engines.profiles import ProfileRequest

    return [ProfileRequest.parse(text) for text in value]


@click.command(
    "build-engine", cls=Verb, short_help="Compile a graph to TensorRT engines; for RTX no GPU is needed."
)
@click.argument("model", type=_PATH)
@click.option(
    "--target",
    "targets",
    required=True,
    multiple=True,
    callback=_known,
    help="A GPU (rtx-4090), a compute capability (sm89), or all; repeat for several. See the verb targets.",
)
@click.option("-o", "--output", required=True, type=_PATH, help="The folder to write into.")
@click.option("--name", help="First part of the files' names; by default the graph's name.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=_shapes,
    metavar="KEY=MIN:OPT:MAX",
    help="Sizes of a dimension (batch=1:1:8) or shapes of an input (input_ids=1x1:1x128:8x2048).",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    callback=_profiles,
    metavar="'NAME KEY=MIN:OPT:MAX …'",
    help="One of several profiles; prefill and decode have sizes of their own. Each makes the engine larger.",
)
@click.option("--together", is_flag=True, help="Build one engine for all targets instead of one for each.")
@click.option("--backend", type=click.Choice(COMPILERS), help="Compiler; by default the target's.")
@click.option("--tf32", is_flag=True, help="Allow TF32 in float32 products: faster, but three digits fewer.")
@click.option(
    "--weight-streaming", is_flag=True, help="Weights may stay in host memory while the engine runs."
)
@click.option("--refit", is_flag=True, help="Allow changing the weights later. Building needs a GPU.")
@click.option("--strip-weights", is_flag=True, help="Build an engine without weights. Building needs a GPU.")
@click.option(
    "--version-compatible", is_flag=True, help="The engine also runs with later versions; tensorrt only."
)
@click.option(
    "--hardware-compatible", is_flag=True, help="The engine runs on Ampere and later GPUs; tensorrt only."
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="How long the builder searches: 0 (short) to 5 (long).",
)
@click.option(
    "--workspace", type=WholeNumber(1), metavar="MIB", help="Limit of the builder's scratch memory."
)
@click.option(
    "--adapters",
    type=WholeNumber(0),
    default=1,
    help="How many adapters must fit into the target's memory.",
)
@click.option(
    "--ignore-memory", is_flag=True, help="Build even if the model doesn't fit the target's memory."
)
@click.option("--kit", is_flag=True, help="Write a folder to build on the target instead of engines.")
@click.option(
    "--cache-dir", type=_PATH, help="Folder of engines built before; by default in your cache folder."
)
@click.option("--no-cache", is_flag=True, help="Build again even if an equal engine was built before.")
@click.option("--timing-cache", type=_PATH, help="File of timings of earlier builds; tensorrt only.")
@click.option("--verbose", is_flag=True, help="Keep all messages of the builder in the log; always builds.")
@click.option("--force", is_flag=True, help="Replace existing output files.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print no progress and no summary; only warnings.")
def build_engine(model: Path, output: Path, kit: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compile MODEL, an .onnx file, for each --target into OUT/NAME.TARGET.engine, with a record beside it.

    The graph says which sizes an engine can take: batch, sequence, past, the rank of each LoRA input.
    TensorRT-RTX builds on this machine, with or without a GPU. Classic TensorRT builds on the target GPU
    itself: use --kit for another machine. The graph's types are kept: for half precision, export it with
    --dtype float16.

    \b
    Examples:
      lora-export build-engine swap/model.onnx --target rtx-4090 --target rtx-5090 -o engines
      lora-export build-engine model.onnx --target rtx-4060 --profile prefill --profile decode -o engines
      lora-export build-engine model.onnx --target orin-nano-8gb --kit -o kits
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.engines.build import carry_out
    from lora_export.packages.build_kit import write_kits
    from lora_export.progress import stage_progress
    from lora_export.reports import engine as text

    started = time.monotonic()
    caches, switches = _take(options, "timing_cache", "verbose"), _take(options, "force", "dry_run")
    caches["cache"] = _cache(options.pop("cache_dir"), options.pop("no_cache"))
    if kit and caches != {"timing_cache": None, "verbose": False, "cache": True}:
        raise click.UsageError(
            "--kit builds no engine: omit --cache-dir, --no-cache, --timing-cache and --verbose"
        )
    request = _request(options)
    report: BuildReport | KitReport
    warnings: list[str] = []
    if kit:
        report = write_kits(model, request, output, **switches)
        lines = text.kit_lines(report)
    else:
        with stage_progress(quiet or switches["dry_run"]) as progress:
            report = carry_out(model, request, output, progress=progress, **caches, **switches)
        lines = text.build_lines(report, time.monotonic() - started)
        warnings += text.uncached_lines(report)
    if as_json:
        print_json(json.dumps(report.as_dict(), indent=1, sort_keys=True, ensure_ascii=False))
    elif switches["dry_run"] or not quiet:
        print_lines(lines)
    print_warnings([*text.warning_lines(report), *warnings])


def _take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options.pop(name) for name in names}


def _cache(folder: Path | None, off: bool) -> Path | bool:
    if folder is not None and off:
        raise click.UsageError("give either --cache-dir or --no-cache, not both")
    return folder or not off


def _request(given: dict[str, Any]) -> BuildRequest:
    """Return the build request that the options state."""
    from dataclasses import fields

    from lora_export.engines.plan import BuildRequest
    from lora_export.engines.record import BuildOptions

    workspace = given.pop("workspace")
    known = [field.name for field in fields(BuildOptions) if field.name in given]
    options = BuildOptions(**_take(given, *known), workspace_bytes=workspace and workspace * _MIB)
    return BuildRequest(options=options, **given)
