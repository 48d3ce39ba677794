"""Merge adapters into a checkpoint's tensors, and write the folder, streamed from shard to shard.

Sums are computed in float32 (float64 if the base's are) and rounded once to the dtype they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.quantised import Quantised, find_quantised
from lora_export.base.history.history import MANIFEST
from lora_export.base.history.merged import refuse_contained, refuse_merged
from lora_export.base.own_base import compared_with_own
from lora_export.base.pipeline import refuse_other_components
from lora_export.base.planning.checkpoint_plan import CheckpointPlan
from lora_export.base.planning.find_sites import plan_checkpoint
from lora_export.base.planning.refuse import refuse_without_site
from lora_export.base.ties.copies import refuse_copies, refuse_overwriting
from lora_export.errors import CheckpointError, OutputError
from lora_export.modes.merging.checkpoint_files import (
    copy_small_files,
    says_quantised,
    write_config,
    write_index,
)
from lora_export.modes.merging.checkpoint_layout import Layout, layout_of, pieces_of
from lora_export.progress import tell_size
from lora_export.storage.free_space import refuse_small_disk
from lora_export.storage.rounding import Mode, Rounding, update
from lora_export.storage.stream import nonfinite_error, write_pieces

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_EXAMPLES = 4


@dataclass(frozen=True, eq=False)
class CheckpointMerge:
    """Merge into a checkpoint that can be written.

    Attributes:
        checkpoint: The base.
        placed: The plan, with the patches of each stored tensor.
        layouts: The output's files, one for each shard.
        dtype: Dtype of all float tensors, or None to leave each as it is.
    """

    checkpoint: Checkpoint
    placed: CheckpointPlan
    layouts: tuple[Layout, ...]
    dtype: str | None

    @property
    def size_bytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(layout.size for layout in self.layouts)

    def write(
        self, folder: Path, small: list[Path], rounding: Mode, progress: Callable[[int], None] | None = None
    ) -> dict[str, Rounding]:
        """Create a folder and write weights, index and config.

        Args:
            folder: Folder to create.
            small: Files to copy from the base, relative to it.
            rounding: ``sample`` measures large weights on evenly spaced blocks, ``exact`` on every element.
            progress: Function that is called with the number of bytes just written.

        Returns:
            The cost of rounding, by module.

        Raises:
            CheckpointError: A sum is too large for the dtype.
            OutputError: The disk is too small, or a file can't be written.
            OSError: The folder can't be written.
        """
        folder.mkdir()
        refuse_small_disk(folder.parent, self.size_bytes, "the merged checkpoint")
        tell_size(self.size_bytes)
        roundings = _write_shards(self, folder, rounding, progress)
        dequantised = self.dtype is not None and bool(self.placed.quantised.scaled)
        kept = [path for path in small if not (dequantised and says_quantised(path))]
        copy_small_files(self.checkpoint.folder, kept, folder)
        write_index(self.checkpoint, self.layouts, folder)
        write_config(self.checkpoint, folder, placed=self.placed, dtype=self.dtype, dequantised=dequantised)
        return roundings


def plan_merge(
    base: str | Path,
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    dtype: str | None,
    allow_unmatched: bool,
    resize: bool | None = None,
) -> CheckpointMerge:
    """Find the sites of adapters in a folder's tensors, and write nothing.

    Args:
        base: Folder with config.json and safetensors.
        adapters: Adapters to add.
        factors: Factor of each adapter.
        dtype: Dtype of all float tensors, a key of `DTYPES`; None to leave each as it is.
        allow_unmatched: Leave out parameters that have no site in the base.
        resize: Give the base the rows for new tokens that an adapter holds; None if there is no such option.

    Raises:
        AdapterError: An adapter is for another architecture, or in the base already, or holds whole copies
            that are not the only change of a parameter.
        CheckpointError: The base is damaged or quantised.
        OutputError: The dtype is unknown.
        SiteError: Parameters of the adapters have no site in the base; all are listed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OutputError(f"there is no output dtype '{dtype}'", f"one of: {', '.join(DTYPES)}")
    checkpoint = Checkpoint.open(base)
    refuse_contained(checkpoint)
    quantised = find_quantised(checkpoint)
    notes = [*checkpoint.notes, *refuse_other_components(adapters, [checkpoint.folder])]
    refuse_merged(checkpoint.folder, adapters)
    placed = plan_checkpoint(checkpoint, adapters, weights=factors, quantised=quantised, resize=resize)
    refuse_without_site(checkpoint, adapters, placed, allow_unmatched)
    refuse_copies(placed.copied, adapters)
    refuse_overwriting(placed.copied, checkpoint.folder / MANIFEST, adapters)
    compared, others = compared_with_own(checkpoint, adapters)
    plan = placed.plan
    plan = replace(plan, notes=(*notes, *plan.notes, *compared), warnings=(*plan.warnings, *others))
    placed = replace(placed, plan=plan)
    if dtype is not None:
        _refuse_dequantising(quantised, dtype)
    code = DTYPES[dtype] if dtype else None
    return CheckpointMerge(
        checkpoint, placed, tuple(layout_of(shard, placed, code) for shard in checkpoint.shards), dtype
    )


def _refuse_dequantising(quantised: Quantised, dtype: str) -> None:
    """Refuse to write one dtype if some weights are quantised in ways that are not understood."""
    unknown = quantised.closed
    if unknown:
        lines = [f"{name}   {kind}" for name, kind in unknown.items()]
        raise CheckpointError(
            f"{quantised.checkpoint.folder} has {len(unknown)} quantised weights that can't be made {dtype}",
            "omit --dtype, or take the unquantised base",
            [*lines[:_EXAMPLES], *["…"] * (len(lines) > _EXAMPLES)],
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
