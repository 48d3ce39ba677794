"""Judge whole copies of parameters in adapters: which are changes, and which of several would win.

A copy in an adapter's file is a trained one (``modules_to_save``, ``bias``), or PEFT's copy of an embedding
that training did not change (``save_embedding_layers``). PEFT loads either over the base's values. It refuses
to add adapters that hold two copies (`LoraModel.add_weighted_adapter`), and of stored embeddings takes the
one that was loaded last. Rules here:

1. A copy that has the base's values changes nothing.
2. Of two other copies of one parameter neither wins, unless they are equal.
3. A copy is not a sum: its adapter has weight 1, unless every adapter of the blend holds the same copy.
4. No adapter changes a parameter in which another one puts its own copy: it was trained on another weight.
5. A base that an earlier merge has written counts as a blend with what was merged, unless an adapter was
   trained on it: neither copies, nor single rows, nor DoRA, whose magnitude is that of the weight that it was
   trained on, may replace merged changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_export.adapter import Adapter, Array
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.history.history import history_of
from lora_export.base.ties.tied_layers import may_tie_layers
from lora_export.base.ties.ties import find_ties, may_be_tied
from lora_export.errors import AdapterError
from lora_export.formats.reading.whole_copies import copy_reach
from lora_export.untrusted.places import exists

_HINT = (
    "{alone}, or train the second on the merged base; PEFT stores whole embeddings and heads beside LoRA on "
    "them unless it is told save_embedding_layers=False"
)
# Reason for a copy that is not a change.
UNCHANGED = "the base holds the same values"
_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Copied:
    """Change of one parameter by one adapter.

    Attributes:
        place: Key that is equal for two adapters that change the same weight.
        stored: Name of the stored weight in a manifest; for a part of one, with the parameter.
        parameter: Path of the parameter.
        adapter: Name of the adapter, which another one may have as well.
        owner: Position of the adapter in the blend.
        weight: Factor of the adapter in the blend.
        values: The copy; None for a change that is added to the weight.
        row_count: Number of single rows that it replaces.
        is_dora: True if it scales the weight to a length of its own.
    """

    place: Hashable
    stored: str
    parameter: str
    adapter: str
    owner: int
    weight: float
    values: Array | None = None
    row_count: int = 0
    is_dora: bool = False

    @property
    def overwrites(self) -> str:
        """Its effect on other changes of the weight, as a part of a message; empty for a sum."""
        if self.values is not None:
            return "holds a whole copy of it, which would replace what"
        if self.row_count:
            return f"holds {self.row_count} single rows of it, which would replace what"
        return (
            "is DoRA, which scales it to the length that it was trained at, with all that"
            if self.is_dora
            else ""
        )


def are_judged(weights: Sequence[float], manifest: Path) -> bool:
    """Return True if copies have to be compared with the base, unlike those of a single adapter of weight 1.

    Args:
        weights: Factor of each adapter.
        manifest: Manifest that an earlier merge may have written beside the base.
    """
    return list(weights) != [1.0] or exists(manifest)


def spread_copies(changes: Sequence[Copied], spread: Iterable[tuple[int, str, str]]) -> list[Copied]:
    """Return the copies that replace weights tied to their parameters, as copies of those.

    Args:
        changes: Changes of adapters.
        spread: ``(owner, from, to)``, names of stored weights.
    """
    copies = {(one.owner, one.stored): one for one in changes if one.values is not None}
    return [
        replace(copies[owner, name], place=other, stored=other)
        for owner, name, other in spread
        if (owner, name) in copies
    ]


def not_so(count: int) -> str:
    """Return the message for a number of adapters that can't be merged as they are given."""
    return "these adapters can't be merged so" if count > 1 else "this adapter can't be merged so"


def alone_hint(weights: Iterable[float], count: int) -> str:
    """Return the hint for adapters that can't be merged with others, or with a weight.

    Args:
        weights: Factors.
        count: Number of adapters.
    """
    weighted = any(weight != 1 for weight in weights)
    if count == 1:
        return "merge it without --weight" if weighted else ""
    return "merge one of them alone" + (", without --weight" if weighted else "")


def refuse_copies(changes: Sequence[Copied], adapters: Sequence[Adapter]) -> None:
    """Raise `AdapterError` if a blend's copies break rules 2 to 4; copies of rule 1 are not among them.

    Args:
        changes: All changes of the blend.
        adapters: The adapters of the blend.
    """
    places: dict[Hashable, list[Copied]] = defaultdict(list)
    for change in changes:
        places[change.place].append(change)
    problems = [problem for found in places.values() if (problem := _problem(found, len(adapters)))]
    if problems:
        alone = alone_hint([change.weight for change in changes], len(adapters))
        hint = alone if len(adapters) == 1 else _HINT.format(alone=alone)
        raise AdapterError(not_so(len(adapters)), hint, list(dict.fromkeys(problems)))


def refuse_overwriting(changes: Sequence[Copied], manifest: Path, adapters: Sequence[Adapter]) -> None:
    """Raise `AdapterError` if a change can't be added to what an earlier merge put into the base (rule 5).

    Args:
        changes: Changes of the adapters.
        manifest: Manifest that an earlier merge may have written beside the base.
        adapters: The adapters.
    """
    own = {n for n, adapter in enumerate(adapters) if _is_folder(adapter.base_model, manifest.parent)}
    copies = [change for change in changes if change.overwrites and change.owner not in own]
    earlier = history_of(manifest).changed if copies else {}
    lost = [change for change in copies if change.stored in earlier]
    problems = [
        f"{change.parameter}: '{change.adapter}' {change.overwrites} "
        f"{', '.join(map(repr, dict.fromkeys(earlier[change.stored])))} changed in this base"
        for change in lost
    ]
    if problems:
        names = ", ".join(f"'{adapter.name}'" for adapter in adapters)
        in_one_go = (
            "merge all of them into the original base in one go: copies with its values then change nothing"
        )
        on_merged = "merge it into the original base alone, or train it on the merged one"
        raise AdapterError(
            f"adapter {names} would undo an earlier merge, of which {manifest} tells",
            f"{in_one_go if all(change.values is not None for change in lost) else on_merged}; "
            f"if it was trained on the merged base, which its config does not name, remove {manifest.name}",
            list(dict.fromkeys(problems)),
        )


def _is_folder(base_model: str | None, folder: Path) -> bool:
    """Return True if an adapter names a folder as the base that it was trained on."""
    try:
        return bool(base_model) and Path(str(base_model)).resolve() == folder.resolve()
    except (OSError, ValueError):
        return False


def may_replace_ties(base: Path, adapters: Sequence[Adapter]) -> bool:
    """Return True if an adapter has a copy, or LoRA, of a weight that a folder's model may tie.

    Args:
        base: Folder with config.json and safetensors.
        adapters: The adapters.
    """
    copies = [path for one in adapters for path in one.extras if copy_reach(one, path) != "one"]
    copies += [module.key for one in adapters for module in one.modules.values() if module.everywhere]
    if not copies:
        return False
    checkpoint = Checkpoint.open(base)
    layers = may_tie_layers(checkpoint.config)
    return any(layers or may_be_tied(path) for path in copies) and bool(find_ties(checkpoint).ties)


def is_same(copy: Array, stored: Array) -> bool:
    """Return True if a copy has a weight's values, in the coarser one of the two types (rule 1)."""
    return copy.shape == stored.shape and not any(_differing(copy, stored))


def differing_rows(copy: Array, stored: Array) -> int:
    """Return the number of rows of a copy that differ from a weight's; rows that only one has don't count."""
    return sum(_differing(copy, stored))


def _differing(copy: Array, stored: Array) -> Iterator[int]:
    """Yield numbers of rows that differ, some thousand rows at a time."""
    rows = min(len(copy), len(stored))
    for start in range(0, rows, _ROWS):
        one, other = (
            values[start : min(start + _ROWS, rows)].reshape(min(_ROWS, rows - start), -1)
            for values in (copy, stored)
        )
        with np.errstate(over="ignore"):
            same = (one.astype(other.dtype) == other) | (other.astype(one.dtype) == one)
        yield int((~same.all(axis=1)).sum())


def untrained_note(adapter: Adapter, parameter: str, copy: Array, stored: Array) -> str:
    """Return a warning if a copy that training did not change differs from the base, else ""."""
    is_stored = parameter.endswith(".weight") and copy_reach(adapter, parameter) != "one"
    if not is_stored or copy.shape[1:] != stored.shape[1:]:
        return ""
    count = differing_rows(copy, stored)
    if not count:
        return ""
    if not may_be_tied(parameter):
        return (
            f"{parameter}: '{adapter.name}' holds a whole copy of it that no modules_to_save names, as a "
            f"file of a whole model does, and {count} of {len(stored)} rows differ from this base: the copy "
            "replaces them; give the base that it was trained on, or save only the adapter's own tensors"
        )
    return (
        f"{parameter}: '{adapter.name}' stores a copy of it that its training did not change (PEFT's "
        f"save_embedding_layers), and {count} of {len(stored)} rows differ from this base: the copy replaces "
        "them, and what the base has learned there since is lost; save the adapter with "
        "save_embedding_layers=False to keep the base's"
    )


def _problem(found: Sequence[Copied], count: int) -> str:
    """Return the problem with the changes of one weight, by the rule that they break, or an empty string."""
    copies = [change for change in found if change.values is not None]
    if not copies:
        return ""
    first, *others = copies
    assert first.values is not None
    parameter, holders = first.parameter, {change.owner for change in copies}
    for other in others:
        if other.values is not None and not is_same(first.values, other.values):
            return (
                f"{parameter}: '{first.adapter}' and '{other.adapter}' each hold a whole copy of it, with "
                "other values: only one could win"
            )
    strangers = [change.adapter for change in found if change.owner not in holders]
    if strangers:
        return (
            f"{parameter}: '{first.adapter}' replaces it by its own copy, and '{strangers[0]}' was trained "
            "to change another one"
        )
    weights = [change.weight for change in copies if change.weight != 1]
    if weights and (len(copies) < count or count == 1):
        return (
            f"{parameter}: '{first.adapter}' replaces it by a whole copy, which is not a sum: with weight 1 "
            f"only, not {weights[0]}"
        )
    return ""
