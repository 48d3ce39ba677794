"""Expose LoRA in the graphs that one model becomes: each module of an adapter in the graph that has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.base.open_base import Base
from lora_export.base.pipeline_graphs import Pipeline, PipelineGraph
from lora_export.base.reads import files_read
from lora_export.base.write_options import WriteOptions
from lora_export.modes.branches.output import ExposeReport
from lora_export.modes.pipelines.division import Division, Share
from lora_export.modes.pipelines.folder import check_output, write_folder
from lora_export.modes.pipelines.parts import refused_options
from lora_export.plan import Plan
from lora_export.storage.hashes import hash_file
from lora_export.storage.manifest import Manifest, adapter_entry
from lora_export.storage.outputs import refuse_existing


class SwapOne(Protocol):
    """Expose LoRA in the graph of one folder."""

    def __call__(
        self, base: Path, output: Path, options: WriteOptions, choose: Callable[[Base], Share]
    ) -> ExposeReport:
        """Write the graph and return what was done."""


def swap_parts(
    base: Pipeline, output: Path, adapters: Sequence[Adapter], options: WriteOptions, *, swap_one: SwapOne
) -> ExposeReport:
    """Write all graphs with the adapters' modules exposed.

    Args:
        base: Folder of an encoder–decoder or a vision–language model.
        output: The folder to write.
        adapters: Adapters whose modules are exposed.
        options: Options of the mode.
        swap_one: Exposes a part of the adapters in one graph.

    Returns:
        One report for all; its LoRA record has the modules of all.

    Raises:
        LoraExportError: As `swap_onnx`.
    """
    base.refuse_options(refused_options(options) | {"--dry-run": options.dry_run})
    reads = [*base.files, *files_read(base.folder, adapters)]
    check_output(base, output, force=options.force, reads=reads)
    refuse_existing([output], options.force)
    division = Division(
        adapters=adapters, graphs_left=len(base.graphs), allow_unmatched=options.allow_unmatched
    )
    reports: dict[str, ExposeReport] = {}

    def choose(opened: Base) -> Share:
        return division.share(opened.graph, opened.weight_of)

    def write_graph(graph: PipelineGraph, path: Path) -> None:
        part = replace(options, kv_cache=False, part=graph.part)
        reports[graph.name] = swap_one(graph.folder, path, part, choose)

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
