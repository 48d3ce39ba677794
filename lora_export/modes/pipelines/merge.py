"""Merge adapters into the models of a pipeline and write all of its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.pipeline_graphs import Pipeline, PipelineGraph
from lora_export.base.pipeline_parts import Share, part_adapters
from lora_export.base.reads import files_read
from lora_export.base.write_options import WriteOptions
from lora_export.machines.packages import package_versions
from lora_export.modes.merging.report import MergeReport
from lora_export.modes.pipelines.folder import check_output, write_folder
from lora_export.modes.pipelines.parts import refused_options
from lora_export.plan import Plan
from lora_export.storage.hashes import hash_file
from lora_export.storage.manifest import Manifest, adapter_entry
from lora_export.storage.outputs import refuse_existing
from lora_export.storage.rounding import Mode, Rounding, rounding_dict

# Between a component and a path in it.
_IN = "/"


class MergeOne(Protocol):
    """Merge into the graph of one folder."""

    def __call__(
        self,
        base: Path,
        output: Path,
        adapters: Sequence[Adapter],
        factors: Sequence[float],
        *,
        rounding: Mode,
        options: WriteOptions,
    ) -> MergeReport:
        """Write the graph and return what was done."""


def merge_pipeline(
    pipeline: Pipeline,
    output: Path,
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    *,
    rounding: Mode,
    options: WriteOptions,
    merge_one: MergeOne,
) -> MergeReport:
    """Write a folder of graphs with adapters merged into those that they are for.

    Args:
        pipeline: The base.
        output: The folder to write.
        adapters: Adapters, each for one component or several.
        factors: Factor of each adapter.
        rounding: Measurement of rounding.
        options: Options of the mode.
        merge_one: Merges into one component.

    Returns:
        One report for all graphs; parameters are named with their component in front.

    Raises:
        LoraExportError: As `merge_onnx`; `AdapterError` if the pipeline lacks a component.
    """
    decoders = {"--kv-cache": options.kv_cache, "--fused": options.fused}
    pipeline.refuse_options(decoders | refused_options(options))
    reads = [*pipeline.files, *files_read(pipeline.folder, adapters)]
    check_output(pipeline, output, force=options.force, reads=reads)
    if not options.dry_run:
        refuse_existing([output], options.force)
    shares, notes = part_adapters(adapters, factors, pipeline, options.allow_unmatched)
    reports: dict[str, MergeReport] = {}

    def write_graph(graph: PipelineGraph, path: Path) -> None:
        given = shares.get(graph.component, []) if graph.takes_adapters else []
        if not given:
            capture_checkpoint(graph.folder, path, dtype=options.dtype or "float32", part=graph.part)
            return
        reports[graph.component] = merge_one(
            graph.folder,
            path,
            [share.adapter for share in given],
            [share.factor for share in given],
            rounding=rounding,
            options=replace(options, part=graph.part),
        )

    if options.dry_run:
        for graph in pipeline.graphs:
            if graph.component in shares:
                write_graph(graph, output / graph.file)
        return _joined(pipeline, reports, output, notes)

    def manifest() -> Manifest:
        pairs = zip(adapters, factors, strict=True)
        described = [adapter_entry(*pair) for pair in pairs]
        return _manifest(pipeline, _joined(pipeline, reports, output, notes), described, shares)

    size = write_folder(
        pipeline, output, force=options.force, reads=reads, write_graph=write_graph, manifest=manifest
    )
    return replace(_joined(pipeline, reports, output, notes), size_bytes=size, dry_run=False)


def _joined(
    pipeline: Pipeline, reports: Mapping[str, MergeReport], output: Path, notes: Sequence[str]
) -> MergeReport:
    """Return the reports of all components as one."""
    rows, told, warnings = [], list(pipeline.notes), list(notes)
    roundings: dict[str, Rounding] = {}
    for component, report in reports.items():
        plan = report.plan
        rows += [replace(row, parameter=f"{component}{_IN}{row.parameter}") for row in plan.rows]
        told += [f"{component}: {note}" for note in plan.notes]
        warnings += [f"{component}: {warning}" for warning in plan.warnings]
        roundings |= {f"{component}{_IN}{name}": cost for name, cost in report.roundings.items()}
    return MergeReport(
        plan=Plan(tuple(rows), tuple(told), tuple(warnings)),
        roundings=roundings,
        outputs={"folder": output},
        size_bytes=sum(report.size_bytes for report in reports.values()),
        dry_run=True,
    )


def _manifest(
    pipeline: Pipeline,
    report: MergeReport,
    adapters: list[dict[str, Any]],
    shares: Mapping[str, Sequence[Share]],
) -> Manifest:
    """Return the manifest of the folder; each merged graph has one of its own as well."""
    weights = [path for path in pipeline.files if path.suffix == ".safetensors"]
    outputs: dict[str, Any] = {
        "graphs": pipeline.places,
        "adapters": {name: [share.adapter.name for share in given] for name, given in shares.items()},
    }
    return Manifest(
        mode="merge-onnx",
        base=[hash_file(path) for path in weights],
        adapters=adapters,
        plan=report.plan.as_dict(),
        rounding=rounding_dict(report.roundings),
        outputs=outputs,
        versions={"lora-export": __version__} | package_versions(["numpy", "ml_dtypes", "onnx-ir"]),
    )
