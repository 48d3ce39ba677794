"""Define the options that several verbs share, and read and print what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_export.base.lowering import RUNTIMES
from lora_export.commands.named_path import split_named
from lora_export.commands.printing import print_json, print_lines, print_warnings
from lora_export.commands.whole_numbers import LARGEST, Whole
from lora_export.errors import AdapterError
from lora_export.formats import FORMATS, load_adapter
from lora_export.graph.captured import DTYPES
from lora_export.reports import REPORTS
from lora_export.untrusted.places import exists

if TYPE_CHECKING:
    from lora_export.adapter import Adapter
    from lora_export.modes.branches.output import ExposeReport
    from lora_export.modes.merging.report import MergeReport

Command = TypeVar("Command", bound=Callable[..., Any])
# Options for facts that an adapter's file may also state.
_STATED = ("alpha", "rank", "rslora")


def _adapter_options(format_flag: str) -> list[Callable[[Command], Command]]:
    return [
        click.option("--alpha", type=float, help="Numerator of the scaling, if the file doesn't state it."),
        click.option(
            "--rank",
            type=Whole(),
            help="Rank of the adapter; it is checked against the tensors.",
        ),
        click.option("--rslora", is_flag=True, default=None, help="The scaling is alpha / √rank."),
        click.option(
            format_flag,
            type=click.Choice(list(FORMATS)),
            help="The file's format, if its names don't tell it.",
        ),
        click.option(
            "--component",
            "--scope",
            "component",
            help="Part to use: a part of the file (unet, text_encoder, …), a submodel (model.encoder), or "
            "both with a colon between.",
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
        help="Folder or file of a trained adapter; repeat to add several.",
    ),
    click.option(
        "--weight", "weights", multiple=True, type=float, help="Factor of an adapter; one for each --adapter."
    ),
]
_RUNTIME = click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="portable",
    show_default=True,
    help="Operators that a checkpoint folder is captured in: ONNX's alone, or, implying --fused, also ONNX "
    "Runtime's that are fast on CUDA; with a cache these take rows padded on the right only.",
)
_CAPTURE_OPTIONS = [
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="Type of a captured checkpoint folder; by default float32."
    ),
    click.option(
        "--kv-cache",
        is_flag=True,
        help="Capture a checkpoint folder with its key-value cache, to generate text; an encoder–decoder "
        "becomes a folder of two graphs, and a vision–language model one of three, if OUT is no .onnx file.",
    ),
    click.option(
        "--fused",
        is_flag=True,
        help="Capture a checkpoint folder with attention, rotary embeddings and RMS norms as one node each.",
    ),
    _RUNTIME,
]
_QUANTIZE = click.option(
    "--quantize",
    type=click.Choice(["int4", "int8"]),
    help="Quantise the written weights, as quantize-onnx does by default; LoRA stays in float.",
)
_CHECKPOINT_OPTIONS = [
    click.option(
        "--checkpoint",
        type=_PATH,
        help="Folder of the checkpoint that the graph was exported from: find and verify weights by value. "
        "By default the folder that the adapter names as its base, if that is on this machine.",
    ),
    click.option(
        "--no-checkpoint", is_flag=True, help="Find weights by name alone, even if that folder is here."
    ),
]
_MERGE_SWITCHES = [
    click.option(
        "--rounding",
        type=click.Choice(["sample", "exact"]),
        default="sample",
        show_default=True,
        help="Measure the rounding error on evenly spaced blocks of large weights, or on every element.",
    ),
    click.option("--allow-unmatched", is_flag=True, help="Leave out modules that have no site in the base."),
    click.option("--dry-run", is_flag=True, help="Print the plan; write nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option("--quiet", is_flag=True, help="Print no progress and no summary; only warnings."),
]


def report_option(kind: str) -> Callable[[Command], Command]:
    """Return the option that names the reports of a kind of result; they arrive as ``reports``."""
    endings = ", ".join(f".{ending}" for ending in REPORTS[kind])
    said = f"Write a report; its ending says what it is: {endings}. Repeat for several."
    return click.option("--report", "reports", multiple=True, type=_PATH, metavar="FILE", help=said)


def shape_option(command: Command) -> Command:
    """Add ``--shape`` for sizes that a graph leaves open; it arrives as ``shapes``."""
    return click.option(
        "--shape",
        "shapes",
        multiple=True,
        callback=_told,
        metavar="NAME=SIZE",
        help="Size of a dimension that nothing tells (height=64), or of all axes of an input (timestep=1, "
        "sample=1x4x64x64); repeat.",
    )(command)


def _told(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> Mapping[str, tuple[int, ...]]:
    from lora_export.graph.told_sizes import parse_sizes

    return parse_sizes(value)


def adapter_options(command: Command) -> Command:
    """Add the options for what an adapter's file doesn't state, with the names that `load_adapter` takes."""
    return _with(command, _ADAPTER_OPTIONS)


def reading_options(command: Command) -> Command:
    """Add the same options with ``--from-format``, for a verb whose ``--format`` is what it writes."""
    return _with(command, _adapter_options("--from-format"))


def merge_options(command: Command) -> Command:
    """Add the options of every merge: adapters and weights, what their files don't state, switches."""
    return _with(command, [*_MERGE_INPUTS, *_ADAPTER_OPTIONS, *_MERGE_SWITCHES])


def capture_options(command: Command) -> Command:
    """Add the options for how a checkpoint folder is captured."""
    return _with(command, _CAPTURE_OPTIONS)


def runtime_option(command: Command) -> Command:
    """Add ``--runtime``."""
    return _with(command, [_RUNTIME])


def quantize_option(command: Command) -> Command:
    """Add ``--quantize``, for verbs that write a graph."""
    return _with(command, [_QUANTIZE])


def checkpoint_options(command: Command) -> Command:
    """Add the options for the checkpoint that a graph's values are compared with."""
    return _with(command, _CHECKPOINT_OPTIONS)


def read_checkpoint_options(options: dict[str, Any]) -> None:
    """Turn ``no_checkpoint`` into the mode's ``checkpoint=False``."""
    if options.pop("no_checkpoint"):
        if options["checkpoint"] is not None:
            raise click.UsageError("give either --checkpoint or --no-checkpoint, not both")
        options["checkpoint"] = False


_EXPOSE_OPTIONS = [
    click.option(
        "--base", required=True, type=_PATH, help="An ONNX file, or a folder of transformers or diffusers."
    ),
    click.option("-o", "--output", required=True, type=_PATH, help="The .onnx file to write."),
    *_CHECKPOINT_OPTIONS,
    click.option(
        "--flavour",
        type=click.Choice(["ort", "tensorrt"]),
        default="ort",
        show_default=True,
        help="ort: LoRA inputs with defaults, which a caller may omit; tensorrt: without defaults.",
    ),
    click.option(
        "--pack", is_flag=True, help="One pair of tensors for q, k, v and one for gate, up; for GPUs."
    ),
    click.option(
        "--fuse-base", is_flag=True, help="As --pack, and compute the base's q, k, v as one product."
    ),
    click.option("--share-base", is_flag=True, help="Leave the weights in the base's data files."),
    click.option("--force", is_flag=True, help="Replace existing output files."),
    *_CAPTURE_OPTIONS,
    _QUANTIZE,
    *_MERGE_SWITCHES[1:],
]


def expose_options(command: Command) -> Command:
    """Add the options of verbs that expose LoRA: base, output, switches."""
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
        base: ONNX file or checkpoint folder.
        output: The graph to write.
        arguments: Arguments of the mode between base and output.
        options: Arguments of the mode by name, and ``as_json`` and ``quiet``.
        companions: Copy the files that onnxruntime-genai needs from beside the base, if there are any.
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
        report: Result of the merge.
        seconds: Time that the merge took.
        as_json: Print JSON instead of a summary.
        quiet: Print warnings only.
        finer: Advice on how to keep more of an adapter.
    """
    from lora_export.reports import merge as text

    if as_json:
        print_json(text.report_json(report))
    elif report.dry_run:
        print_lines(text.plan_lines(report))
    elif not quiet:
        print_lines(text.summary_lines(report, seconds))
    print_warnings(text.warning_lines(report, finer))


def load_all(paths: Iterable[Path], options: dict[str, Any]) -> list[Adapter]:
    """Load each path with the options of `adapter_options`, which are removed from ``options``."""
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
    """Return a line for each file if some files need an option that others must not have; otherwise []."""
    given = {name: taken[name] for name in _STATED if taken[name] is not None}
    stated = given or {"alpha": 1.0}
    flags = " ".join(f"--{name}" for name in stated)
    ways = {
        path: (_is_read(path, {**taken, **stated}), _is_read(path, {**taken, **dict.fromkeys(stated)}))
        for path in paths
    }
    words = {
        (True, False): f"does not state all of its scaling: give it with {flags}",
        (False, True): f"states its own scaling: give it without {flags}",
        (True, True): f"may be given with or without {flags}",
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
    """Read ``1,4,16``; a callback for click."""
    return None if value is None else _at_least(1, value, "1,4")


def whole_numbers_from_0(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Read ``0,128``; a callback for click."""
    return None if value is None else _at_least(0, value, "0,128")


def _at_least(least: int, value: str, example: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as {example}") from None
    if min(numbers) < least:
        raise click.BadParameter(f"{value!r} has numbers below {least}")
    if max(numbers) > LARGEST:
        raise click.BadParameter(f"a number is larger than {LARGEST}")
    return numbers


def load_named(entries: Sequence[str], options: dict[str, Any]) -> dict[str, Adapter]:
    """Load each ``[NAME=]PATH`` with the options of `adapter_options`, which are removed from ``options``."""
    # A path may have a "=" in it.
    named = [
        (name, path) if path and not exists(Path(entry)) else ("", entry)
        for entry, (name, path) in zip(entries, map(split_named, entries), strict=True)
    ]
    loaded = load_all([Path(path) for _, path in named], options)
    found: dict[str, Adapter] = {}
    for (name, path), adapter in zip(named, loaded, strict=True):
        called = name or adapter.name
        if called in found:
            raise click.BadParameter(
                f"two adapters are called {called!r}: give NAME=PATH", param_hint=f"--adapter {path}"
            )
        found[called] = adapter
    return found
