"""Settle, after all sites are found, which tied weights stay one, and which tensors grow together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_export.base.checkpoint.quantised import Quantised
from lora_export.base.checkpoint.vocabulary import resize_hint, why_not_resized
from lora_export.base.planning.ledger import Ledger
from lora_export.base.ties.tied_changes import alike, replaces, spread
from lora_export.base.ties.ties import BESIDE, FLAG, TOGETHER, Tie, Ties
from lora_export.plan import Refusal


@dataclass(kw_only=True)
class Settled:
    """Result for tied and for resized weights.

    Attributes:
        parted: ``(name, source)`` of tensors that are stored from now on.
        untied: True if the config's switch goes off.
        vocabulary: Numbers of tokens of the base and of the output; None if they are equal.
        notes: Notes for the user.
        copies: Whole copies that replace weights tied to their parameter: ``(adapter, from, to)``.
    """

    parted: list[tuple[str, str]] = field(default_factory=list)
    untied: bool = False
    vocabulary: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)
    copies: list[tuple[int, str, str]] = field(default_factory=list)


def settle(
    ledger: Ledger, may_be_tied: Callable[[str], bool], ties_of: Callable[[], Ties], quantised: Quantised
) -> Settled:
    """Settle a ledger's changes, and refuse those that are impossible in it.

    Args:
        ledger: All changes.
        may_be_tied: Function that returns True if a tensor could share its weight.
        ties_of: Function that finds the ties; called only if a changed tensor may be tied.
        quantised: The base's quantised weights.
    """
    result = Settled()
    names = [name for name, changes in ledger.changes.items() if changes and may_be_tied(name)]
    ties = ties_of() if names else Ties()
    touched = list(dict.fromkeys(tie for name in names if (tie := ties.of(name)) is not None))
    for tie in touched:
        result.copies += _spread(ledger, tie)
        result.notes += _biases_left_out(ledger, tie, ties)
    growing = set(ledger.resized)
    if growing:
        _settle_rows(ledger, result)
    _settle_ties(ledger, ties, touched=touched, quantised=quantised, result=result)
    if result.vocabulary and set(ledger.resized) != growing:
        # The config has one number of tokens for all, so with only some grown no model could be built.
        why = f"{', '.join(sorted(growing - set(ledger.resized)))} can't be given more rows"
        ledger.refuse(list(ledger.resized), Refusal("shape", f"{why}, and all have to have as many"))
        result.vocabulary = None
    if result.vocabulary:
        old, new = result.vocabulary
        result.notes.insert(
            0,
            f"the vocabulary grows from {old} to {new} tokens; the base's tokenizer is copied as it is: take "
            "the one that was saved with the adapter",
        )
    return result


def _settle_ties(
    ledger: Ledger, ties: Ties, touched: Sequence[Tie], quantised: Quantised, result: Settled
) -> None:
    parted = [
        tie for tie in touched if not _change_alike(ledger, tie) and _part(ledger, tie, ties, quantised)
    ]
    for tie in touched:
        _note(ledger, tie, bool(parted), result)
    if parted:
        # The config has one switch for all ties, also for those that change alike or not at all.
        result.untied = True
        pairs = [(name, tie.source) for tie in ties.ties for name in tie.tensors.values()]
        result.parted = [(name, source) for name, source in pairs if name not in ledger.checkpoint.tensors]
    if touched and ties.note:
        result.notes.append(ties.note)


def _spread(ledger: Ledger, tie: Tie) -> list[tuple[int, str, str]]:
    """Give each parameter of a tie its changes in the ledger; return the whole copies among them."""
    found = spread(tie, ledger.changes)
    if found.refusal:
        ledger.refuse(found.changes, found.refusal)
        return []
    ledger.changes |= found.changes
    for _, name, other in found.copies:
        if other not in ledger.checkpoint.tensors:
            ledger.sources[other] = tie.source
        if name in ledger.resized:
            ledger.resized[other] = ledger.resized[name]
    return found.copies


def _biases_left_out(ledger: Ledger, tie: Tie, ties: Ties) -> list[str]:
    """Return a note for each head that PEFT computes without its bias, because rows of its weight change.

    Source: PEFT 0.21, ``tuners/trainable_tokens/layer.py``: ``F.linear(input=x, weight=W)``.
    """
    notes = []
    for name in tie.tensors.values():
        bias = f"{name.rpartition('.')[0]}.bias"
        has_bias = bias in ledger.checkpoint.tensors or ties.of(bias) is not None
        if has_bias and any(
            change.is_for_all and replaces(change) for change in ledger.changes.get(name, ())
        ):
            notes.append(
                f"{name}: PEFT leaves out {bias} while an adapter with single rows is active; the merged "
                "model adds it, as PEFT's own merge does"
            )
    return notes


def _change_alike(ledger: Ledger, tie: Tie) -> bool:
    first, *others = (ledger.changes.get(name, []) for name in tie.tensors.values())
    return all(alike(first, changes) for changes in others)


def _part(ledger: Ledger, tie: Tie, ties: Ties, quantised: Quantised) -> bool:
    """Return True if the parameters of a tie can have values of their own; refuse their changes if not."""
    names = list(tie.tensors.values())
    stored = ledger.checkpoint.tensors
    rows = {name: ledger.resized.get(name, stored[tie.source].shape)[0] for name in names}
    codes = [one.source for one in (tie, *ties.ties) if one.source in quantised.scaled]
    if len(set(rows.values())) > 1:
        few = [name for name, count in rows.items() if count < max(rows.values())]
        reason = f"{', '.join(few)} needs {max(rows.values())} rows, too, and the adapter doesn't hold them"
        refusal = Refusal("tied", reason, resize_hint(max(rows.values())))
    elif tie.refusal or codes:
        why = tie.refusal or f"{codes[0]} is quantised, and codes can't be stored twice"
        reason = f"{' and '.join(names)} share one weight and would differ; {why}"
        was_tied = any(change.is_tied for name in names for change in ledger.changes.get(name, ()))
        refusal = Refusal("tied", reason, tie.hint or (BESIDE if was_tied else TOGETHER))
    else:
        return True
    ledger.refuse(names, refusal)
    return False


def _note(ledger: Ledger, tie: Tie, untied: bool, result: Settled) -> None:
    """Add notes on a changed tie; a tie that stays one weight has the changes of the stored tensor."""
    first, *others = tie.tensors.values()
    if not any(ledger.changes.get(name) for name in (first, *others)):
        return
    if not _change_alike(ledger, tie):
        why = "they change differently, so"
    elif untied:
        why = "both change alike, but the config has one switch for all ties:"
    else:
        for name in (first, *others):
            if name not in ledger.checkpoint.tensors:
                ledger.changes.pop(name, None)
        result.notes += [f"{name} stays tied to {first}: both change alike" for name in others]
        return
    result.notes += [
        f"{name} was tied to {first}; {why} the output stores both and its config says {FLAG}: false"
        for name in others
    ]


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
