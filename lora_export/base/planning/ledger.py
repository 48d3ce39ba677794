"""Record the changes of a merge with their rows of the plan, so that both are withdrawn together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.ties.tied_changes import MakePatch, TensorChange
from lora_export.formats.reading.whole_copies import Reach
from lora_export.plan import PlanRow, Refusal
from lora_export.storage.safetensors import StoredTensor


@dataclass(kw_only=True)
class Ledger:
    """Changes of stored tensors.

    Attributes:
        checkpoint: The base.
        rows: The plan's rows, in the order of the adapters' tensors.
        changes: Name of a stored tensor, or of one that would be stored, → its changes.
        sources: Name of a tensor that the file does not hold → the stored one whose values it has.
        resized: Name of a tensor → its new shape, with more rows.
        hints: Hints for refused parameters.
    """

    checkpoint: Checkpoint
    rows: list[PlanRow] = field(default_factory=list)
    changes: dict[str, list[TensorChange]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    _adapter: int = -1
    _is_tied: bool = False

    def begin(self, adapter: Adapter) -> None:
        """Set the adapter of the changes that follow."""
        self._adapter += 1
        self._is_tied = bool(adapter.config.get("ensure_weight_tying"))

    def add(self, name: str, make: MakePatch, reach: Reach = "one", is_copy: bool = False) -> None:
        """Add a change that belongs to the plan's next row; see `TensorChange` for the arguments."""
        change = TensorChange(
            make=make,
            row=len(self.rows),
            adapter=self._adapter,
            is_tied=self._is_tied,
            reach=reach,
            is_copy=is_copy,
        )
        self.changes.setdefault(name, []).append(change)

    def tensor(self, name: str) -> StoredTensor:
        """Return a tensor with its name and shape as it will be stored, before any change."""
        tensor = self.checkpoint.tensors[self.sources.get(name, name)]
        return replace(tensor, name=name, shape=self.resized.get(name, tensor.shape))

    def drop(self, rows: Iterable[int]) -> None:
        """Withdraw all changes of some rows."""
        gone = set(rows)
        for name, changes in self.changes.items():
            self.changes[name] = [change for change in changes if change.row not in gone]

    def refuse(self, names: Iterable[str], refusal: Refusal) -> None:
        """Refuse every row of the plan that changes one of some tensors, with all of its changes."""
        names = list(names)
        gone = {change.row for name in names for change in self.changes.get(name, ())}
        for row in gone:
            old = self.rows[row]
            self.rows[row] = PlanRow.refused(old.adapter, old.parameter, old.tensors, refusal)
        self.hints += [refusal.hint] * bool(refusal.hint)
        self.drop(gone)
        for name in names:
            self.resized.pop(name, None)
