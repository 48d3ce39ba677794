"""Merge adapters into a Hugging Face folder: W0 + Σ wᵢ·ΔWᵢ, streamed from shard to shard.

All but the changed weights stays as it was: the shards, the order of their tensors, the headers' metadata,
config, tokenizer and other small files. The output folder appears as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.base.checkpoint.sentence_modules import lost_modules
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.base.reads import files_read
from lora_export.formats.given import AdapterLike
from lora_export.machines.packages import package_versions
from lora_export.modes.merging.blend import check_blend
from lora_export.modes.merging.checkpoint_files import small_files, unmerged_notes
from lora_export.modes.merging.into_checkpoint import CheckpointMerge, plan_merge
from lora_export.modes.merging.output_folder import refuse_output
from lora_export.modes.merging.report import MergeReport
from lora_export.storage.hashes import hash_file, hash_folder
from lora_export.storage.inputs import same_inputs
from lora_export.storage.manifest import Manifest, adapter_entry
from lora_export.storage.outputs import OutputSet, output_errors, refuse_inputs
from lora_export.storage.rounding import Mode, rounding_dict


@same_inputs()
def merge_checkpoint(
    base: str | Path,
    adapters: AdapterLike | Sequence[AdapterLike],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    component: str | None = None,
    dtype: str | None = None,
    allow_unmatched: bool = False,
    resize: bool = False,
    force: bool = False,
    dry_run: bool = False,
    rounding: Mode = "sample",
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Write ``base`` with adapters merged into it to the folder ``output``.

    Sums are computed in float32 (float64 if the base's are) and rounded once to the dtype they are stored in.

    Args:
        base: Folder with config.json and safetensors.
        adapters: Paths or `Adapter` values.
        output: The folder to create.
        weights: Factor of each adapter's ΔW; 1 by default.
        component: The part of the adapters that belongs to the base: ``unet``, ``text_encoder``, … of files
            that serve several models, else the path of a submodel, ``model.encoder``.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for all float tensors; by default their own.
        allow_unmatched: Leave out parameters that have no site in the base.
        resize: Give the base rows for new tokens, if an adapter holds a whole embedding and head with more
            rows.
        force: Replace ``output``, if an earlier merge wrote all of it.
        dry_run: Only make the plan.
        rounding: ``sample`` measures large weights on evenly spaced blocks, ``exact`` on every element.
        progress: Function that is called with the number of bytes just written.

    Raises:
        AdapterError: An adapter can't be read or blended, is for another architecture, or was trained with
            further modules (sentence-transformers) that the base lacks.
        CheckpointError: The base is damaged, quantised, or a sum is too large for the dtype.
        SiteError: Parameters of an adapter have no site in the base; all are listed.
        OutputError: The folder exists, or can't be written.
    """
    loaded, factors = check_blend(adapters, weights, component)
    merge = plan_merge(
        base, loaded, factors=factors, dtype=dtype, allow_unmatched=allow_unmatched, resize=resize
    )
    beside = lost_modules(loaded, merge.checkpoint.folder, refuse=not allow_unmatched)
    plan = replace(merge.placed.plan, notes=(*beside, *merge.placed.plan.notes))
    target, folder = Path(output), Path(base)
    reads = files_read(folder, loaded, None)
    refuse_inputs([target], reads)
    refuse_output(target, folder, force)
    small, left_out = small_files(merge.checkpoint, merge.placed.changes)
    report = MergeReport(
        plan=replace(plan, notes=(*plan.notes, *unmerged_notes(merge.checkpoint, small))),
        outputs={"folder": target},
        size_bytes=merge.size_bytes,
        left_out=tuple(left_out),
        dry_run=dry_run,
    )
    if dry_run:
        return report
    described = [adapter_entry(*pair) for pair in zip(loaded, factors, strict=True)]
    with OutputSet(force, reads) as outputs:
        staged = outputs.stage(target, folder=True)
        with output_errors(target):
            report = replace(report, roundings=merge.write(staged, small, rounding, progress))
            _manifest(merge, report, described, staged).save(staged / MANIFEST)
        # The set itself refuses files that are read, now once more.
        outputs.commit(lambda: refuse_output(target, folder, force))
    return report


def _manifest(
    merge: CheckpointMerge, report: MergeReport, adapters: list[dict[str, Any]], folder: Path
) -> Manifest:
    """Return the manifest beside the weights in ``folder``, without time or absolute paths."""
    base = [hash_file(shard.path) for shard in merge.checkpoint.shards]
    added = [added.name for added in merge.placed.added]
    outputs = {"dtype": merge.dtype or "as the base", "added": added}
    outputs |= history_of(merge.checkpoint.folder / MANIFEST).outputs()
    versions = package_versions(["lora-export", "numpy", "ml_dtypes"])
    return Manifest(
        mode="merge",
        base=base,
        adapters=adapters,
        plan=report.plan.as_dict(),
        rounding=rounding_dict(report.roundings),
        outputs=outputs,
        versions=versions,
        files=hash_folder(folder),
    )
