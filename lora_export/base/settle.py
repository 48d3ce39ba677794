"""After all adapters are placed: what shares a weight stays one or is parted, what grows grows together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_export.base.ledger import Ledger
from lora_export.base.quantised import Quantised
from lora_export.base.tied_changes import alike, spread
from lora_export.base.ties import FLAG, TOGETHER, Tie, Ties, may_be_tied
from lora_export.base.vocabulary import resize_hint, why_not_resized
from lora_export.plan import Refusal


@dataclass
class Settled:
    """What became of tied and of resized weights.

    Attributes:
        parted: ``(name, source)`` of tensors that are stored from now on.
        untied: The config's switch goes off.
        vocabulary: How many tokens the base has, and the output; None: as many.
        notes: What a user should know.
    """

    parted: list[tuple[str, str]] = field(default_factory=list)
    untied: bool = False
    vocabulary: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)


def settle(ledger: Ledger, ties_of: Callable[[], Ties], quantised: Quantised) -> Settled:
    """Go over a ledger's changes; what can't be done is refused in it.

    Args:
        ledger: All changes.
        ties_of: Finds what is tied; called only if a changed tensor may be.
        quantised: The base's quantised weights.
    """
    result = Settled()
    if ledger.resized:
        _settle_rows(ledger, result)
    names = [name for name, changes in ledger.changes.items() if changes and may_be_tied(name)]
    if not names:
        return result
    ties = ties_of()
    touched = dict.fromkeys(tie for name in names if (tie := ties.of(name)) is not None)
    for tie in touched:
        _settle_tie(ledger, tie, quantised, result)
    if result.untied:
        # The config's switch is one for all of them.
        pairs = [(name, tie.source) for tie in ties.ties for name in tie.tensors.values()]
        result.parted = [(name, source) for name, source in pairs if name not in ledger.checkpoint.tensors]
    if touched and ties.note:
        result.notes.append(ties.note)
    return result


def _settle_tie(ledger: Ledger, tie: Tie, quantised: Quantised, result: Settled) -> None:
    """Leave the parameters of a tie one weight where their changes are equal, else part them."""
    found, wrong = spread(tie, ledger.changes)
    if wrong:
        reason = f"trained with ensure_weight_tying, and yet {' and '.join(found)} change differently"
        ledger.refuse(found, Refusal("tied", reason))
        return
    first, *others = found
    stored = ledger.checkpoint.tensors
    if all(alike(found[first], found[name]) for name in others):
        held = {name: changes for name, changes in found.items() if name in stored}
        ledger.changes = {name: c for name, c in ledger.changes.items() if name not in found} | held
        result.notes += [f"{name} stays tied to {first}: both change alike" for name in others]
        return
    rows = {name: ledger.resized.get(name, stored[tie.source].shape)[0] for name in found}
    if len(set(rows.values())) > 1:
        few = [name for name, count in rows.items() if count < max(rows.values())]
        reason = f"{', '.join(few)} needs {max(rows.values())} rows, too, and the adapter doesn't hold them"
        refusal = Refusal("tied", reason, resize_hint(max(rows.values())))
    elif tie.refusal or tie.source in quantised.scaled:
        why = tie.refusal or f"{tie.source} is quantised, and codes can't be stored twice"
        reason = f"{' and '.join(found)} share one weight and would differ; {why}"
        refusal = Refusal("tied", reason, tie.hint or TOGETHER)
    else:
        ledger.changes |= found
        result.untied = True
        result.notes += [
            f"{name} was tied to {first}; they change differently, so the output stores both and its config "
            f"says {FLAG}: false"
            for name in others
        ]
        return
    ledger.refuse(found, refusal)


def _settle_rows(ledger: Ledger, result: Settled) -> None:
    """Refuse new rows that the config or other tensors of the base don't allow."""
    shapes = {ledger.sources.get(name, name): shape for name, shape in ledger.resized.items()}
    problem = why_not_resized(ledger.checkpoint, shapes)
    if problem:
        rows = max(shape[0] for shape in shapes.values())
        ledger.refuse(list(ledger.resized), Refusal("shape", problem, resize_hint(rows)))
        return
    name, shape = next(iter(shapes.items()))
    old = ledger.checkpoint.tensors[name].shape[0]
    result.vocabulary = (old, shape[0])
    result.notes.append(
        f"the vocabulary grows from {old} to {shape[0]} tokens; the base's tokenizer is copied as it is: "
        "take the one that was saved with the adapter"
    )
