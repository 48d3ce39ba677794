"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_export.commands.printing import print_json, print_lines, print_warnings
from lora_export.errors import AdapterError
from lora_export.formats import FORMATS, load_adapter
from lora_export.graph.captured import DTYPES

if TYPE_CHECKING:
    from lora_export.adapter import Adapter
    from lora_export.modes.branches.output import ExposeReport
    from lora_export.modes.merging.report import MergeReport

Command = TypeVar("Command", bound=Callable[..., Any])
# Options that state what an adapter's file may state itself.
_STATED = ("alpha", "rank", "rslora")


def _adapter_options(format_flag: str) -> list[Callable[[Command], Command]]:
    return [
        click.option("--alpha", type=float, help="Numerator of the scaling, where the file doesn't say it."),
        click.option("--rank", type=int, help="Rank, checked against the tensors."),
        click.option("--rslora", is_flag=True, default=None, help="The scaling is alpha / √rank."),
        click.option(format_flag, type=click.Choice(list(FORMATS)), help="Where names don't tell it."),
        click.option(
            "--component",
            "--scope",
            "component",
            help="The part that belongs: unet, text_encoder, … of the file; a submodel: model.encoder; or "
            "both, with a colon between.",
        ),
    ]


_ADAPTER_OPTIONS = _adapter_options("--format")


_PATH = click.Path(path_type=Path)
_MERGE_INPUTS = [
    click.option(
        "--adapter",
        "adapters",
        required=True,
        multiple=True,
        type=_PATH,
        help="Folder or file of a trained adapter; repeat to add up several.",
    ),
    click.option(
        "--weight", "weights", multiple=True, type=float, help="Factor on an adapter, one for each --adapter."
    ),
]
_CAPTURE_OPTIONS = [
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="Of a captured checkpoint folder; float32 if left out."
    ),
    click.option(
        "--kv-cache",
        is_flag=True,
        help="Capture a checkpoint folder with its key-value cache, to generate text.",
    ),
]
_CHECKPOINT_OPTIONS = [
    click.option(
        "--checkpoint",
        type=_PATH,
        help="Folder of the checkpoint that the graph was exported from: find and verify weights by value. "
        "Left out, it is the folder that the adapter names as its base, where that is on this machine.",
    ),
    click.option("--no-checkpoint", is_flag=True, help="Go by names alone, also where that folder is here."),
]
_MERGE_SWITCHES = [
    click.option(
        "--rounding",
        type=click.Choice(["sample", "exact"]),
        default="sample",
        show_default=True,
        help="Measure what rounding cost on evenly spaced blocks of large weights, or on every element.",
    ),
    click.option("--allow-unmatched", is_flag=True, help="Go on without what has no place in the base."),
    click.option("--dry-run", is_flag=True, help="Print the plan; write nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option("--quiet", is_flag=True, help="No progress and no summary; warnings stay."),
]


def adapter_options(command: Command) -> Command:
    """Add the options that say what an adapter's file does not; they arrive as `load_adapter` takes them."""
    return _with(command, _ADAPTER_OPTIONS)


def reading_options(command: Command) -> Command:
    """Add the same, with ``--from-format``: for a verb whose ``--format`` is what it writes."""
    return _with(command, _adapter_options("--from-format"))


def merge_options(command: Command) -> Command:
    """Add what every merge has: adapters and weights, what their files do not say, switches."""
    return _with(command, [*_MERGE_INPUTS, *_ADAPTER_OPTIONS, *_MERGE_SWITCHES])


def capture_options(command: Command) -> Command:
    """Add what says how a checkpoint folder is captured."""
    return _with(command, _CAPTURE_OPTIONS)


def checkpoint_options(command: Command) -> Command:
    """Add what says what a graph's values are compared with."""
    return _with(command, _CHECKPOINT_OPTIONS)


def read_checkpoint_options(options: dict[str, Any]) -> None:
    """Turn ``no_checkpoint`` into the mode's ``checkpoint=False``."""
    if options.pop("no_checkpoint"):
        if options["checkpoint"] is not None:
            raise click.UsageError("--checkpoint and --no-checkpoint exclude each other")
        options["checkpoint"] = False


_EXPOSE_OPTIONS = [
    click.option(
        "--base", required=True, type=_PATH, help="An ONNX file, or a Hugging Face checkpoint folder."
    ),
    click.option("-o", "--output", required=True, type=_PATH, help="The .onnx file to write."),
    *_CHECKPOINT_OPTIONS,
    click.option(
        "--flavour",
        type=click.Choice(["ort", "tensorrt"]),
        default="ort",
        show_default=True,
        help="LoRA inputs with defaults, which may be left out, or as TensorRT needs them: without.",
    ),
    click.option("--pack", is_flag=True, help="One pair of tensors for q, k, v, one for gate, up; for GPUs."),
    click.option("--fuse-base", is_flag=True, help="--pack, and the base's own q, k, v as one product."),
    click.option("--share-base", is_flag=True, help="Leave the weights in the base's own data files."),
    click.option("--force", is_flag=True, help="Replace existing output files."),
    *_CAPTURE_OPTIONS,
    *_MERGE_SWITCHES[1:],
]


def expose_options(command: Command) -> Command:
    """Add what verbs that expose LoRA have: base, output, switches."""
    return _with(command, _EXPOSE_OPTIONS)


def run_expose(
    mode: Callable[..., ExposeReport],
    base: Path,
    output: Path,
    arguments: Sequence[Any],
    options: dict[str, Any],
    companions: bool,
) -> None:
    """Run a mode and print its result; within the verb's block of `same_inputs`.

    Args:
        mode: `swap_onnx` or `bank_onnx`.
        base: The base.
        output: The graph to write.
        arguments: What the mode takes between base and output.
        options: What it takes by name, and ``as_json`` and ``quiet``.
        companions: Write what onnxruntime-genai wants beside the graph, if it lies beside the base.
    """
    import time

    from lora_export.base.reads import files_read
    from lora_export.packages.onnxruntime_genai import companions_of
    from lora_export.progress import byte_progress
    from lora_export.reports import expose as text
    from lora_export.reports.merge import plan_lines, report_json

    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    read_checkpoint_options(options)
    dry_run: bool = options["dry_run"]
    started = time.monotonic()
    beside = companions_of(base, output, options["force"]) if companions else None
    if beside and not dry_run:
        beside.check(files_read(base, options["adapter"], options["checkpoint"]))
        options["beside"] = beside.files
    with byte_progress(f"writing {output}", quiet or dry_run) as progress:
        report = mode(base, *arguments, output, progress=progress, **options)
    if as_json:
        print_json(report_json(report))
    elif dry_run:
        print_lines(plan_lines(report))
    elif not quiet:
        print_lines(text.expose_summary_lines(report, time.monotonic() - started))
        for name in beside.files if beside else ():
            print_lines([f"wrote {output.parent / name}"])
    print_warnings([*text.expose_warning_lines(report), *(beside.notes if beside else ())])


def _with(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def print_merge(report: MergeReport, seconds: float, as_json: bool, quiet: bool, finer: str) -> None:
    """Print a merge's result, and its warnings to stderr.

    Args:
        report: What the merge did.
        seconds: How long it took.
        as_json: Print JSON instead of a summary.
        quiet: Print warnings only.
        finer: What keeps more of an adapter than the type that was written.
    """
    from lora_export.reports import merge as text

    if as_json:
        print_json(text.report_json(report))
    elif report.dry_run:
        print_lines(text.plan_lines(report))
    elif not quiet:
        print_lines(text.summary_lines(report, seconds))
    print_warnings(text.warning_lines(report, finer))


def load_adapters(paths: Iterable[Path], options: dict[str, Any]) -> list[Adapter]:
    """Take the options of `adapter_options` out of ``options`` and load each path with them."""
    taken = {name: options.pop(name) for name in ("alpha", "rank", "rslora", "format", "component")}
    listed = list(paths)
    try:
        return [load_adapter(path, **taken) for path in listed]
    except AdapterError as error:
        if lines := _how_each_is_read(listed, taken):
            from lora_export.formats.reading.scope import SHARED

            raise AdapterError("the adapters can't be read with the same options", SHARED, lines) from error
        raise


def _how_each_is_read(paths: Sequence[Path], taken: Mapping[str, Any]) -> list[str]:
    """Return which of some files need what is stated with options, where others must not have it; else []."""
    given = {name: taken[name] for name in _STATED if taken[name] is not None}
    stated = given or {"alpha": 1.0}
    said = " ".join(f"--{name}" for name in stated)
    ways = {
        path: (_is_read(path, {**taken, **stated}), _is_read(path, {**taken, **dict.fromkeys(stated)}))
        for path in paths
    }
    words = {
        (True, False): f"does not state all of its scaling: give it with {said}",
        (False, True): f"states its own scaling: give it without {said}",
        (True, True): f"may be given with or without {said}",
    }
    differ = {(True, False), (False, True)} <= set(ways.values()) <= words.keys()
    return [f"{path}: {words[way]}" for path, way in ways.items()] if differ else []


def _is_read(path: Path, options: Mapping[str, Any]) -> bool:
    try:
        load_adapter(path, **options)
    except AdapterError:
        return False
    return True


def whole_numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Read ``1,4,16``; a callback of click's."""
    return None if value is None else _at_least(1, value, "1,4")


def whole_numbers_from_0(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Read ``0,128``; a callback of click's."""
    return None if value is None else _at_least(0, value, "0,128")


def _at_least(least: int, value: str, example: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as {example}") from None
    if min(numbers) < least:
        raise click.BadParameter(f"{value!r} has numbers below {least}")
    return numbers


def named_adapters(entries: Sequence[str], options: dict[str, Any]) -> dict[str, Adapter]:
    """Take the options of `adapter_options` out of ``options`` and load each ``[NAME=]PATH`` with them."""
    parts = [entry.partition("=") for entry in entries]
    # A path may have a "=" in it.
    named = [
        (name, path) if path and not Path(entry).exists() else ("", entry)
        for entry, (name, _, path) in zip(entries, parts, strict=True)
    ]
    loaded = load_adapters([Path(path) for _, path in named], options)
    found: dict[str, Adapter] = {}
    for (name, path), adapter in zip(named, loaded, strict=True):
        called = name or adapter.name
        if called in found:
            raise click.BadParameter(
                f"two adapters are called {called!r}: give NAME=PATH", param_hint=f"--adapter {path}"
            )
        found[called] = adapter
    return found
