"""Merge adapters into the constants of an ONNX graph: W' = W0 + Σ wᵢ·scalingᵢ·Bᵢ·Aᵢ."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.blend import check_blend
from lora_export.branches.place import refuse_exposed
from lora_export.branches.union import refuse_other_bases
from lora_export.errors import GraphError
from lora_export.external_data import Change, plan_data, write_data
from lora_export.graph import GraphFile, save_graph
from lora_export.manifest import FileHash, Manifest, adapter_entry, package_versions
from lora_export.merge_report import MergeReport
from lora_export.onnx_base import drop_dead, open_base, output_paths
from lora_export.output import OutputSet, output_errors, refuse_replacing
from lora_export.patch import Patch, Placement, join, patch_from, replacement
from lora_export.placing import (
    placed_row,
    quantised_operators,
    refuse,
    refuse_unaccounted,
    refused_row,
    with_unverified,
)
from lora_export.plan import Plan, PlanRow
from lora_export.rounding import Mode, rounding_dict
from lora_export.sites.bias import restore_biases
from lora_export.sites.isolate import Isolator
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import Miss, Site, Target, WeightOf, targets_of

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]
_MERGED_KEY = "lora_export.merged"


def merge_onnx(
    base: PathLike,
    adapters: PathLike | Adapter | Sequence[PathLike | Adapter],
    output: PathLike,
    *,
    checkpoint: PathLike | None = None,
    weights: Sequence[float] | None = None,
    share_base: bool = False,
    allow_unmatched: bool = False,
    force: bool = False,
    dry_run: bool = False,
    rounding: Mode = "sample",
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Merge adapters into an ONNX graph and write it as ``output``, ``output.data`` and ``*.lora.json``.

    Args:
        base: An ONNX file from any exporter, or a Hugging Face checkpoint folder, which is then captured.
        adapters: What `load_adapter` reads, or `Adapter` values; one or several.
        output: The ``.onnx`` file to write.
        checkpoint: The folder of the checkpoint that ``base`` was exported from. Weights are then found, and
            every match by name is verified, by content.
        weights: Factor on each adapter's delta; 1 by default.
        share_base: Leave unchanged weights in the base's own data files; the output's data file holds
            only what the adapters changed.
        allow_unmatched: Go on without the tensors that have no place; the manifest says which.
        force: Replace existing output files.
        dry_run: Make the plan and write nothing.
        rounding: Measure rounding on a sample of large weights, or ``exact`` on every element.
        progress: Called with the number of bytes just written.

    Returns:
        The plan, the rounding report and the files.

    Raises:
        AdapterError: An adapter can't be read or used.
        GraphError: The base can't be read.
        SiteError: Tensors of an adapter have no place in the graph, or none has.
        OutputError: The output exists or can't be written.
    """
    out, base = Path(output), Path(base)
    loaded, factors = check_blend(adapters, weights)
    reading = open_base(
        base, out, loaded, checkpoint=checkpoint, share_base=share_base, force=force, dry_run=dry_run
    )
    with reading as (opened, targets):
        graph = opened.graph
        refuse_other_bases(loaded, opened.identity)
        plan, changes = _plan_changes(graph, loaded, factors, opened.weight_of, allow_unmatched)
        if checkpoint is not None:
            plan = with_unverified(plan, Path(checkpoint))
        slots, size, shared = plan_data(graph, changes, out, opened.shared_files)
        report = MergeReport(plan, {}, targets, size, shared, dry_run=dry_run)
        if dry_run:
            return report
        with output_errors(out), OutputSet(force) as outputs:
            staged = {name: outputs.stage(path) for name, path in targets.items()}
            costs = write_data(staged["data"], targets["data"].name, slots, size, changes, rounding, progress)
            report = replace(report, roundings=costs)
            _mark(graph.model, loaded, factors)
            save_graph(graph.model, staged["graph"])
            _save_manifest(staged["manifest"], report, list(opened.hashes.values()), loaded, factors)
            outputs.commit()
    return report


def _save_manifest(
    path: Path,
    report: MergeReport,
    base: list[FileHash],
    adapters: Sequence[Adapter],
    factors: Sequence[float],
) -> None:
    manifest = Manifest(
        "merge-onnx",
        base,
        [adapter_entry(adapter, factor) for adapter, factor in zip(adapters, factors, strict=True)],
        report.plan.as_dict(),
        rounding_dict(report.roundings),
        {name: path.name for name, path in report.outputs.items()} | {"shared_bytes": report.shared_bytes},
        {"lora-export": __version__} | package_versions(["numpy", "ml_dtypes", "onnx-ir"]),
    )
    path.write_text(manifest.to_json(), encoding="utf-8")


def export_onnx(
    module: torch.nn.Module,
    adapters: PathLike | Adapter | Sequence[PathLike | Adapter],
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    output: PathLike,
    *,
    dynamic_shapes: Any = None,
    weights: Sequence[float] | None = None,
    allow_unmatched: bool = False,
    force: bool = False,
    rounding: Mode = "sample",
) -> MergeReport:
    """Export a PyTorch module with adapters merged into it.

    The module itself is not changed.

    Args:
        module: Any `nn.Module`; put it into eval mode first.
        adapters: As for `merge_onnx`; module paths are those of ``module.named_modules()``.
        example_inputs: Positional or keyword inputs to trace with.
        output: The ``.onnx`` file to write.
        dynamic_shapes: As for `torch.export.export`.
        weights: Factor on each adapter's delta.
        allow_unmatched: Go on without the tensors that have no place.
        force: Replace existing output files.
        rounding: As for `merge_onnx`.

    Returns:
        As `merge_onnx`.

    Raises:
        LoraExportError: As `merge_onnx`; `GraphError` where torch.onnx can't export the module.
    """
    from lora_export.capture import capture_module

    refuse_replacing(list(output_paths(Path(output)).values()), force)
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        base = capture_module(module, example_inputs, Path(scratch) / "base.onnx", dynamic_shapes)
        return merge_onnx(
            base,
            adapters,
            output,
            weights=weights,
            allow_unmatched=allow_unmatched,
            force=force,
            rounding=rounding,
        )


def _plan_changes(
    graph: GraphFile,
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    weight_of: WeightOf | None,
    allow_unmatched: bool,
) -> tuple[Plan, dict[ir.Value, Change]]:
    """Resolve every target of every adapter, then give each its constant and its patches."""
    refuse_exposed(graph)
    _refuse_merged(graph, adapters)
    resolver, isolator = Resolver(graph, weight_of), Isolator()
    found: list[tuple[Adapter, float, list[Site]]] = []
    rows: list[PlanRow] = []
    for adapter, factor in zip(adapters, factors, strict=True):
        sites, misses = resolver.resolve(targets_of(adapter), adapter.flattened)
        sites, misses = restore_biases(sites, misses, weight_of)
        grouped = [site for site in sites if site.target.module and site.target.module.groups > 1]
        sites = [site for site in sites if site not in grouped]
        misses += [Miss(site.target, _GROUPED) for site in grouped]
        if misses and not (allow_unmatched and sites):
            refuse(graph, adapter, sites, misses, quantised_operators(resolver))
        rows += [placed_row(adapter, site) for site in sites]
        rows += [refused_row(adapter, miss) for miss in misses]
        refuse_unaccounted(adapter, rows)
        found.append((adapter, factor, sites))
    changes = _changes(found, isolator)
    drop_dead(graph)
    return Plan(tuple(rows), tuple(isolator.notes)), changes


_GROUPED = (
    "a grouped convolution mixes the groups through lora_A and can't be merged (PEFT refuses it as well); "
    "expose it with swap-onnx instead"
)


def _refuse_merged(graph: GraphFile, adapters: Sequence[Adapter]) -> None:
    merged = graph.model.metadata_props.get(_MERGED_KEY, "")
    again = [adapter.name for adapter in adapters if adapter.sha256 and adapter.sha256 in merged]
    if again:
        raise GraphError(
            f"{graph.path} has this adapter merged into it already", "merge into the base instead", again
        )


def _changes(found: list[tuple[Adapter, float, list[Site]]], isolator: Isolator) -> dict[ir.Value, Change]:
    wanted: dict[ir.Value, list[tuple[Target, Placement, float]]] = defaultdict(list)
    for _, factor, sites in found:
        for site in sites:
            target = site.target
            for part in site.parts:
                value = isolator.constant_for(part, target.path, target.key.rpartition(".")[2])
                wanted[value] += [(target, placement, factor) for placement in part.placements]
    return {
        value: Change(partial(_patches, group, _work_dtype(value)), group[0][0].experts > 1)
        for value, group in wanted.items()
    }


def _patches(
    group: Sequence[tuple[Target, Placement, float]], dtype: type[np.floating[Any]]
) -> tuple[Patch, ...]:
    return tuple(join([patch_of(target, placement, factor, dtype) for target, placement, factor in group]))


def _work_dtype(value: ir.Value) -> type[np.floating[Any]]:
    return np.float64 if value.dtype == ir.DataType.DOUBLE else np.float32


def patch_of(target: Target, placement: Placement, factor: float, dtype: type[np.floating[Any]]) -> Patch:
    """Return the patch that a target makes at a placement."""
    if target.action == "merge":
        assert target.module is not None
        return patch_from(target.module, placement, factor, dtype)
    assert target.values is not None
    start, stop = placement.rows
    values = np.asarray(target.values).reshape(target.matrix)[start:stop].astype(dtype)
    if placement.row_scale is not None:
        values = values * placement.row_scale.astype(dtype)[:, None]
    if placement.transposed:
        values = np.ascontiguousarray(values.T)
    if target.action == "replace":
        return replacement(target.key, values, placement.row, placement.col)
    # A vector is one column: its addend is the outer product with 1.
    one = np.ones((1, 1), dtype)
    height, width = values.shape
    return Patch(target.key, placement.row, placement.col, height, width, values * dtype(factor), one)


def _mark(model: ir.Model, adapters: Sequence[Adapter], factors: Sequence[float]) -> None:
    """Say in the graph itself what was merged: a later merge of the same adapter is then refused."""
    mine = "; ".join(f"{a.name} sha256={a.sha256} weight={w}" for a, w in zip(adapters, factors, strict=True))
    before = model.metadata_props.get(_MERGED_KEY)
    model.metadata_props[_MERGED_KEY] = f"{before}; {mine}" if before else mine
