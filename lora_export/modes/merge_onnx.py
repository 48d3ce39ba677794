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
from lora_export.errors import GraphError, OutputError, SiteError
from lora_export.external_data import Change, plan_data, write_data
from lora_export.graph import GraphFile, load_graph, save_graph
from lora_export.manifest import Manifest, adapter_entry, hash_file, package_versions
from lora_export.merge_report import MergeReport
from lora_export.output import OutputSet, output_errors, refuse_replacing
from lora_export.patch import Patch, Placement, join, patch_from, replacement
from lora_export.plan import Plan, PlanRow, unaccounted
from lora_export.rounding import Mode, rounding_dict
from lora_export.sites.bias import restore_biases
from lora_export.sites.isolate import Isolator
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import Miss, Site, Target, WeightOf, targets_of

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]
# Part of `Site.evidence` wherever values were compared.
_CONFIRMED = "content"
_EXAMPLES = 4
_OTHER_VALUES = "does not hold the checkpoint's values"
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
    targets = output_paths(out)
    loaded, factors = check_blend(adapters, weights)
    _refuse_overlap([base, *(Path(adapter.source) for adapter in loaded)], targets)
    if not dry_run:
        refuse_replacing(list(targets.values()), force)
    # A capture is as large as the base: it goes where the output will have room, not to a small /tmp.
    place = out.parent if base.is_dir() and out.parent.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=".lora-export-", dir=place) as scratch:
        graph, weight_of, shared_files = _open_base(base, checkpoint, share_base, Path(scratch))
        base_files = _base_files(base, graph)
        _refuse_overlap(base_files, targets)
        plan, changes = _plan_changes(graph, loaded, factors, weight_of, allow_unmatched)
        if checkpoint is not None:
            plan = _with_unverified(plan, Path(checkpoint))
        slots, size, shared = plan_data(graph, changes, out, shared_files)
        report = MergeReport(plan, {}, targets, size, shared, dry_run=dry_run)
        if dry_run:
            return report
        with output_errors(out), OutputSet(force) as outputs:
            staged = {name: outputs.stage(path) for name, path in targets.items()}
            costs = write_data(staged["data"], targets["data"].name, slots, size, changes, rounding, progress)
            report = replace(report, roundings=costs)
            _mark(graph.model, loaded, factors)
            save_graph(graph.model, staged["graph"])
            _save_manifest(staged["manifest"], report, base_files, loaded, factors)
            outputs.commit()
    return report


def _open_base(
    base: Path, checkpoint: PathLike | None, share_base: bool, scratch: Path
) -> tuple[GraphFile, WeightOf | None, set[Path]]:
    """Load or capture the base; return it with the lookup of its checkpoint and the files it may share."""
    if base.is_dir():
        from lora_export.capture import capture_checkpoint

        graph = load_graph(capture_checkpoint(base, scratch / "base.onnx"))
    else:
        graph = load_graph(base)
    data_files = _data_files(graph)
    if share_base and not data_files:
        raise OutputError(
            f"{base} has no weights in files of their own: nothing can be shared",
            "leave out --share-base, or save the base with external data first",
        )
    folder = base if base.is_dir() and checkpoint is None else checkpoint
    if folder is None:
        return graph, None, data_files if share_base else set()
    from lora_export.canonical import CheckpointWeights, link_weights
    from lora_export.checkpoint import Checkpoint

    opened = Checkpoint.open(Path(folder))
    shared = set()
    if share_base:
        shared = link_weights(graph, opened) if base.is_dir() else data_files
    return graph, CheckpointWeights(opened), shared


def _refuse_overlap(base_files: Sequence[Path], targets: Mapping[str, Path]) -> None:
    inputs = {path.resolve() for path in base_files}
    both = [str(path) for path in targets.values() if path.resolve() in inputs]
    if both:
        raise OutputError("the output would replace what is read", "choose another name", both)


def _with_unverified(plan: Plan, checkpoint: Path) -> Plan:
    """Say which places the checkpoint could not confirm; refuse one that confirms none."""
    silent = [row for row in plan.placed if _CONFIRMED not in row.reason]
    if silent and len(silent) == len(plan.placed):
        raise SiteError(
            f"the checkpoint {checkpoint} stores none of the {len(silent)} parameters that would change",
            "give the folder that the graph was exported from, or leave out --checkpoint",
            [row.parameter for row in silent[:_EXAMPLES]],
        )
    notes = [
        f"{row.parameter}: found by {row.reason} alone, the checkpoint does not store it" for row in silent
    ]
    return replace(plan, notes=(*plan.notes, *notes))


def _save_manifest(
    path: Path,
    report: MergeReport,
    base_files: Sequence[Path],
    adapters: Sequence[Adapter],
    factors: Sequence[float],
) -> None:
    manifest = Manifest(
        "merge-onnx",
        [hash_file(path) for path in base_files],
        [adapter_entry(adapter, factor) for adapter, factor in zip(adapters, factors, strict=True)],
        report.plan.as_dict(),
        rounding_dict(report.roundings),
        {name: path.name for name, path in report.outputs.items()} | {"shared_bytes": report.shared_bytes},
        {"lora-export": __version__} | package_versions(["numpy", "ml_dtypes", "onnx-ir"]),
    )
    path.write_text(manifest.to_json(), encoding="utf-8")


def output_paths(out: Path) -> dict[str, Path]:
    """Return the files that belong to an output graph, the graph last: it appears when the rest is there.

    Raises:
        OutputError: The name does not end in ``.onnx``.
    """
    if out.suffix != ".onnx":
        raise OutputError(f"the output {out} does not end in .onnx", f"-o {out / 'model.onnx'}")
    return {
        "data": out.with_name(out.name + ".data"),
        "manifest": out.with_suffix(".lora.json"),
        "graph": out,
    }


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
            _refuse(graph, adapter, sites, misses, _quantised_operators(resolver))
        rows += [_placed_row(adapter, site) for site in sites]
        rows += [_refused_row(adapter, miss) for miss in misses]
        lost = unaccounted(adapter.tensor_names, rows)
        if lost:
            raise SiteError(f"adapter {adapter.name!r} has tensors that the plan does not speak of", "", lost)
        found.append((adapter, factor, sites))
    changes = _changes(found, isolator)
    _drop_dead(graph)
    return Plan(tuple(rows), tuple(isolator.notes)), changes


_GROUPED = (
    "a grouped convolution mixes the groups through lora_A and can't be merged (PEFT refuses it as well); "
    "expose the LoRA instead"
)


def _refuse_merged(graph: GraphFile, adapters: Sequence[Adapter]) -> None:
    merged = graph.model.metadata_props.get(_MERGED_KEY, "")
    again = [adapter.name for adapter in adapters if adapter.sha256 and adapter.sha256 in merged]
    if again:
        raise GraphError(
            f"{graph.path} has this adapter merged into it already", "merge into the base instead", again
        )


def _quantised_operators(resolver: Resolver) -> str:
    """Return ``" (MatMulInteger)"`` where weights are quantised, whatever their names; else ""."""
    found = {use.node.op_type for use in resolver.uses if use.refusal.startswith("quantised")}
    return f" ({', '.join(sorted(found))})" if found else ""


def _refuse(
    graph: GraphFile, adapter: Adapter, sites: Sequence[Site], misses: Sequence[Miss], quantised: str
) -> None:
    total, name, file = len(sites) + len(misses), repr(adapter.name), graph.path.name
    reasons = [miss.reason for miss in misses]
    lines = [f"{miss.target.key}  {miss.reason}" for miss in misses]
    lost = all(reason.startswith("not found") for reason in reasons)
    if any(reason.startswith("quantised") for reason in reasons) or (lost and not sites and quantised):
        raise SiteError(
            f"{file} has quantised weights{quantised}: adapter {name} can't be merged into {len(misses)} of "
            f"its {total} parameters' places",
            "merge into the unquantised base and quantise the result, or serve the adapter unmerged, with "
            "exposed LoRA (this version can't write such a graph yet)",
            lines,
        )
    if any(_OTHER_VALUES in reason for reason in reasons):
        raise SiteError(
            f"{file} was not exported from this checkpoint, or was changed since: adapter {name} has "
            f"{len(misses)} places (of {total}) that are not confirmed",
            "give the folder that the graph was exported from",
            lines,
        )
    if not sites and lost:
        raise SiteError(
            f"adapter {name} was made for another model: none of its {total} parameters "
            f"has a place in {file}",
            "check the base; if the graph's names are gone, give --checkpoint BASE_DIR to match by value",
            lines,
        )
    raise SiteError(
        f"adapter {name} has {len(misses)} parameters with no place in {file} (of {total})",
        _hint(reasons, bool(sites)),
        lines,
    )


def _hint(reasons: Sequence[str], some: bool) -> str:
    hints = []
    if any(reason.startswith("shapes differ") for reason in reasons):
        hints.append("give the base that the adapter was trained on")
    if any("--checkpoint" in reason or reason.startswith("not found") for reason in reasons):
        hints.append("give --checkpoint BASE_DIR to match by value")
    if any(" is found as well" in reason for reason in reasons):
        hints.append("give --component where the adapter's file serves several models")
    if some:
        hints.append("--allow-unmatched goes on without them")
    return "; ".join(hints) or "export the graph again, with names kept, and give --checkpoint BASE_DIR"


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


def _placed_row(adapter: Adapter, site: Site) -> PlanRow:
    operators = sorted({use.node.op_type for part in site.parts for use in part.uses})
    layouts = []
    for part in site.parts:
        first = part.placements[0]
        words = ["transposed"] if first.transposed else []
        if first.row or first.col or first.rows != (0, site.target.matrix[0]):
            words.append(
                f"rows {first.rows[0]}–{first.rows[1]} at {first.col if first.transposed else first.row}"
            )
        if len(part.placements) > 1:
            words.append(f"{len(part.placements)} experts")
        if first.row_scale is not None:
            words.append("rescaled per output channel")
        layouts.append(" ".join(words) or "as in PyTorch")
    return PlanRow(
        adapter.name,
        site.target.key,
        site.target.tensor_names,
        site.target.action,
        ", ".join(str(part.root.name) for part in site.parts),
        ", ".join(operators),
        "; ".join(layouts),
        site.evidence,
    )


def _refused_row(adapter: Adapter, miss: Miss) -> PlanRow:
    return PlanRow(adapter.name, miss.target.key, miss.target.tensor_names, "refused", reason=miss.reason)


def _drop_dead(graph: GraphFile) -> None:
    """Remove constants that nothing reads after copies took over."""
    for owner in graph.graphs():
        inputs = {id(value) for value in owner.inputs}
        for name, value in list(owner.initializers.items()):
            if not value.uses() and not value.is_graph_output() and id(value) not in inputs:
                owner.initializers.pop(name)


def _base_files(base: Path, graph: GraphFile) -> list[Path]:
    if base.is_dir():
        return sorted([*base.glob("*.safetensors"), *base.glob("config.json")])
    return [base, *sorted(_data_files(graph))]


def _data_files(graph: GraphFile) -> set[Path]:
    tensors = (value.const_value for value in graph.initializers())
    return {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _mark(model: ir.Model, adapters: Sequence[Adapter], factors: Sequence[float]) -> None:
    """Say in the graph itself what was merged: a later merge of the same adapter is then refused."""
    mine = "; ".join(f"{a.name} sha256={a.sha256} weight={w}" for a, w in zip(adapters, factors, strict=True))
    before = model.metadata_props.get(_MERGED_KEY)
    model.metadata_props[_MERGED_KEY] = f"{before}; {mine}" if before else mine
