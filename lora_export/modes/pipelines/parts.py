"""Merge adapters into a model that becomes several graphs, and write them.

The adapter is merged into the folder's own tensors, each of which then goes into the graph that reads it:
what the decoder's cross-attention makes of the encoder's answer is in the encoder's graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.weights import CheckpointWeights
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.base.history.in_graph import CAPTURED_KEY, entries_before
from lora_export.base.pipeline_graphs import Pipeline, PipelineGraph
from lora_export.base.reads import files_read
from lora_export.base.write_options import WriteOptions
from lora_export.formats.provenance import refuse_other_bases
from lora_export.graph.onnx_file import load_graph, save_graph
from lora_export.machines.packages import package_versions
from lora_export.modes.merging.checkpoint_files import small_files
from lora_export.modes.merging.into_checkpoint import CheckpointMerge, plan_merge
from lora_export.modes.merging.into_graph import mark_merged
from lora_export.modes.merging.report import MergeReport
from lora_export.modes.pipelines.division import Division
from lora_export.modes.pipelines.folder import check_output, write_folder
from lora_export.plan import Plan
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.hashes import FileHash, hash_file, identity_of
from lora_export.storage.inputs import same_inputs
from lora_export.storage.manifest import Manifest, adapter_entry
from lora_export.storage.outputs import output_errors, refuse_existing
from lora_export.storage.rounding import Mode, rounding_dict


def merge_parts(
    base: Pipeline,
    output: Path,
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    *,
    rounding: Mode,
    options: WriteOptions,
) -> MergeReport:
    """Write all graphs with adapters merged into them.

    Args:
        base: Folder of an encoder–decoder or a vision–language model.
        output: The folder to write.
        adapters: Adapters, each for one part or several.
        factors: Factor of each adapter.
        rounding: Measurement of rounding.
        options: Options of the mode.

    Raises:
        LoraExportError: As `merge_onnx`.
    """
    base.refuse_options(refused_options(options))
    reads = [*base.files, *files_read(base.folder, adapters)]
    check_output(base, output, force=options.force, reads=reads)
    if not options.dry_run:
        refuse_existing([output], options.force)
    dtype = options.dtype or "float32"
    merge = plan_merge(
        base.folder, adapters, factors=factors, dtype=dtype, allow_unmatched=options.allow_unmatched
    )
    weights = [hash_file(shard.path) for shard in merge.checkpoint.shards]
    identity = identity_of(weights)
    refuse_other_bases(adapters, identity)
    report = MergeReport(
        plan=merge.placed.plan,
        outputs={"folder": output},
        size_bytes=merge.size_bytes,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        return report
    division = Division(
        adapters=adapters, graphs_left=len(base.graphs), allow_unmatched=options.allow_unmatched
    )
    before = entries_before(history_of(base.folder / MANIFEST))

    def write_graph(graph: PipelineGraph, path: Path) -> None:
        capture_checkpoint(graph.folder, path, dtype=dtype, fused=options.fused, part=graph.part)
        with same_inputs():  # it is an output, that is written to after it was read
            opened = load_graph(path)
        division.share(opened, CheckpointWeights(Checkpoint.open(graph.folder)))
        if before:
            opened.model.metadata_props[CAPTURED_KEY] = before
        mark_merged(opened.model, adapters, factors, identity)
        save_graph(opened.model, path)

    with output_errors(output), scratch_folder(output.absolute().parent) as scratch:
        merged = _merged(base, merge, scratch / "merged")
        report = replace(report, roundings=merge.write(merged.folder, list(merged.copied), rounding))

        def manifest() -> Manifest:
            nonlocal report
            report = replace(report, plan=_with_lost(report.plan, division.lost))
            entries = [adapter_entry(*pair) for pair in zip(adapters, factors, strict=True)]
            return _manifest(base, report, weights, entries)

        size = write_folder(
            merged, output, force=options.force, reads=reads, write_graph=write_graph, manifest=manifest
        )
    return replace(report, size_bytes=size)


def _manifest(
    base: Pipeline, report: MergeReport, weights: list[FileHash], adapters: list[dict[str, Any]]
) -> Manifest:
    return Manifest(
        mode="merge-onnx",
        base=weights,
        adapters=adapters,
        plan=report.plan.as_dict(),
        rounding=rounding_dict(report.roundings),
        outputs={"graphs": base.places},
        versions={"lora-export": __version__} | package_versions(["numpy", "ml_dtypes", "onnx-ir"]),
    )


def _with_lost(plan: Plan, lost: Sequence[str]) -> Plan:
    """Return a plan with a warning of modules that were merged into weights which no graph has."""
    found = [f"no graph reads {path}: what the adapter changes there is left out" for path in lost]
    return replace(plan, warnings=(*plan.warnings, *found))


def _merged(base: Pipeline, merge: CheckpointMerge, folder: Path) -> Pipeline:
    """Return what the merged folder will be, which has only those small files that belong in it."""
    kept = small_files(merge.checkpoint, merge.placed.changes)[0]
    graphs = tuple(replace(graph, folder=folder) for graph in base.graphs)
    copied = tuple(path for path in base.copied if path in kept)
    return replace(base, folder=folder, graphs=graphs, copied=copied)


def refused_options(options: WriteOptions) -> dict[str, bool]:
    """Return the options that several graphs of one folder don't have, and whether they are given."""
    return {
        "--checkpoint": bool(options.checkpoint),
        "--quantize": options.quantize is not None,
        "--runtime": options.runtime != "portable",
        "--share-base": options.share_base,
    }
