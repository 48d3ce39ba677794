"""Merge adapters into the constants of an ONNX graph: W' = W0 + Σ wᵢ·scalingᵢ·Bᵢ·Aᵢ."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.base.history.history import MANIFEST, History, history_of
from lora_export.base.history.in_graph import CAPTURED_KEY, entries_before
from lora_export.base.lowering import Runtime
from lora_export.base.open_base import Base, open_base, output_paths
from lora_export.base.pipeline_graphs import open_several
from lora_export.base.planning.of_module import refuse_other_modules
from lora_export.base.reads import CheckpointChoice
from lora_export.base.ties.copies import may_replace_ties
from lora_export.base.write_options import WriteOptions
from lora_export.formats.provenance import refuse_other_bases
from lora_export.graph.data_identity import mark_data
from lora_export.graph.external_data import InitializerChange, plan_data, write_data
from lora_export.graph.onnx_file import save_graph
from lora_export.machines.packages import package_versions
from lora_export.modes.merging.blend import check_blend
from lora_export.modes.merging.checkpoint_files import small_files
from lora_export.modes.merging.into_checkpoint import CheckpointMerge, plan_merge
from lora_export.modes.merging.into_graph import mark_merged, plan_changes
from lora_export.modes.merging.report import MergeReport
from lora_export.modes.pipelines.merge import merge_pipeline
from lora_export.modes.pipelines.parts import merge_parts
from lora_export.modes.quantising.choice import choice_of
from lora_export.modes.quantising.quantise import Quantising, packages_of, quantise
from lora_export.plan import Plan
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.hashes import hash_written, identity_of
from lora_export.storage.inputs import same_inputs
from lora_export.storage.manifest import Manifest, adapter_entry
from lora_export.storage.outputs import OutputSet, output_errors, refuse_replacing
from lora_export.storage.rounding import Mode, Rounding, rounding_dict
from lora_export.untrusted.places import is_folder

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]


@same_inputs()
def merge_onnx(
    base: PathLike,
    adapters: PathLike | Adapter | Sequence[PathLike | Adapter],
    output: PathLike,
    *,
    checkpoint: CheckpointChoice = None,
    weights: Sequence[float] | None = None,
    component: str | None = None,
    dtype: str | None = None,
    kv_cache: bool = False,
    fused: bool = False,
    runtime: Runtime = "portable",
    quantize: str | None = None,
    share_base: bool = False,
    allow_unmatched: bool = False,
    force: bool = False,
    dry_run: bool = False,
    rounding: Mode = "sample",
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Merge adapters into an ONNX graph and write it as ``output``, ``output.data`` and ``*.lora.json``.

    Args:
        base: An ONNX file from any exporter, or a folder of transformers or diffusers (a model's or a whole
            pipeline's), which is then captured.
        adapters: Paths for `load_adapter`, or `Adapter` values; one or several.
        output: The ``.onnx`` file to write; the folder of the graphs of a pipeline, or with ``kv_cache`` of
            an encoder–decoder or a vision–language model; of the last one, a file is the language model's.
        checkpoint: Folder of the checkpoint that ``base`` was exported from. Weights are then found by
            content, and every match by name is verified. None: the folder that an adapter names as its base,
            if it is on this machine; False: names alone.
        weights: Factor of each adapter's ΔW; 1 by default.
        component: The part of the adapters that belongs to the base: ``unet``, ``text_encoder``, … of files
            that serve several models, else the path of a submodel, ``model.encoder``.
        dtype: Dtype of a captured folder: ``float32`` (the default), ``float16`` or ``bfloat16``, to which
            the sum, computed in float32, is rounded once.
        kv_cache: Capture a decoder with its key-value cache as inputs and outputs; an encoder–decoder as two
            graphs, a vision–language model as three.
        fused: Capture attention, rotary embeddings and RMS norms as one node each (opset 23).
        runtime: Runtime that a captured folder is lowered for, as for `capture_onnx`.
        quantize: Quantise the written weights to ``int4`` or ``int8`` as `quantize_onnx` does by default,
            after the merge.
        share_base: Leave unchanged weights in the base's own data files; the output's data file holds
            only what the adapters changed.
        allow_unmatched: Leave out tensors that have no site; the manifest lists them.
        force: Replace existing output files.
        dry_run: Make the plan and write nothing.
        rounding: Measure rounding on a sample of large weights, or ``exact`` on every element.
        progress: Function that is called with the number of bytes just written.

    Returns:
        The plan, the rounding report and the files.

    Raises:
        AdapterError: An adapter can't be read or used.
        GraphError: The base can't be read.
        SiteError: Tensors of an adapter have no site in the graph, or none has.
        OutputError: The output exists or can't be written.
    """
    out, base = Path(output), Path(base)
    choice_of(quantize)
    loaded, factors = check_blend(adapters, weights, component)
    # A merged weight gets no branches beside it.
    options = replace(WriteOptions.among(locals()), packed=True)
    several = open_several(base, kv_cache, out)
    if several is None:
        return _merge_one(base, out, loaded, factors, rounding=rounding, options=options)
    if not several.index:
        return merge_parts(several, out, loaded, factors, rounding=rounding, options=options)
    return merge_pipeline(
        several, out, loaded, factors, rounding=rounding, options=options, merge_one=_merge_one
    )


def _merge_one(
    base: Path,
    output: Path,
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    *,
    rounding: Mode,
    options: WriteOptions,
) -> MergeReport:
    """Merge into a graph, or into the model of a folder."""
    merging = _Merging(
        base=base,
        out=output,
        adapters=adapters,
        factors=factors,
        rounding=rounding,
        before=_merged_before(base),
        options=options,
    )
    return merging.run()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Merging:
    """Merge into a graph.

    Attributes:
        base: The graph or folder.
        out: The graph to write.
        adapters: Adapters to add.
        factors: Factor of each adapter.
        rounding: Measurement of rounding.
        before: Adapters that earlier merges have put into the base.
        options: Options of the mode.
    """

    base: Path
    out: Path
    adapters: Sequence[Adapter]
    factors: Sequence[float]
    rounding: Mode
    before: History
    options: WriteOptions

    def _in_folder(self) -> CheckpointMerge | None:
        """Return the merge into a folder's own tensors, if the graph captured from it has no site for it.

        A graph captured in another dtype than float32 holds rounded weights, so the sum is computed before,
        and rounded once. Single rows of an embedding have a site only in the folder, which also has the ties.
        """
        if not is_folder(self.base):
            return None
        dtype = self.options.dtype or "float32"
        rows = any(adapter.token_rows for adapter in self.adapters)
        if dtype == "float32" and not rows and not may_replace_ties(self.base, self.adapters):
            return None
        return plan_merge(
            self.base,
            self.adapters,
            factors=self.factors,
            dtype=dtype,
            allow_unmatched=self.options.allow_unmatched,
        )

    def run(self) -> MergeReport:
        """Open the base, change its constants and write it; in a dry run only make the plan."""
        folder = self._in_folder()
        if folder and self.options.dry_run:
            return MergeReport(
                plan=folder.placed.plan,
                roundings={},
                outputs=output_paths(self.out),
                size_bytes=folder.size_bytes,
                dry_run=True,
            )
        roundings: dict[str, Rounding] = {}
        prepare = _merged_folder(folder, self.rounding, roundings) if folder else None
        reading = open_base(self.base, self.out, self.adapters, self.options, prepare=prepare)
        with reading as (opened, targets):
            refuse_other_bases(self.adapters, opened.identity)
            plan, changes = self._planned(opened, folder)
            quantising = self._quantising(opened, changes)
            slots, size, shared = plan_data(opened.graph, changes, self.out, opened.shared_files)
            report = MergeReport(
                plan=plan,
                roundings={},
                outputs=targets,
                size_bytes=size,
                shared_bytes=shared,
                dry_run=self.options.dry_run,
                quantised=quantising.quantised if quantising else None,
            )
            if self.options.dry_run:
                return report
            with output_errors(self.out), OutputSet(self.options.force, opened.reads) as outputs:
                staged = {name: outputs.stage(path) for name, path in targets.items()}
                costs = write_data(
                    staged["data"],
                    targets["data"].name,
                    slots,
                    size=size,
                    changes=changes,
                    rounding=self.rounding,
                    progress=self.options.progress,
                )
                if quantising:
                    report = replace(report, quantised=quantising.finished())
                    costs |= quantising.roundings
                report = replace(report, roundings=roundings | costs)
                self._write_graph(opened, report, staged)
                outputs.commit()
        return report

    def _planned(
        self, opened: Base, folder: CheckpointMerge | None
    ) -> tuple[Plan, dict[ir.Value, InitializerChange]]:
        """Return the plan, and the changes of each constant, which are none after a merge into the folder."""
        if folder:
            return folder.placed.plan, {}
        plan, changes = plan_changes(
            opened.graph,
            self.adapters,
            self.factors,
            weight_of=opened.weight_of,
            allow_unmatched=self.options.allow_unmatched,
        )
        return opened.verified(plan), changes

    def _quantising(self, opened: Base, changes: Mapping[ir.Value, InitializerChange]) -> Quantising | None:
        """Let the graph's products read codes of the merged weights, if the user wants that."""
        choice = choice_of(self.options.quantize)
        if choice is None:
            return None
        scratch = None if self.options.dry_run else self.out.parent
        return quantise(opened.graph, choice, changes, rounding=self.rounding, scratch=scratch)

    def _write_graph(self, opened: Base, report: MergeReport, staged: Mapping[str, Path]) -> None:
        """Write the graph with its metadata, and the manifest, beside the written data."""
        model = opened.graph.model
        if is_folder(self.base) and (entries := entries_before(self.before)):
            model.metadata_props[CAPTURED_KEY] = entries
        mark_merged(model, self.adapters, self.factors, opened.identity)
        name = report.outputs["data"].name
        own = {name: hash_written(staged["data"], name)}
        manifest_name = report.outputs["manifest"].name
        read = mark_data(model, opened.shared_places(self.out) | own, manifest_name)
        save_graph(model, staged["graph"])
        own[self.out.name] = hash_written(staged["graph"], self.out.name)
        written: dict[str, Any] = {name: path.name for name, path in report.outputs.items()}
        written |= {"identity": identity_of(own.values()), "shared_bytes": report.shared_bytes}
        pairs = zip(self.adapters, self.factors, strict=True)
        manifest = Manifest(
            mode="merge-onnx",
            base=list(opened.hashes.values()),
            adapters=[adapter_entry(adapter, factor) for adapter, factor in pairs],
            plan=report.plan.as_dict(),
            rounding=rounding_dict(report.roundings),
            outputs=written | self.before.outputs(),
            versions={"lora-export": __version__} | package_versions(packages_of(report.quantised)),
            files={**read, **own},
            quantised=report.quantised.as_dict() if report.quantised else {},
        )
        manifest.save(staged["manifest"])


def _merged_before(base: Path) -> History:
    """Return what is merged into a base already: a folder, or a graph with its manifest beside it."""
    if is_folder(base):
        return history_of(base / MANIFEST)
    return history_of(base.with_suffix(".lora.json"), base)


def _merged_folder(
    merge: CheckpointMerge, rounding: Mode, roundings: dict[str, Rounding]
) -> Callable[[Path], Path]:
    """Return a function that writes a merged folder to capture, and fills ``roundings``."""
    configs = [
        path for path in small_files(merge.checkpoint, merge.placed.changes)[0] if path.suffix == ".json"
    ]

    def prepare(scratch: Path) -> Path:
        folder = scratch / "merged"
        with output_errors(folder):
            roundings.update(merge.write(folder, configs, rounding))
        return folder

    return prepare


def export_onnx(
    module: torch.nn.Module,
    adapters: PathLike | Adapter | Sequence[PathLike | Adapter],
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    output: PathLike,
    *,
    dynamic_shapes: Any = None,
    weights: Sequence[float] | None = None,
    component: str | None = None,
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
        weights: Factor of each adapter's ΔW.
        component: As for `merge_onnx`.
        allow_unmatched: Leave out tensors that have no site.
        force: Replace existing output files.
        rounding: As for `merge_onnx`.

    Returns:
        The result of `merge_onnx`.

    Raises:
        LoraExportError: As `merge_onnx`; `GraphError` if torch.onnx can't export the module.
    """
    from lora_export.base.capture.capture import capture_module

    refuse_replacing(list(output_paths(Path(output)).values()), force)
    refuse_other_modules(module, check_blend(adapters, weights, component)[0], allow_unmatched)
    with scratch_folder() as scratch:
        base = capture_module(module, example_inputs, scratch / "base.onnx", dynamic_shapes)
        return merge_onnx(
            base,
            adapters,
            output,
            weights=weights,
            component=component,
            allow_unmatched=allow_unmatched,
            force=force,
            rounding=rounding,
        )
