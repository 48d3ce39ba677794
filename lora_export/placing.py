"""Place adapters in a graph: rows of the plan, and one error that lists all that has no place."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from lora_export.adapter import Adapter
from lora_export.base.ties import may_be_tied
from lora_export.base.vocabulary import head_hint
from lora_export.errors import SiteError
from lora_export.graph import GraphFile
from lora_export.plan import Plan, PlanRow, unaccounted
from lora_export.sites.resolve import NOT_COMPARED
from lora_export.sites.slot import Use
from lora_export.sites.target import Miss, MissKind, Site

# Part of `Site.evidence` wherever values were compared.
_CONFIRMED = "content"
_EXAMPLES = 4
# Part of the reason of a place whose values are not the checkpoint's.
OTHER_VALUES = "does not hold the checkpoint's values"
Verb = Literal["merge-onnx", "swap-onnx", "bank-onnx"]
_BY_VALUE = "give --checkpoint BASE_DIR to match by value"
_QUANTISED = (
    "keep the adapter beside the quantised weights (lora-export swap-onnx), or merge into the "
    "unquantised base and quantise the result"
)
_INTEGERS = (
    "merge into the unquantised graph and quantise the result; or quantise that graph so that the operators "
    "stay floats (quantize_static(..., quant_format=QuantFormat.QDQ), MatMulNBits) and "
)
_CONTRIB = "com.microsoft"
# Domains of operators that ONNX Runtime's optimiser makes for a machine, and how their layout is called.
_ARRANGED = {"com.microsoft.nchwc": "NCHWc ", "com.ms.internal.nhwc": "NHWC ", _CONTRIB: ""}


def refuse_unaccounted(adapter: Adapter, rows: Sequence[PlanRow]) -> None:
    """Raise `SiteError` where the plan does not speak of some of an adapter's tensors."""
    lost = unaccounted(adapter.tensor_names, rows)
    if lost:
        raise SiteError(f"adapter {adapter.name!r} has tensors that the plan does not speak of", "", lost)


def with_unverified(plan: Plan, checkpoint: Path) -> Plan:
    """Say which places the checkpoint could not confirm; raise `SiteError` where it confirms none."""
    comparable = [row for row in plan.placed if NOT_COMPARED not in row.reason]
    silent = [row for row in comparable if _CONFIRMED not in row.reason]
    if silent and len(silent) == len(comparable):
        raise SiteError(
            f"the checkpoint {checkpoint} stores none of the {len(silent)} parameters that would change",
            "give the folder that the graph was exported from, or leave out --checkpoint",
            [row.parameter for row in silent[:_EXAMPLES]],
        )
    notes = [
        f"{row.parameter}: found by {row.reason} alone, the checkpoint does not store it" for row in silent
    ]
    return replace(plan, notes=(*plan.notes, *notes))


def refuse(
    graph: GraphFile,
    adapter: Adapter,
    sites: Sequence[Site],
    misses: Sequence[Miss],
    *,
    verb: Verb,
    checked: bool,
    uses: Sequence[Use],
) -> None:
    """Raise `SiteError` with a reason for each miss.

    Args:
        graph: The graph.
        adapter: The adapter.
        sites: What was placed.
        misses: What was not.
        verb: The command that wants places.
        checked: There is a checkpoint to compare values with.
        uses: All weights of the graph.
    """
    total, file = len(sites) + len(misses), graph.path.name
    # Without a format it is no file but what the user typed.
    name = f"adapter {adapter.name!r}" if adapter.format else adapter.name
    lines = [f"{miss.target.key}  {miss.reason}" for miss in misses]
    kinds = {miss.kind for miss in misses}
    lost = kinds == {"not found"}
    if "values" in kinds:
        message = (
            f"{file} was not exported from this checkpoint, or was changed since: {name} has "
            f"{len(misses)} places (of {total}) that are not confirmed"
        )
        raise SiteError(message, "give the folder that the graph was exported from", lines)
    if (arranged := _arranged(graph)) and kinds & {"not found", "operator"}:
        raise SiteError(
            f"{file} was optimised by ONNX Runtime for one machine ({arranged}), which stores weights in a "
            f"layout of its own: {name} has {len(misses)} parameters with no place in it (of {total})",
            "give the graph that it was made from, or save it with "
            "SessionOptions.graph_optimization_level = ORT_ENABLE_EXTENDED instead of ORT_ENABLE_ALL",
            lines,
        )
    merging = verb == "merge-onnx"
    codes = [use for use in uses if use.quantised and (merging or use.no_branch)]
    if kinds & {"quantised", "integers"} or (lost and not sites and codes):
        hint = _QUANTISED
        if "integers" in kinds or (lost and all(use.no_branch for use in codes)):
            hint = _INTEGERS + ("use swap-onnx" if merging else "give that")
        raise SiteError(
            f"{file} has quantised weights{_operators(codes)}: {name} can't be "
            f"{'merged into' if merging else 'exposed at'} {len(misses)} of its {total} parameters' places",
            hint,
            lines,
        )
    given = list(dict.fromkeys(miss.hint for miss in misses if miss.hint))
    if not sites and lost and not given:
        raise SiteError(
            f"{name} was made for another model: none of its {total} parameters has a place in {file}",
            "check the base" if checked else "check the base; if the graph's names are gone, " + _BY_VALUE,
            lines,
        )
    raise SiteError(
        f"{name} has {len(misses)} parameters with no place in {file} (of {total})",
        "; ".join(dict.fromkeys([*_rows_hints(misses), *_hints(kinds, verb, checked, bool(sites), given)])),
        lines,
    )


def _arranged(graph: GraphFile) -> str:
    """Name ONNX Runtime's operators whose weights lie in blocks of channels, or channels last."""
    nodes = (node for node in graph.graph.all_nodes() if node.domain in _ARRANGED)
    found = {f"{_ARRANGED[node.domain]}{node.op_type}" for node in nodes if _is_arranged(node)}
    return ", ".join(sorted(found))


def _is_arranged(node: ir.Node) -> bool:
    return node.domain != _CONTRIB or node.op_type.startswith("Nhwc")


def _operators(uses: Sequence[Use]) -> str:
    """Return ``" (MatMulInteger)"`` where weights are quantised, whatever their names; else ""."""
    found = {use.node.op_type for use in uses}
    return f" ({', '.join(sorted(found))})" if found else ""


def _rows_hints(misses: Sequence[Miss]) -> list[str]:
    """Return what to do to a base that lacks rows for new tokens, or the head, that an adapter brings."""
    hints = []
    for miss in misses:
        key, shape = miss.target.key, miss.target.shape
        if miss.target.action == "replace" and miss.kind == "shape" and may_be_tied(key):
            hints.append(f"for new tokens or labels: give the base {shape[0]} rows before it is exported")
        elif miss.target.action == "replace" and miss.kind == "not found":
            hints.append(head_hint(key, shape))
    return [hint for hint in dict.fromkeys(hints) if hint]


def _hints(
    kinds: AbstractSet[MissKind], verb: Verb, checked: bool, some: bool, given: Sequence[str]
) -> list[str]:
    """Say what to do: never what was given already, nor the command that is running."""
    hints = list(given)
    if "shape" in kinds:
        hints.append("give the base that the adapter was trained on")
    if not checked and ("unproven" in kinds or ("not found" in kinds and not given)):
        hints.append(_BY_VALUE)
    if checked and "not found" in kinds and not given:
        hints.append("export the graph again with these modules in it")
    if "ambiguous" in kinds and not given:
        again = "export the graph again, with names kept"
        hints.append(again if checked else f"{again}, and give --checkpoint BASE_DIR")
    if "double" in kinds:
        hints.append("give --component where the adapter's file serves several models")
    if "dora" in kinds:
        merge = "merge the adapter with merge-onnx"
        hints.append(
            f"give --dora, or {merge}" if verb == "swap-onnx" else f"see swap-onnx --dora, or {merge}"
        )
    if "merge only" in kinds:
        hints.append("merge the adapter with merge-onnx")
    if "branch only" in kinds:
        hints.append("keep the adapter beside the weights with swap-onnx")
    if "operator" in kinds:
        hints.append("export the graph with plain MatMul, Gemm or Conv nodes for these modules")
    if some:
        hints.append("--allow-unmatched (allow_unmatched=True) goes on without them")
    return hints


def placed_row(adapter: Adapter, site: Site, action: str = "") -> PlanRow:
    """Return the plan's row of a site; the action is the target's own unless given."""
    operators = sorted({use.node.op_type for part in site.parts for use in part.uses})
    layouts = []
    for part in site.parts:
        first = part.placements[0]
        words = ["transposed"] if first.transposed else []
        if first.row or first.col or first.rows != (0, site.target.matrix[0]):
            words.append(
                f"rows {first.rows[0]}–{first.rows[1]} at {first.col if first.transposed else first.row}"
            )
        if len(part.placements) > 1:
            words.append(f"{len(part.placements)} experts")
        if first.row_scale is not None:
            words.append("rescaled per output channel")
        layouts.append(" ".join(words) or "as in PyTorch")
    return PlanRow(
        adapter.name,
        site.target.key,
        site.target.tensor_names,
        action or site.target.action,
        ", ".join(str(part.root.name) for part in site.parts),
        ", ".join(operators),
        "; ".join(layouts),
        site.evidence,
    )


def refused_row(adapter: Adapter, miss: Miss) -> PlanRow:
    """Return the plan's row of a miss."""
    return PlanRow(adapter.name, miss.target.key, miss.target.tensor_names, "refused", reason=miss.reason)
