"""Choose hints for refusals from one table by kind, for everything that an adapter may go into."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from lora_export.plan import RefusalKind

# Command that needs sites in a graph's weights or beside them.
Verb = Literal["merge-onnx", "swap-onnx", "bank-onnx"]
# A folder, a graph by the command that needs sites in it, or a graph that has LoRA inputs or slots already.
Into = Literal["folder", Verb, "swap graph", "bank graph"]

# Kinds of refusal for which nothing led to a site.
LOST: AbstractSet[RefusalKind] = {"not found", "nameless"}
BY_VALUE = "give --checkpoint BASE_DIR to match by value"
_GRAPH: AbstractSet[Into] = {"merge-onnx", "swap-onnx", "bank-onnx"}
_EXPOSED: AbstractSet[Into] = {"swap graph", "bank graph"}
_AGAIN = (
    "export the graph again with torch.onnx.export(..., dynamo=True, optimize=False), which keeps names, "
    "computes nothing in advance and has one constant for all calls of a module"
)
_TOOLS_LAST = "run tools that change a graph on what is written here"
_USED = (
    "give the graph as its exporter wrote it: a tool may have put another product in place of these "
    "modules, or removed the output that depends on them"
)
_MERGE_FIRST = (
    "if that is how it was made (torch.cond drops names), merge into the checkpoint (lora-export merge) "
    "and export the result"
)
_MERGE = "merge the adapter with merge-onnx"
_WITH_DORA = "make a graph with swap-onnx --dora and this adapter"
_REMAKE = "make the graph again with this adapter ({mode}-onnx --adapter)"
_TRAINED = "give the base that the adapter was trained on"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Facts on which hints depend besides the kinds of the refusals, so that no hint asks for what was given.

    Attributes:
        into: Kind of base that the adapter goes into.
        checked: True if there is a checkpoint to compare values with.
        some: True if other parameters have a site.
        given: Hints that are known to help.
        tells_part: True if one of them names the part of the adapter, or of the model, to choose.
        parting: Hint for two parameters with one site.
    """

    into: Into
    checked: bool = True
    some: bool = False
    given: Sequence[str] = ()
    tells_part: bool = False
    parting: str = ""


@dataclass(frozen=True, kw_only=True)
class _Hint:
    """Hint for one kind of refusal.

    Attributes:
        kind: Kind of refusal.
        into: Kinds of base for which it is given.
        text: The hint; ``{mode}`` stands for the mode of the graph, ``{parting}`` for the situation's.
        checked: True if it needs a checkpoint, False if it needs none; None for both.
        is_guess: True if it is given only when no hint is known to help.
    """

    kind: RefusalKind
    into: AbstractSet[Into]
    text: str
    checked: bool | None = None
    is_guess: bool = False


# Hints in the order in which they are given.
_HINTS = (
    _Hint(
        kind="not exposed",
        into=_EXPOSED,
        text=_REMAKE,
        is_guess=True,  # If a path is matched otherwise, its module may well be exposed.
    ),
    _Hint(kind="not found", into=_EXPOSED, text="check the base"),
    _Hint(kind="shape", into=_GRAPH | _EXPOSED, text=_TRAINED),
    _Hint(kind="mixed", into=_EXPOSED, text="give the adapter that it was converted from"),
    _Hint(kind="slot rank", into=_EXPOSED, text="make the bank with a larger --slot-rank (slot_rank=)"),
    _Hint(kind="rank", into=_EXPOSED, text="make the graph with a larger --max-rank (max_rank=)"),
    _Hint(kind="unproven", into=_GRAPH, text=BY_VALUE, checked=False),
    _Hint(kind="not found", into=_GRAPH, text=BY_VALUE, checked=False, is_guess=True),
    _Hint(kind="nameless", into=_GRAPH, text=BY_VALUE, checked=False, is_guess=True),
    _Hint(
        kind="unproven",
        into=_GRAPH,
        text="give the graph as its exporter wrote it, or a checkpoint that stores these parameters",
        checked=True,
    ),
    _Hint(
        kind="not found",
        into=_GRAPH,
        text="export the graph again with these modules in it",
        checked=True,
        is_guess=True,
    ),
    _Hint(kind="ambiguous", into=_GRAPH, text=f"{_AGAIN}, and {_TOOLS_LAST}", checked=True, is_guess=True),
    _Hint(
        kind="ambiguous",
        into=_GRAPH,
        text=f"{_AGAIN}, give --checkpoint BASE_DIR, and {_TOOLS_LAST}",
        checked=False,
        is_guess=True,
    ),
    _Hint(kind="ambiguous", into={"merge-onnx"}, text=_MERGE_FIRST, is_guess=True),
    _Hint(kind="computed", into=_GRAPH, text=_AGAIN),
    _Hint(kind="unused", into=_GRAPH, text=_USED),
    _Hint(kind="unused", into=_EXPOSED, text="give the graph as swap-onnx wrote it"),
    _Hint(kind="dora", into={"swap-onnx"}, text=f"give --dora, or {_MERGE}"),
    _Hint(kind="dora", into=_GRAPH - {"swap-onnx"}, text=f"see swap-onnx --dora, or {_MERGE}"),
    _Hint(kind="merge only", into=_GRAPH | _EXPOSED, text=_MERGE),
    _Hint(kind="double", into=_EXPOSED, text="{parting}"),
    _Hint(kind="dora", into={"swap graph"}, text=_WITH_DORA),
    _Hint(kind="dora", into={"bank graph"}, text=f"{_WITH_DORA}, or {_MERGE}"),
    _Hint(kind="branch only", into=_GRAPH, text="keep the adapter beside the weights with swap-onnx"),
    _Hint(
        kind="branch only",
        into={"folder"},
        text="export the base to ONNX and keep the adapter beside its weights (lora-export swap-onnx)",
    ),
    _Hint(
        kind="operator",
        into=_GRAPH,
        text="export the graph with plain MatMul, Gemm or Conv nodes for these modules",
    ),
)


def hints_of(kinds: AbstractSet[RefusalKind | None], situation: Situation) -> list[str]:
    """Return the hints for refusals of some kinds, each once."""
    into, checked, given = situation.into, situation.checked, situation.given
    values = {"mode": into.partition(" ")[0], "parting": situation.parting}
    hints = [
        *given,
        *(
            hint.text.format_map(values)
            for hint in _HINTS
            if hint.kind in kinds
            and into in hint.into
            and hint.checked in (None, checked)
            and not (hint.is_guess and given)
        ),
    ]
    # Other names of the same weights don't matter to values.
    by_value = into in _GRAPH and not checked and bool(kinds & LOST)
    if by_value and given and not situation.tells_part and "unproven" not in kinds:
        hints.insert(0, BY_VALUE)
    if situation.some:
        hints.append(_without(into))
    if "double" in kinds and into in _GRAPH and situation.parting:
        hints.append(situation.parting)
    return list(dict.fromkeys(hint for hint in hints if hint))


def remake(mode: str) -> str:
    """Return a hint on how a graph gets LoRA inputs for the modules of an adapter."""
    return _REMAKE.format(mode=mode)


def _without(into: Into) -> str:
    if into == "folder":
        return "--allow-unmatched merges the others and leaves these out"
    verb = "convert-adapter " if into in _EXPOSED else ""
    return f"{verb}--allow-unmatched (allow_unmatched=True) goes on without them"
