"""Merge adapters into a Hugging Face folder: W0 + Σ wᵢ·ΔWᵢ, streamed from shard to shard.

Everything but the changed weights stays as it was: the shards, the order of their tensors, the headers'
metadata, config, tokenizer and other small files. The output folder appears as a whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.blend import AdapterLike, check_blend
from lora_export.checkpoint import Checkpoint
from lora_export.checkpoint_files import MANIFEST, copy_small_files, small_files, write_config, write_index
from lora_export.checkpoint_layout import Layout, layout_of, pieces_of
from lora_export.checkpoint_sites import Placed, place_adapters
from lora_export.errors import AdapterError, CheckpointError, OutputError, SiteError
from lora_export.merge_report import MergeReport
from lora_export.output import OutputSet, output_errors
from lora_export.rounding import Mode, Rounding, rounding_dict, update
from lora_export.stream import nonfinite_error, write_pieces

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_EXAMPLES = 4


def merge_checkpoint(
    base: str | Path,
    adapters: AdapterLike | Sequence[AdapterLike],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    allow_unmatched: bool = False,
    force: bool = False,
    dry_run: bool = False,
    rounding: Mode = "sample",
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Write ``base`` with adapters merged into it to the folder ``output``.

    Sums are made in float32 (float64 where the base is) and rounded once to the type they are stored in.

    Args:
        base: Folder with config.json and safetensors.
        adapters: Paths or `Adapter` values.
        output: The folder to create.
        weights: One factor for each adapter's ΔW; 1 if left out.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for all float tensors; as they are if left out.
        allow_unmatched: Leave out what has no place in the base, instead of refusing.
        force: Replace ``output``, with all that is in it, if an earlier merge wrote it.
        dry_run: Only make the plan.
        rounding: ``sample`` measures large weights on evenly spaced blocks, ``exact`` on every element.
        progress: Called with the number of bytes just written.

    Raises:
        AdapterError: An adapter can't be read or blended, or is for another architecture.
        CheckpointError: The base is damaged, quantised, or a sum is beyond what the dtype can hold.
        SiteError: Some of the adapter has no place in the base; all of it is listed.
        OutputError: The folder exists, or can't be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OutputError(f"there is no output dtype '{dtype}'", f"one of: {', '.join(DTYPES)}")
    loaded, factors = check_blend(adapters, weights)
    checkpoint = Checkpoint.open(base)
    _refuse_quantised(checkpoint)
    _refuse_merged(checkpoint, loaded)
    placed = place_adapters(checkpoint, loaded, factors)
    _refuse_unplaced(checkpoint, loaded, placed, allow_unmatched)
    target = Path(output)
    _refuse_output(target, [Path(base), *(Path(a.source) for a in loaded)], force)
    layouts = [layout_of(shard, placed, DTYPES[dtype] if dtype else None) for shard in checkpoint.shards]
    size = sum(layout.size for layout in layouts)
    small, left_out = small_files(checkpoint)
    report = MergeReport(placed.plan, {}, {"folder": target}, size, 0, tuple(left_out), dry_run)
    if dry_run:
        return report
    roundings: dict[str, Rounding] = {}
    with OutputSet(force) as outputs:
        folder = outputs.stage(target, folder=True)
        with output_errors(target):
            folder.mkdir()
        _refuse_small_disk(folder, size)
        _write_shards(checkpoint, layouts, placed, folder, rounding, progress, roundings)
        with output_errors(target):
            copy_small_files(checkpoint.folder, small, folder)
            write_index(checkpoint, layouts, placed, folder)
            write_config(checkpoint, folder, dtype, placed.untied)
            manifest = _manifest(checkpoint, loaded, factors, placed, roundings, dtype)
            (folder / MANIFEST).write_text(manifest, "utf-8")
        outputs.commit()
    return replace(report, roundings=roundings)


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    quantisation = checkpoint.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise CheckpointError(
            f"the base {checkpoint.folder} is quantised ({method})",
            "merge into the unquantised base and quantise the result, or keep the adapter apart",
        )


def _refuse_merged(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Refuse an adapter that the base's own manifest says is in it already."""
    try:
        record = json.loads((checkpoint.folder / MANIFEST).read_text("utf-8"))
        known = {entry["sha256"]: entry["name"] for entry in record["adapters"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    twice = [
        f"{adapter.name} (as '{known[adapter.sha256]}')"
        for adapter in adapters
        if adapter.sha256 and adapter.sha256 in known
    ]
    if twice:
        raise AdapterError(
            f"the base {checkpoint.folder} has this adapter merged into it already",
            f"merge into the original base; or, if it is meant twice, remove {MANIFEST} from the base",
            twice,
        )


def _refuse_unplaced(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], placed: Placed, allow_unmatched: bool
) -> None:
    refused, rows = placed.plan.refused, placed.plan.rows
    names = ", ".join(f"'{adapter.name}'" for adapter in adapters)
    if not rows:
        raise AdapterError(f"adapter {names} changes nothing", "check that the right file was given")
    if len(refused) == len(rows) and len(set(placed.absent)) >= len({row.parameter for row in rows}):
        examples = [f"the adapter has {row.parameter}" for row in rows[:_EXAMPLES]]
        matrices = [t.name for t in checkpoint.tensors.values() if len(t.shape) > 1]
        raise AdapterError(
            f"adapter {names} is for another architecture: none of its {len(rows)} parameters is in "
            f"{checkpoint.folder}",
            _trained_on(adapters) or "give the base that the adapter was trained on",
            examples + [f"the base has {name}" for name in matrices[:_EXAMPLES]],
        )
    if not refused or (allow_unmatched and len(refused) < len(rows)):
        return
    others = "--allow-unmatched merges the others and leaves these out"
    hints = [
        _trained_on(adapters),
        others if len(refused) < len(rows) else "give the base that the adapter was trained on",
    ]
    raise SiteError(
        f"adapter {names} has {len(refused)} parameters with no place in {checkpoint.folder} "
        f"(of {len(rows)})",
        "; ".join(hint for hint in hints if hint),
        [f"{row.parameter}   {row.reason}" for row in refused],
    )


def _trained_on(adapters: Sequence[Adapter]) -> str:
    names = sorted({adapter.base_model for adapter in adapters if adapter.base_model})
    return f"it was trained on {', '.join(names)}" if names else ""


def _refuse_output(target: Path, inputs: list[Path], force: bool) -> None:
    """Refuse to replace what is no model, and to write over what is read: ``inputs``, the base first."""
    resolved = target.resolve()
    for number, source in enumerate(inputs):
        place = source.resolve()
        # Replacing the output would remove an input; an output inside the base would be copied into itself.
        inside_base = number == 0 and place in resolved.parents
        if place == resolved or resolved in place.parents or inside_base:
            raise OutputError(f"the output {target} and the input {source} overlap", "choose another folder")
    if not target.exists() or not force:
        return
    # A folder goes as a whole: only one that an earlier merge wrote, never a model that somebody trained.
    ours = target.is_dir() and (not any(target.iterdir()) or (target / MANIFEST).exists())
    if not ours:
        raise OutputError(
            f"{target} has no {MANIFEST}, so no merge has written it: it is not replaced, even with --force",
            "choose another name, or remove it yourself",
        )


def _refuse_small_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            f"the disk of {folder.parent} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed "
            "(nothing was replaced)",
            "free some space, or choose a folder on another disk",
        )


def _write_shards(
    checkpoint: Checkpoint,
    layouts: list[Layout],
    placed: Placed,
    folder: Path,
    rounding: Mode,
    progress: Callable[[int], None] | None,
    roundings: dict[str, Rounding],
) -> None:
    problems: list[str] = []
    for shard, layout in zip(checkpoint.shards, layouts, strict=True):
        found = write_pieces(
            folder / shard.path.name,
            layout.size,
            pieces_of(layout, placed),
            progress=progress,
            rounding=rounding,
            nonfinite=problems,
        )
        update(roundings, found)
    if problems:
        raise nonfinite_error(problems)


def _manifest(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    placed: Placed,
    roundings: dict[str, Rounding],
    dtype: str | None,
) -> str:
    """Return the record that lies beside the weights, as JSON without time or absolute paths."""
    from lora_export.manifest import Manifest, adapter_entry, hash_file, package_versions

    base = [hash_file(shard.path) for shard in checkpoint.shards]
    described = [adapter_entry(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    outputs = {"dtype": dtype or "as the base", "added": [added.name for added in placed.added]}
    versions = package_versions(["lora-export", "numpy", "ml_dtypes"])
    return Manifest(
        "merge", base, described, placed.plan.as_dict(), rounding_dict(roundings), outputs, versions
    ).to_json()
