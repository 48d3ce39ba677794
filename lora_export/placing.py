"""Place adapters in a graph: rows of the plan, and one error that lists all that has no place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.errors import SiteError
from lora_export.graph import GraphFile
from lora_export.plan import Plan, PlanRow, unaccounted
from lora_export.sites.evidence import SOURCES
from lora_export.sites.resolve import NOT_COMPARED, Resolver
from lora_export.sites.target import Miss, Site

# Part of `Site.evidence` wherever values were compared.
_CONFIRMED = "content"
_EXAMPLES = 4
_CONTAINED = "contains an adapter already"
_OTHER_VALUES = "does not hold the checkpoint's values"


def refuse_unaccounted(adapter: Adapter, rows: Sequence[PlanRow]) -> None:
    """Raise `SiteError` where the plan does not speak of some of an adapter's tensors."""
    lost = unaccounted(adapter.tensor_names, rows)
    if lost:
        raise SiteError(f"adapter {adapter.name!r} has tensors that the plan does not speak of", "", lost)


def with_unverified(plan: Plan, checkpoint: Path) -> Plan:
    """Say which places the checkpoint could not confirm; raise `SiteError` where it confirms none."""
    # What was added to the graph has no values that could be another module's.
    found = [row for row in plan.placed if row.reason.startswith((*SOURCES, _CONFIRMED))]
    comparable = [row for row in found if NOT_COMPARED not in row.reason]
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


def quantised_operators(resolver: Resolver) -> str:
    """Return ``" (MatMulInteger)"`` where weights are quantised, whatever their names; else ""."""
    found = {use.node.op_type for use in resolver.uses if use.refusal.startswith("quantised")}
    return f" ({', '.join(sorted(found))})" if found else ""


def refuse(
    graph: GraphFile,
    adapter: Adapter,
    sites: Sequence[Site],
    misses: Sequence[Miss],
    resolver: Resolver,
    quantised: str = "",
) -> None:
    """Raise `SiteError` with a reason for each miss.

    Args:
        graph: The graph.
        adapter: The adapter.
        sites: What was placed.
        misses: What was not.
        resolver: The graph's weights, and whether there is a checkpoint to compare them with.
        quantised: What `quantised_operators` says, where weights are to be changed.
    """
    total, file = len(sites) + len(misses), graph.path.name
    # Without a format it is no file but what the user typed.
    name = f"adapter {adapter.name!r}" if adapter.format else adapter.name
    reasons = [miss.reason for miss in misses]
    lines = [f"{miss.target.key}  {miss.reason}" for miss in misses]
    lost = all(reason.startswith("not found") for reason in reasons)
    if any(reason.startswith("quantised") for reason in reasons) or (lost and not sites and quantised):
        raise SiteError(
            f"{file} has quantised weights{quantised}: {name} can't be merged into {len(misses)} of "
            f"its {total} parameters' places",
            "keep the adapter beside the quantised weights (lora-export swap-onnx), or merge into the "
            "unquantised base and quantise the result",
            lines,
        )
    if any(_OTHER_VALUES in reason for reason in reasons):
        raise SiteError(
            f"{file} was not exported from this checkpoint, or was changed since: {name} has "
            f"{len(misses)} places (of {total}) that are not confirmed",
            "give the folder that the graph was exported from",
            lines,
        )
    _refuse_changed(graph, name, lines, total, resolver, lost=lost, all_lost=lost and not sites)
    if not sites and lost:
        raise SiteError(
            f"{name} was made for another model: none of its {total} parameters has a place in {file}",
            "check the base; if the graph's names are gone, give --checkpoint BASE_DIR to match by value",
            lines,
        )
    raise SiteError(
        f"{name} has {len(misses)} parameters with no place in {file} (of {total})",
        _hint(reasons, bool(sites), resolver.weight_of is not None),
        lines,
    )


def _refuse_changed(
    graph: GraphFile,
    name: str,
    lines: Sequence[str],
    total: int,
    resolver: Resolver,
    *,
    lost: bool,
    all_lost: bool,
) -> None:
    """Raise `SiteError` where the graph was changed so that nothing is found, or an adapter is in it."""
    file, of = graph.path.name, f"the {total} parameters of {name}"
    contained = sum(_CONTAINED in line for line in lines)
    layout = _layout(graph) if lost else ""
    if contained:
        raise SiteError(
            f"{file} contains an adapter already, beside {contained} of {of}",
            "export the base model without the adapter, or give the graph that it was added to",
            lines,
        )
    if layout:
        raise SiteError(
            f"{file} has its convolutions in another layout ({layout}): {len(lines)} of {of} can't be found",
            "give the graph before it was optimised for one machine (ONNX Runtime: save it with "
            "ORT_ENABLE_EXTENDED, not ORT_ENABLE_ALL), and optimise the result",
            lines,
        )
    if all_lost and resolver.weight_of is not None:
        raise SiteError(
            f"{file} holds the checkpoint's values of none of {of}",
            "give the folder that the graph was exported from, and the graph as its exporter wrote it: a "
            "tool may have changed its weights since",
            lines,
        )
    if all_lost and any("--checkpoint" in line for line in lines):
        raise SiteError(
            f"{file} does not say where its weights belong: none of {of} is named in it",
            "give --checkpoint BASE_DIR to match by value, or the graph as its exporter wrote it",
            lines,
        )


def _layout(graph: GraphFile) -> str:
    """Name the operators whose weights are laid out for one machine, or return an empty text."""
    blocked = {node.op_type for node in graph.graph.all_nodes() if node.domain == "com.microsoft.nchwc"}
    rows = {node.op_type for node in graph.graph.all_nodes() if node.op_type == "NhwcConv"}
    return ", ".join([*(f"NCHWc {name}" for name in sorted(blocked & {"Conv"})), *sorted(rows)])


def _hint(reasons: Sequence[str], some: bool, has_checkpoint: bool) -> str:
    hints = []
    if any(reason.startswith("shapes differ") for reason in reasons):
        hints.append("give the base that the adapter was trained on")
    if any("--checkpoint" in reason or reason.startswith("not found") for reason in reasons):
        give = "" if has_checkpoint else "give --checkpoint BASE_DIR to match by value, or "
        hints.append(f"{give}give the graph as its exporter wrote it".replace("or give", "or"))
    elif any("does not store it" in reason or "can't be compared" in reason for reason in reasons):
        hints.append("give the graph as its exporter wrote it, or a checkpoint that stores these parameters")
    if any(" is found as well" in reason for reason in reasons):
        hints.append("give --component where the adapter's file serves several models")
    if any("--dora" in reason for reason in reasons):
        hints.append("see swap-onnx --dora, or merge the adapter with merge-onnx")
    if some:
        hints.append("--allow-unmatched (allow_unmatched=True) goes on without them")
    if not hints and any(reason.startswith("ambiguous") or "computed" in reason for reason in reasons):
        give = "" if has_checkpoint else ", and give --checkpoint BASE_DIR"
        hints.append(f"export the graph again, with names kept{give}")
    return "; ".join(hints) or "merge the adapter with merge-onnx"


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
