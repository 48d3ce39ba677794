"""Compare W0 with the folder that an adapter names as its base, where that is on disk.

Names tell where a parameter is, not that the adapter was trained on these values. A graph's constants are
compared by `sites`; here are the folder, and comparisons for what has another way of finding its places: a
checkpoint, which is placed by its own names, and a graph with exposed LoRA, placed by its LoRA record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.adapter import Adapter, Array
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.base.history.in_graph import entries_before, not_in
from lora_export.base.reads import holds_weights
from lora_export.errors import CheckpointError
from lora_export.sites.target import Stack, Target, Wanted, targets_of
from lora_export.sites.values import content
from lora_export.sites.values.verify import orientations

if TYPE_CHECKING:
    from lora_export.base.checkpoint.checkpoint import Checkpoint
    from lora_export.base.checkpoint.weights import AdapterWeights, CheckpointWeights

_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class OwnBase:
    """The base that an adapter names.

    Attributes:
        folder: Its folder, where that has weights on this machine.
        weights: The folder's weights; None if they can't be compared.
        where: The folder and the adapter, for messages.
        why_not: Reason why the weights can't be compared.
    """

    folder: Path
    weights: CheckpointWeights | None
    where: str
    why_not: str = ""

    @property
    def note(self) -> str:
        """Sentence for the plan on what was compared."""
        if self.weights is None:
            return f"values were not compared with {self.where}: {self.why_not}"
        return f"values compared with {self.where}"


def own_bases(adapters: Collection[Adapter], merged: str) -> list[OwnBase]:
    """Return the local folders that adapters name as their bases, each once.

    A quantised folder was trained on (QLoRA), but what it is merged into has the unquantised model, whose
    values are near the folder's, but not the same. Values that merges have changed differ, too.

    Args:
        adapters: Adapters that may name a folder.
        merged: Entries of the adapters that merges have put into the base (`history.in_graph`).
    """
    named: dict[Path, tuple[Path, Adapter]] = {}
    for adapter in adapters:
        # That folder is what PEFT would load.
        folder = Path(adapter.base_model or "")
        if adapter.base_model and holds_weights(folder):
            named.setdefault(folder.resolve(), (folder, adapter))
    return [_opened(folder.resolve(), adapter, merged) for folder, adapter in named.values()]


def _opened(folder: Path, adapter: Adapter, merged: str) -> OwnBase:
    from lora_export.base.checkpoint.checkpoint import Checkpoint
    from lora_export.base.checkpoint.weights import CheckpointWeights

    where = f"{folder}, which {adapter.name!r} names as its base"
    found, why_not = None, ""
    try:
        if others := not_in(merged, history_of(folder / MANIFEST)):
            why_not = f"the graph has {', '.join(others)} merged into it, which that has not"
        else:
            found = CheckpointWeights(Checkpoint.open(folder))
            if kind := found.quantised_as:
                found, why_not = None, f"it is quantised ({kind})"
    except CheckpointError as error:
        why_not = error.message
    return OwnBase(folder=folder, weights=found, where=where, why_not=why_not)


def compared_with_own(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> tuple[list[str], list[str]]:
    """Compare what adapters change in a checkpoint with the folders that they name as their bases.

    Args:
        checkpoint: The folder that is the base.
        adapters: The adapters that change it.

    Returns:
        Notes, and a warning for each adapter that was trained on other values.
    """
    from lora_export.base.checkpoint.weights import CheckpointWeights

    notes: list[str] = []
    warnings: list[str] = []
    for adapter in adapters:
        merged = entries_before(history_of(checkpoint.folder / MANIFEST))
        for own in own_bases([adapter], merged):
            if own.folder == checkpoint.folder.resolve():
                continue
            notes.append(own.note)
            if own.weights is None:
                continue
            others = list(_other_values(adapter, CheckpointWeights(checkpoint), own.weights))
            warnings += [_other_base(adapter, own, others)] if others else []
    return notes, warnings


def _other_base(adapter: Adapter, own: OwnBase, others: Sequence[str]) -> str:
    listed = ", ".join(others[:_EXAMPLES]) + (", …" if len(others) > _EXAMPLES else "")
    return (
        f"{adapter.name!r} names {own.folder} as its base, which has other values than this one for "
        f"{len(others)} of the parameters that change ({listed}): the result is not what was trained"
    )


def _other_values(adapter: Adapter, base: CheckpointWeights, own: CheckpointWeights) -> Iterator[str]:
    """Yield the parameters that have other values in an adapter's own base."""
    # Single rows that are replaced are not a change of what was there.
    settled = base.settled(replace(adapter, token_rows={}))[0]
    targets = [target for target in targets_of(settled) if target.action != "replace"]
    mine, theirs = look_up(settled, base, targets), look_up(settled, own, targets)
    for target in targets:
        held, wanted = mine(target), theirs(target)
        if held is not None and wanted is not None and not _are_same(target, held, wanted):
            yield target.key


def look_up(adapter: Adapter, weights: CheckpointWeights, targets: Sequence[Target]) -> AdapterWeights:
    """Return the look-up of an adapter's targets in a checkpoint."""
    return weights.for_adapter([target.named for target in targets], adapter.flattened, adapter.scope)


def _are_same(target: Target, held: Wanted, wanted: Wanted) -> bool:
    if isinstance(held, Stack) and isinstance(wanted, Stack):
        return all(agrees(held.matrix(n), [wanted.matrix(n)]) for n in range(target.experts))
    if isinstance(held, Stack) or isinstance(wanted, Stack):
        return False
    if target.kind == "vector":
        return agrees(held.reshape(1, -1), [wanted.reshape(1, -1)])
    return agrees(held.reshape(target.matrix), orientations(target, wanted))


def agrees(stored: Array, wanted: Sequence[Array]) -> bool:
    """Return whether stored rows are those of one of the matrices, up to the rounding of a float type."""
    for one in wanted:
        if one.shape != stored.shape:
            continue
        match = content.compare(stored, one)
        if match.worst <= content.EXACT or (match.same and match.worst <= content.step(stored, one)):
            return True
    return False
