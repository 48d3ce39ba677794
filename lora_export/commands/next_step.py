"""The command that comes after one that has ended well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lora_export.commands.printing import print_lines
from lora_export.untrusted.places import is_file, is_folder
from lora_export.untrusted.shown import command

Words = list[str | Path]
# Options that say how an adapter's file is read: the next verb has to read it in the same way.
_READING = ("alpha", "rank", "rslora", "component")

# Files that are adapters as trainers write them.
_ADAPTERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def print_next(context: click.Context) -> None:
    """Print the next useful command to stderr, with the paths of the one that has ended.

    Nothing where nothing was written or printed for a reader (``--dry-run``, ``--json``, ``--quiet``), and
    within a recipe, which has its own next step.
    """
    given = context.params
    root = context.parent
    in_recipe = root is not None and root.invoked_subcommand != context.info_name
    make = _NEXT.get(context.info_name or "")
    if make is None or in_recipe or any(given.get(name) for name in ("dry_run", "as_json", "quiet")):
        return
    if (words := make(given)) and (text := command(["lora-export", *words])):
        print_lines([f"next: {text}"], err=True)


def _reading(given: Mapping[str, Any], format_flag: str = "--format") -> Words:
    words: Words = []
    for name in _READING:
        if given.get(name) is True:
            words.append(f"--{name}")
        elif given.get(name) is not None:
            words += [f"--{name}", str(given[name])]
    stated = given.get("format") if format_flag == "--format" else None
    stated = stated or given.get("from_format")
    return [*words, format_flag, stated] if stated else words


def _repeated(option: str, values: Sequence[Any]) -> Words:
    return [word for value in values for word in (option, str(value))]


def _after_capture(given: Mapping[str, Any]) -> Words:
    if given["output"].suffix != ".onnx":  # a pipeline's folder of graphs
        return []
    # Nothing can be merged into codes.
    verb = "swap-onnx" if given.get("quantize") else "merge-onnx"
    out = "swap/model.onnx" if given.get("quantize") else "merged/model.onnx"
    return [verb, "--base", given["output"], "--adapter", "my-adapter", "-o", out]


def _after_quantising(given: Mapping[str, Any]) -> Words:
    return ["parity", "--reference", given["graph"], "--candidate", given["output"]]


def _after_merge(given: Mapping[str, Any]) -> Words:
    folder: Path = given["output"]
    return ["capture-onnx", folder, "-o", folder.with_name(f"{folder.name}-onnx") / "model.onnx"]


def _folder(given: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint that PyTorch can run as the reference."""
    if given.get("checkpoint") is not None:
        return Path(given["checkpoint"])
    return Path(given["base"]) if is_folder(given["base"]) else None


def _compare(given: Mapping[str, Any]) -> Words:
    """Return parity where a checkpoint is known, else a comparison of times with the base."""
    if given["output"].suffix != ".onnx":  # a pipeline's folder of graphs
        return ["verify", given["output"]]
    folder = _folder(given)
    adapters = _repeated("--adapter", given["adapters"])
    if folder is None:
        # Merged adapters have no name any more, and bench has no options for how a file is read.
        alone = [] if given.get("weights") is not None or _reading(given) else adapters
        return ["bench", given["output"], "--against", given["base"], *alone]
    weights = _repeated("--weight", given.get("weights") or ())
    words = ["parity", "--reference", folder, *adapters, *weights, *_reading(given)]
    return [*words, "--candidate", given["output"]]


def _after_swap(given: Mapping[str, Any]) -> Words:
    adapter = Path(next(iter(given["adapters"]), "my-adapter"))
    graph: Path = given["output"]
    if graph.suffix != ".onnx":  # the folder of several graphs of one model
        return ["verify", graph]
    words: Words = ["convert-adapter", adapter, "--for", graph]
    return [*words, *_reading(given, "--from-format"), "-o", f"{adapter.stem}.onnx_adapter"]


def _after_conversion(given: Mapping[str, Any]) -> Words:
    return ["bench", given["graph"], "--adapter", f"{given['adapter'].stem}={given['output']}"]


def _after_parity(given: Mapping[str, Any]) -> Words:
    candidate: Path = given["candidate"]
    if candidate.suffix != ".onnx":
        return []
    return ["build-engine", candidate, "--target", "all", "-o", "engines", "--dry-run"]


def _after_inspect(given: Mapping[str, Any]) -> Words:
    adapter: Path = given["adapter"]
    if not (is_file(adapter / "adapter_config.json") or adapter.suffix in _ADAPTERS):
        return []
    base = given["base"] or "my-model"
    words: Words = ["merge-onnx", "--base", base, "--adapter", adapter, *_reading(given)]
    return [*words, "-o", "merged/model.onnx"]


_NEXT: dict[str, Callable[[Mapping[str, Any]], Words]] = {
    "inspect": _after_inspect,
    "capture-onnx": _after_capture,
    "merge": _after_merge,
    "merge-onnx": _compare,
    "swap-onnx": _after_swap,
    "bank-onnx": _compare,
    "quantize-onnx": _after_quantising,
    "convert-adapter": _after_conversion,
    "parity": _after_parity,
}
