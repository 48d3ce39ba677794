"""Expose LoRA in the two graphs of an encoder–decoder: each module of an adapter in the graph that has it.

Rules:

1. A module is exposed in each graph that reads its weight: cross-attention's keys and values are the
   encoder's, an embedding of both may be in both.
2. A module that the encoder's graph lacks has to be in the decoder's, where it is refused if it isn't.
3. The LoRA record of each graph names the modules that are in the other one alone, so that the same adapter
   binds to both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.base.open_base import Base
from lora_export.base.pipeline_graphs import Pipeline, PipelineGraph
from lora_export.base.reads import files_read
from lora_export.base.write_options import WriteOptions
from lora_export.formats.reading.scope import only_some
from lora_export.formats.schemes import fitted
from lora_export.modes.branches.output import ExposeReport
from lora_export.modes.pipelines.folder import check_output, write_folder
from lora_export.modes.pipelines.halves import refused_options
from lora_export.plan import Plan
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import BaseWeights, Target, targets_of
from lora_export.storage.hashes import hash_file
from lora_export.storage.manifest import Manifest, adapter_entry
from lora_export.storage.outputs import refuse_existing

# Kinds of misses of a module that is in another graph: neither its weight nor a reader of it is here.
_ABSENT = ("not found", "unused")
# Adapters for a graph, and the paths of the modules that are in the other one alone.
Share = tuple[Sequence[Adapter], Sequence[str]]


class SwapOne(Protocol):
    """Expose LoRA in the graph of one folder."""

    def __call__(
        self, base: Path, output: Path, options: WriteOptions, choose: Callable[[Base], Share]
    ) -> ExposeReport:
        """Write the graph and return what was done."""


def swap_halves(
    base: Pipeline, output: Path, adapters: Sequence[Adapter], options: WriteOptions, *, swap_one: SwapOne
) -> ExposeReport:
    """Write both graphs with the adapters' modules exposed.

    Args:
        base: Folder of an encoder–decoder.
        output: The folder to write.
        adapters: Adapters whose modules are exposed.
        options: Options of the mode.
        swap_one: Exposes a part of the adapters in one graph.

    Returns:
        One report for both; its LoRA record has the modules of both.

    Raises:
        LoraExportError: As `swap_onnx`.
    """
    base.refuse_options(refused_options(options) | {"--dry-run": options.dry_run})
    reads = [*base.files, *files_read(base.folder, adapters)]
    check_output(base, output, force=options.force, reads=reads)
    refuse_existing([output], options.force)
    division = _Division(adapters=adapters)
    reports: dict[str, ExposeReport] = {}

    def write_graph(graph: PipelineGraph, path: Path) -> None:
        part = replace(options, kv_cache=False, part=graph.part)
        reports[graph.name] = swap_one(graph.folder, path, part, division.share)

    def manifest() -> Manifest:
        return Manifest(
            mode="swap-onnx",
            base=[hash_file(path) for path in base.files if path.suffix == ".safetensors"],
            adapters=[adapter_entry(adapter, 1.0) for adapter in adapters],
            plan=_joined(reports).as_dict(),
            rounding={},
            outputs={"graphs": base.places},
            versions={"lora-export": __version__},
        )

    size = write_folder(
        base, output, force=options.force, reads=reads, write_graph=write_graph, manifest=manifest
    )
    first, *others = reports.values()
    modules = [module for report in reports.values() for module in report.exposed.modules]
    return replace(
        first,
        plan=_joined(reports),
        exposed=replace(first.exposed, modules=tuple(modules), elsewhere=()),
        outputs={"folder": output},
        size_bytes=size,
        warnings=tuple(warning for report in (first, *others) for warning in report.warnings),
    )


def _joined(reports: dict[str, ExposeReport]) -> Plan:
    plans = [report.plan for report in reports.values()]
    return Plan(
        tuple(
            replace(row, place=f"{name}: {row.place}")
            for name, report in reports.items()
            for row in report.plan.rows
        ),
        tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
        tuple(dict.fromkeys(warning for plan in plans for warning in plan.warnings)),
    )


@dataclass(kw_only=True)
class _Division:
    """Division of adapters between the graphs, the encoder's first.

    Attributes:
        adapters: The adapters.
        taken: Paths of each adapter's targets that the encoder's graph has; None before it was seen.
    """

    adapters: Sequence[Adapter]
    taken: list[set[str]] | None = field(default=None)

    def share(self, opened: Base) -> Share:
        """Return what goes into a graph, and the paths of what is in the other one alone."""
        weight_of = opened.weight_of
        resolver = Resolver(opened.graph, weight_of, branches=True)
        # A graph of ours has its names, and a search by value for what it lacks takes minutes.
        by_name = Resolver(opened.graph, None, branches=True)
        parts, elsewhere, taken = [], dict[str, None](), []
        for number, given in enumerate(self.adapters):
            adapter = fitted(given, resolver.known, [])
            targets = targets_of(adapter)
            _, misses = by_name.resolve(targets, adapter.flattened, adapter.scope)
            lost = [miss.target for miss in misses if miss.kind in _ABSENT]
            # Of tied weights the graph has one name.
            if tied := _tied(lost, adapter, weight_of):
                _, misses = resolver.resolve(tied, adapter.flattened, adapter.scope)
                lost = [target for target in lost if target not in tied]
                lost += [miss.target for miss in misses if miss.kind in _ABSENT]
            absent = {target.path for target in lost}
            own = {target.path for target in targets} - absent
            if self.taken is not None:  # rule 2
                absent &= self.taken[number]
                own = {target.path for target in targets} - absent
            taken.append(own)
            elsewhere |= dict.fromkeys(sorted(absent))
            if own:
                parts.append(_part(adapter, own))
        if self.taken is None:
            self.taken = taken
        return parts, tuple(elsewhere)


def _tied(targets: Sequence[Target], adapter: Adapter, weight_of: BaseWeights | None) -> list[Target]:
    if weight_of is None or not targets:
        return []
    stored = weight_of.for_adapter([target.named for target in targets], adapter.flattened, adapter.scope)
    return [target for target in targets if stored.is_tied(target)]


def _part(adapter: Adapter, paths: set[str]) -> Adapter:
    modules = [key for key, module in adapter.modules.items() if module.path in paths]
    others = [path for path in (*adapter.extras, *adapter.token_rows) if path.rpartition(".")[0] in paths]
    # Without the note that the rest is ignored: it goes into the other graph.
    return replace(only_some(adapter, modules, others, "not here"), notes=adapter.notes)
