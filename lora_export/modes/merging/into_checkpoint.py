"""Adapters placed in a checkpoint's tensors, and the folder that comes of it, streamed from shard to shard.

Sums are made in float32 (float64 where the base is) and rounded once to the type they are stored in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.quantised import HINT, Quantised, find_quantised
from lora_export.base.history.history import MANIFEST
from lora_export.base.history.merged import refuse_contained, refuse_merged
from lora_export.base.pipeline import refuse_other_components
from lora_export.base.placing.changes import Placed
from lora_export.base.placing.places import place_adapters
from lora_export.base.ties.copies import refuse_copies, refuse_overwriting
from lora_export.errors import AdapterError, CheckpointError, OutputError, SiteError
from lora_export.modes.merging.checkpoint_files import (
    copy_small_files,
    says_quantised,
    write_config,
    write_index,
)
from lora_export.modes.merging.checkpoint_layout import Layout, layout_of, pieces_of
from lora_export.plan import Plan
from lora_export.sites.naming.likeness import counterparts, side_by_side
from lora_export.storage.rounding import Mode, Rounding, update
from lora_export.storage.stream import nonfinite_error, write_pieces

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_EXAMPLES = 4


@dataclass(frozen=True, eq=False)
class CheckpointMerge:
    """What is to be written.

    Attributes:
        checkpoint: The base.
        placed: Where each tensor of the adapters goes.
        layouts: The output's files, one for each shard.
        dtype: Of all float tensors, or None to leave each as it is.
    """

    checkpoint: Checkpoint
    placed: Placed
    layouts: tuple[Layout, ...]
    dtype: str | None

    @property
    def size_bytes(self) -> int:
        """Size of the weights."""
        return sum(layout.size for layout in self.layouts)

    def write(
        self, folder: Path, small: list[Path], rounding: Mode, progress: Callable[[int], None] | None = None
    ) -> dict[str, Rounding]:
        """Create a folder and write weights, index and config.

        Args:
            folder: What to create.
            small: Files to copy from the base, relative to it.
            rounding: ``sample`` measures large weights on evenly spaced blocks, ``exact`` on every element.
            progress: Called with the number of bytes just written.

        Returns:
            What rounding cost, by module.

        Raises:
            CheckpointError: A sum is beyond what the dtype can hold.
            OutputError: The disk is too small, or a file can't be written.
            OSError: The folder can't be written.
        """
        folder.mkdir()
        _refuse_small_disk(folder, self.size_bytes)
        roundings = _write_shards(self, folder, rounding, progress)
        dequantised = self.dtype is not None and bool(self.placed.quantised.scaled)
        kept = [path for path in small if not (dequantised and says_quantised(path))]
        copy_small_files(self.checkpoint.folder, kept, folder)
        write_index(self.checkpoint, self.layouts, folder)
        write_config(self.checkpoint, folder, self.placed, self.dtype, dequantised)
        return roundings


def plan_merge(
    base: str | Path,
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    dtype: str | None,
    allow_unmatched: bool,
    resize: bool | None = None,
) -> CheckpointMerge:
    """Place adapters in a folder's tensors; nothing is written.

    Args:
        base: Folder with config.json and safetensors.
        adapters: To be added up.
        factors: One for each.
        dtype: A key of `DTYPES` for all float tensors; as they are if left out.
        allow_unmatched: Leave out what has no place in the base, instead of refusing.
        resize: Give the base the rows for new tokens that an adapter holds; None: there is no such option.

    Raises:
        AdapterError: An adapter is for another architecture, or in the base already, or holds whole copies
            that are not the only change of a parameter.
        CheckpointError: The base is damaged or quantised.
        OutputError: There is no such dtype.
        SiteError: Some of the adapters has no place in the base; all of it is listed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OutputError(f"there is no output dtype '{dtype}'", f"one of: {', '.join(DTYPES)}")
    checkpoint = Checkpoint.open(base)
    refuse_contained(checkpoint)
    quantised = find_quantised(checkpoint)
    notes = [*checkpoint.notes, *refuse_other_components(adapters, [checkpoint.folder])]
    refuse_merged(checkpoint.folder, adapters)
    placed = place_adapters(checkpoint, adapters, factors, quantised, resize)
    _refuse_unplaced(checkpoint, adapters, placed, allow_unmatched)
    refuse_copies(placed.copied, adapters)
    refuse_overwriting(placed.copied, checkpoint.folder / MANIFEST, adapters)
    placed = replace(placed, plan=replace(placed.plan, notes=(*notes, *placed.plan.notes)))
    if dtype is not None:
        _refuse_dequantising(quantised, dtype)
    code = DTYPES[dtype] if dtype else None
    return CheckpointMerge(
        checkpoint, placed, tuple(layout_of(shard, placed, code) for shard in checkpoint.shards), dtype
    )


def refuse_absent(base: Path, adapters: Sequence[Adapter], allow_unmatched: bool) -> None:
    """Refuse adapters whose low-rank changes are of parameters that a folder does not have, by names alone.

    A capture takes a minute; a wrong adapter is known in a second.

    Args:
        base: Folder with config.json and safetensors.
        adapters: What will be placed in the graph that is captured from it.
        allow_unmatched: What has no place will be left out.

    Raises:
        AdapterError: An adapter is for another architecture, or was merged into the base already, or holds
            copies of what an earlier merge has changed.
        CheckpointError: The base is damaged.
        SiteError: Some of an adapter has no place in the base; all of it is listed.
    """
    if not adapters:
        return
    checkpoint = Checkpoint.open(base)
    refuse_contained(checkpoint)
    refuse_merged(checkpoint.folder, adapters)
    for adapter in adapters:
        shared = len(adapters) > 1
        placed = place_adapters(checkpoint, [adapter], [1.0], find_quantised(checkpoint), shared=shared)
        refuse_overwriting(placed.copied, checkpoint.folder / MANIFEST, [adapter])
        changed = {f"{module.path}.{module.parameter}" for module in adapter.modules.values()}
        absent = changed & set(placed.absent)
        rows = [row for row in placed.plan.rows if row.parameter in absent or row.action != "refused"]
        if absent:
            found = replace(placed, plan=Plan(tuple(rows)))
            _refuse_unplaced(checkpoint, [adapter], found, allow_unmatched)


def _refuse_dequantising(quantised: Quantised, dtype: str) -> None:
    """Refuse to write one dtype where some weights are quantised in ways that are not understood."""
    unknown = quantised.closed
    if unknown:
        lines = [f"{name}   {kind}" for name, kind in unknown.items()]
        raise CheckpointError(
            f"{quantised.checkpoint.folder} has {len(unknown)} quantised weights that can't be made {dtype}",
            "leave --dtype out, or take the unquantised base",
            [*lines[:_EXAMPLES], *["…"] * (len(lines) > _EXAMPLES)],
        )


def _refuse_unplaced(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], placed: Placed, allow_unmatched: bool
) -> None:
    refused, rows = placed.plan.refused, placed.plan.rows
    names = ", ".join(f"'{adapter.name}'" for adapter in adapters)
    if not rows:
        raise AdapterError(f"adapter {names} changes nothing", "check that the right file was given")
    hints = list(dict.fromkeys(placed.hints))
    if len(refused) == len(rows) and len(set(placed.absent)) >= len({row.parameter for row in rows}):
        raise _foreign(checkpoint, adapters, hints, len(rows))
    if not refused or (allow_unmatched and len(refused) < len(rows)):
        return
    lines = [f"{row.parameter}   {row.reason}" for row in refused]
    kinds = {row.kind for row in refused}
    if "quantised" in kinds:
        closed = sum(row.kind == "quantised" for row in refused)
        raise SiteError(
            f"the base {checkpoint.folder} is quantised: {closed} of the {len(rows)} parameters that adapter "
            f"{names} changes can't be merged into",
            HINT,
            lines,
        )
    if "branch only" in kinds:
        hints.append(
            "export the base to ONNX and keep the adapter beside its weights (lora-export swap-onnx)"
        )
    if kinds & {"not found", "shape"} and not hints:
        hints.append(_trained_on(checkpoint, adapters))
    if len(refused) < len(rows):
        hints.append("--allow-unmatched merges the others and leaves these out")
    raise SiteError(
        f"adapter {names} has {len(refused)} parameters with no place in {checkpoint.folder} "
        f"(of {len(rows)})",
        "; ".join(dict.fromkeys(hint for hint in hints if hint)),
        lines,
    )


def _foreign(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], hints: Sequence[str], total: int
) -> AdapterError:
    """Return the error for adapters none of whose names is known: another naming, or another model."""
    names = ", ".join(f"'{adapter.name}'" for adapter in adapters)
    wanted = {
        f"{module.path}.{module.parameter}": module.weight_shape
        for adapter in adapters
        for module in adapter.modules.values()
    }
    stored = {tensor.name: tensor.shape for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    # With a part to name, which of the base's names are meant is no guess any more.
    alike = [] if hints else counterparts(wanted, stored)
    seen = side_by_side(alike) or [
        *(f"the adapter has {name}" for name in list(wanted)[:_EXAMPLES]),
        *(f"the base has {name}" for name in list(stored)[:_EXAMPLES]),
    ]
    if hints:
        what, hint = "does not belong as a whole to", "; ".join(hints)
    elif alike:
        what = "names its modules in another way than"
        hint = (
            "the shapes fit: if these are the same modules, rename the adapter's tensors to the base's names"
        )
    else:
        what = "is for another architecture than"
        hint = _trained_on(checkpoint, adapters)
    return AdapterError(
        f"adapter {names} {what} {checkpoint.folder}: none of its {total} parameters is placed", hint, seen
    )


def _trained_on(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> str:
    """Return which base to give; never the one that was given."""
    names = {adapter.base_model for adapter in adapters if adapter.base_model}
    others = sorted(name for name in names if Path(name).absolute() != checkpoint.folder.absolute())
    if names and not others:
        return "give the base as it was when the adapter was trained: this folder has changed since"
    told = f", {', '.join(others)}" if others else ""
    return f"give the base that the adapter was trained on{told}"


def _refuse_small_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            f"the disk of {folder.parent} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed "
            "(nothing was replaced)",
            "free some space, or choose a folder on another disk",
        )


def _write_shards(
    merge: CheckpointMerge, folder: Path, rounding: Mode, progress: Callable[[int], None] | None
) -> dict[str, Rounding]:
    roundings: dict[str, Rounding] = {}
    problems: list[str] = []
    for shard, layout in zip(merge.checkpoint.shards, merge.layouts, strict=True):
        found = write_pieces(
            folder / shard.path.name,
            layout.size,
            pieces_of(layout, merge.placed),
            progress=progress,
            rounding=rounding,
            nonfinite=problems,
        )
        update(roundings, found)
    if problems:
        raise nonfinite_error(problems)
    return roundings
