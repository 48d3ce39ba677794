"""Verbs of the command line: their help, with options under headings, and the command that comes next."""

from __future__ import annotations

from collections.abc import Sequence

import click

from lora_export.commands.next_step import print_next

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
    "How a folder is captured": ("dtype", "kv_cache"),
    "What comes out": (
        *("output", "name", "reports", "junit", "html", "plot"),
        *("force", "dry_run", "share_base"),
    ),
    "What is printed": ("as_json", "quiet", "verbose", "modules", "help"),
}
_OTHERS = "More"
# A verb with fewer options is read at one glance.
_FEW = 9


class Verb(click.Command):
    """A verb whose options are listed under headings, and which says what comes next."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the verb; after a success, print the next useful command."""
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
