"""Compare W0 with the folder that an adapter names as its base, where that is on disk.

Names tell where a parameter is, not that the adapter was trained on these values. A graph's constants are
compared by `sites`; here are the folder, and comparisons for what has another way of finding its places: a
checkpoint, which is placed by its own names, and a graph with exposed LoRA, placed by its LoRA record.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.adapter import Adapter
from lora_export.base.history.history import MANIFEST, history_of
from lora_export.base.history.in_graph import entries_before, not_in
from lora_export.base.reads import holds_weights
from lora_export.errors import CheckpointError

if TYPE_CHECKING:
    from lora_export.base.checkpoint.checkpoint import Checkpoint
    from lora_export.base.checkpoint.weights import CheckpointWeights

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


def own_bases(adapters: Collection[Adapter], merged: str, other_than: Path | None = None) -> list[OwnBase]:
    """Return the local folders that adapters name as their bases, each once.

    A quantised folder was trained on (QLoRA), but what it is merged into has the unquantised model, whose
    values are near the folder's, but not the same. Values that merges have changed differ, too.

    Args:
        adapters: Adapters that may name a folder.
        merged: Entries of the adapters that merges have put into the base (`history.in_graph`).
        other_than: Folder that needs no comparison: the base itself.
    """
    named: dict[Path, tuple[Path, Adapter]] = {}
    for adapter in adapters:
        # That folder is what PEFT would load.
        folder = Path(adapter.base_model or "")
        if not adapter.base_model or not holds_weights(folder):
            continue
        if other_than is None or folder.resolve() != other_than.resolve():
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
    notes: list[str] = []
    warnings: list[str] = []
    merged = entries_before(history_of(checkpoint.folder / MANIFEST))
    for adapter in adapters:
        for own in own_bases([adapter], merged, checkpoint.folder):
            notes.append(own.note)
            if own.weights is None:
                continue
            # What it takes to compare is imported for those who have something to compare.
            from lora_export.base.checkpoint.weights import CheckpointWeights
            from lora_export.base.other_values import other_values

            others = list(other_values(adapter, CheckpointWeights(checkpoint), own.weights))
            warnings += [_other_base(adapter, own, others)] if others else []
    return notes, warnings


def _other_base(adapter: Adapter, own: OwnBase, others: Sequence[str]) -> str:
    listed = ", ".join(others[:_EXAMPLES]) + (", …" if len(others) > _EXAMPLES else "")
    return (
        f"{adapter.name!r} names {own.folder} as its base, which has other values than this one for "
        f"{len(others)} of the parameters that change ({listed}): the result is not what was trained"
    )
