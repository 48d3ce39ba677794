"""Verbs of the command line: their help, with options under headings, and the command that comes next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from lora_export.commands.named_path import split_named
from lora_export.commands.next_step import print_next
from lora_export.untrusted.places import is_folder

# Which verb comes after which, as long as a terminal is wide.
WAY = """\
The way of the data:
  merge ───────────────────────────────▶ a folder, served like its base
  merge-onnx ─────────────▶ model.onnx ──┐
  swap-onnx, bank-onnx ───▶ model.onnx ──┼─ build-engine ─▶ an engine
    └─ convert-adapter ───▶ its adapter ─┘
  parity and verify check what was made, bench times it, inspect says what a file is."""

# Headings of the list of verbs.
_VERBS = {
    "Begin": ("demo", "inspect"),
    "Adapter and base to a model": ("capture-onnx", "merge", "merge-onnx", "swap-onnx", "bank-onnx"),
    "A graph in fewer bits": ("quantize-onnx",),
    "Adapter for a model that takes several": ("convert-adapter",),
    "Engines for GPUs": ("build-engine", "targets", "doctor"),
    "Check and measure": ("parity", "verify", "bench"),
    "Again, from a file": ("run",),
}
# Headings of the options of a verb, by their Python names.
_OPTIONS = {
    "What goes in": (
        *("base", "adapter", "adapters", "weights", "target_modules", "graph", "reference", "candidate"),
        *("targets", "against", "checkpoint", "no_checkpoint", "feeds", "baseline"),
    ),
    "How an adapter is read": ("alpha", "rank", "rslora", "format", "from_format", "component"),
    "How a folder is captured": ("dtype", "kv_cache", "fused", "runtime", "trace"),
    "How weights are quantised": (
        *("to", "method", "block_size", "asymmetric", "accuracy_level", "keep", "head", "embeddings"),
        "quantize",
    ),
    "What comes out": (
        *("output", "name", "reports", "junit", "html", "plot"),
        *("force", "dry_run", "share_base"),
    ),
    "What is printed": ("as_json", "quiet", "verbose", "modules", "help"),
}
_OTHERS = "More"
# Options that name what is written, by their Python names.
_WRITTEN = ("output", "reports", "junit", "html", "plot")
# A verb with fewer options is read at one glance.
_FEW = 9


class Verb(click.Command):
    """A verb whose options are listed under headings, and which says what comes next."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the verb; after a success, print the next useful command.

        Before it, what ended runs have left is put in order where the verb writes, and said where it reads.
        """
        if not ctx.params.get("dry_run"):
            _put_in_order(ctx)
        code: object = super().invoke(ctx)
        if not code:
            print_next(ctx)
        return code

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options: those of a heading together, in the order in which the verb declares them."""
        rows = {
            "help" if "--help" in parameter.opts else parameter.name or "": record
            for parameter in self.get_params(ctx)
            if (record := parameter.get_help_record(ctx)) is not None
        }
        if len(rows) < _FEW:
            super().format_options(ctx, formatter)
            return
        known = {name for names in _OPTIONS.values() for name in names}
        sections: list[tuple[str, Sequence[str]]] = list(_OPTIONS.items())
        sections.insert(-1, (_OTHERS, [name for name in rows if name not in known]))
        for heading, names in sections:
            if found := [record for name, record in rows.items() if name in names]:
                with formatter.section(heading):
                    formatter.write_dl(found)


def _put_in_order(ctx: click.Context) -> None:
    from lora_export.storage.commit.leftovers import mention, tidy

    written = _folders_of(ctx.params.get(name) for name in _WRITTEN)
    for folder in written.values():
        tidy(folder)
    read = _folders_of(value for name, value in ctx.params.items() if name not in _WRITTEN)
    for place, folder in read.items():
        if place not in written:
            mention(folder)


def _folders_of(values: Iterable[object]) -> dict[Path, Path]:
    """Return the folders of paths among the values of options, and paths that are some, by their place."""
    folders: dict[Path, Path] = {}
    for path in (path for value in values for path in _paths_in(value)):
        with contextlib.suppress(OSError, ValueError):  # no path, or none that can be looked at
            folders |= {folder.resolve(): folder for folder in (path, path.parent) if is_folder(folder)}
    return folders


def _paths_in(value: object) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, tuple):
        yield from (one for one in value if isinstance(one, Path))
        # Slots of a bank are NAME=PATH.
        named = [split_named(one)[1] for one in value if isinstance(one, str)]
        yield from (Path(path) for path in named if path is not None)


def write_verbs(group: click.Group, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the verbs of a group under headings, and the way of the data through them."""
    width = max(map(len, group.list_commands(ctx)))
    for heading, names in _VERBS.items():
        rows = [
            (name.ljust(width), command.get_short_help_str(limit=200))
            for name in names
            if (command := group.get_command(ctx, name)) is not None
        ]
        with formatter.section(heading):
            formatter.write_dl(rows)
    formatter.write_paragraph()
    formatter.write(f"{WAY}\n")
