"""Write the rows of a plan for a graph, and one error that lists all targets without a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import onnx_ir as ir

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.vocabulary import head_hint
from lora_export.base.planning.hints import BY_VALUE, LOST, Situation, Verb, hints_of
from lora_export.base.ties.ties import may_be_tied
from lora_export.errors import SiteError
from lora_export.formats.reading.scope import SHARED, how_to_part
from lora_export.graph.onnx_file import GraphFile, shape_of
from lora_export.plan import Plan, PlanRow, refuse, unaccounted
from lora_export.sites.doubts.changed import is_transposed_constant
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.naming.likeness import counterparts
from lora_export.sites.operand import Use
from lora_export.sites.target import Miss, Site

_EXAMPLES = 4
_COMPARE = "give --checkpoint BASE_DIR: its values may explain the constants"
_QUANTISED = (
    "keep the adapter beside the quantised weights (lora-export swap-onnx), or merge into the "
    "unquantised base and quantise the result"
)
_INTEGERS = (
    "merge into the unquantised graph and quantise the result; or quantise that graph so that the operators "
    "stay floats (quantize_static(..., quant_format=QuantFormat.QDQ), MatMulNBits) and "
)
_COPIES = (
    "merge into the unquantised graph and quantise the result; or quantise that graph without these modules "
    "(nodes_to_exclude=[...]) and give that"
)
_CONTRIB = "com.microsoft"
# Domains of operators that ONNX Runtime's optimiser makes for a machine, with the names of their layouts.
_ARRANGED = {"com.microsoft.nchwc": "NCHWc ", "com.ms.internal.nhwc": "NHWC ", _CONTRIB: ""}


class OtherValues(SiteError):
    """Error for sites that were found by name and hold other values than the checkpoint."""


def refuse_unaccounted(adapter: Adapter, rows: Sequence[PlanRow]) -> None:
    """Raise `SiteError` if some of an adapter's tensors are missing from the plan."""
    lost = unaccounted(adapter.tensor_names, rows)
    if lost:
        raise SiteError(f"adapter {adapter.name!r} has tensors that are missing from the plan", "", lost)


def with_unverified(plan: Plan, checkpoint: Path) -> Plan:
    """Add notes on sites that the checkpoint could not confirm; raise `SiteError` if it confirms none."""
    # Weights that were added to the graph have no values that could be another module's.
    silent = [row for row in plan.placed if row.proof == "names"]
    if silent and not any(row.proof == "values" for row in plan.placed):
        raise SiteError(
            f"the checkpoint {checkpoint} stores none of the {len(silent)} parameters that would change",
            "give the folder that the graph was exported from, or go by names: --no-checkpoint "
            "(checkpoint=False)",
            [row.parameter for row in silent[:_EXAMPLES]],
        )
    notes = [
        f"{row.parameter}: found by {row.reason} alone, the checkpoint does not store it" for row in silent
    ]
    return replace(plan, notes=(*plan.notes, *notes))


def warned_of_computed(plan: Plan) -> Plan:
    """Warn of sites with a module's name only on the node, whose constant the exporter computed."""
    names = [
        name
        for row in plan.placed
        if row.proof == "names"
        for name in row.place.split(", ")
        if is_transposed_constant(name)
    ]
    if not names:
        return plan
    warning = (
        f"torch.onnx (TorchScript) computed {len(names)} of the weights ({_first(names)}): a factor that the "
        "model has on a weight would be in them, and only their nodes' names say whose they are; give "
        "--checkpoint BASE_DIR to compare the values"
    )
    return replace(plan, warnings=(*plan.warnings, warning))


def warned_of_training(plan: Plan) -> Plan:
    """Warn of modules whose adapters trainers compute in another way than they merge them."""
    named = [row for row in plan.placed if row.trained_otherwise]
    tables = [row.parameter for row in named if row.operator == "Gather"]
    others = [row.parameter for row in named if row.operator != "Gather"]
    warnings = []
    if others:
        warnings.append(
            f"PEFT, diffusers and kohya train LoRA of {len(others)} convolutions ({_first(others)}) without "
            "their dilation or padding mode (padding by a layer of its own is none): the result is what "
            "merging in PEFT gives, not what was trained"
        )
    if tables:
        warnings.append(
            f"{len(tables)} embeddings have a factor of their own ({_first(tables)}): PEFT trains LoRA "
            "without it, unless the module calls it embed_scale; the result is what merging in PEFT gives"
        )
    return replace(plan, warnings=(*plan.warnings, *warnings))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_EXAMPLES]) + (", …" if len(names) > _EXAMPLES else "")


def refuse_misses(
    graph: GraphFile,
    adapter: Adapter,
    sites: Sequence[Site],
    misses: Sequence[Miss],
    *,
    verb: Verb,
    checked: bool,
    uses: Sequence[Use],
    shared: bool = False,
) -> NoReturn:
    """Raise `SiteError` with a reason for each miss.

    Args:
        graph: The graph.
        adapter: The adapter.
        sites: Sites that were found.
        misses: Targets without a site.
        verb: The command that needs sites.
        checked: True if there is a checkpoint to compare values with.
        uses: All uses of weights in the graph.
        shared: True if the command's options hold for other adapters too.
    """
    total, file = len(sites) + len(misses), graph.path.name
    # Without a format the adapter is not a file but names that the user typed.
    name = f"adapter {adapter.name!r}" if adapter.format else adapter.name
    lines = [f"{miss.target.key}  {miss.reason}" for miss in misses]
    kinds = {miss.kind for miss in misses}
    given = list(dict.fromkeys(miss.refusal.hint for miss in misses if miss.refusal.hint))
    lost = not sites and kinds <= LOST and not given
    error = OtherValues if "values" in kinds else SiteError
    found = (
        _changed(graph, misses, adapter=adapter, name=name, total=total, checked=checked)
        or _quantised(file, misses, name=name, total=total, verb=verb, uses=uses, some=bool(sites))
        or (_lost(file, misses, name=name, checked=checked, uses=uses) if lost else None)
    )
    if found is not None:
        raise error(*found, lines)
    doubled = {miss.target.key for miss in misses if miss.kind == "double"}
    situation = Situation(
        into=verb,
        checked=checked,
        some=bool(sites),
        given=[*given, SHARED] if shared and given else given,
        tells_part=any(miss.tells_part for miss in misses),
        parting=how_to_part(adapter, doubled) if doubled else "",
    )
    hints = [*_rows_hints(misses), *hints_of(kinds, situation)]
    refuse(name, file, lines, hints, count=len(misses), total=total, error=error)


def _changed(
    graph: GraphFile, misses: Sequence[Miss], adapter: Adapter, name: str, total: int, checked: bool
) -> tuple[str, str] | None:
    """Return message and hint for a graph that differs from what its exporter wrote."""
    file, kinds = graph.path.name, {miss.kind for miss in misses}
    if contained := sum(miss.kind == "contained" for miss in misses):
        return (
            f"{file} contains an adapter already, beside {contained} of the {total} parameters of {name}",
            "export the base model without the adapter, or give the graph that it was added to",
        )
    # A constant in such a layout looks like one that a tool has computed.
    if kinds & {*LOST, "operator"} and (arranged := _arranged(graph)):
        return (
            f"{file} was optimised by ONNX Runtime for one machine ({arranged}), which stores weights in a "
            f"layout of its own: {name} has {len(misses)} parameters with no place in it (of {total})",
            "give the graph that it was made from, or save it with "
            "SessionOptions.graph_optimization_level = ORT_ENABLE_EXTENDED instead of ORT_ENABLE_ALL",
        )
    if computed := sum(miss.kind in ("partly computed", "picked") for miss in misses):
        return (
            f"a tool has computed parts of {file} into constants, perhaps with {computed} of the {total} "
            f"parameters of {name}",
            "give the graph as its exporter wrote it (torch.onnx.export(..., optimize=False)), and run the "
            "tool on the result" + ("" if checked or "picked" in kinds else f"; or {_COMPARE}"),
        )
    if "values" in kinds:
        return (
            f"{file} was not exported from this checkpoint, or was changed since: {name} has "
            f"{len(misses)} places (of {total}) that are not confirmed",
            "give the folder that the graph was exported from"
            + (f", or another part than {adapter.scope} with --component" if adapter.scope else ""),
        )
    return None


def _quantised(
    file: str, misses: Sequence[Miss], name: str, total: int, verb: Verb, uses: Sequence[Use], some: bool
) -> tuple[str, str] | None:
    """Return message and hint for quantised weights: the misses' own, or some of a graph without names."""
    merging = verb == "merge-onnx"
    codes = [use for use in uses if use.quantised and (merging or use.no_branch)]
    kinds = {miss.kind for miss in misses}
    lost = kinds <= LOST
    if not kinds & {"quantised", "integers"} and not (lost and not some and codes):
        return None
    hint = _QUANTISED
    if "integers" in kinds or (lost and all(use.no_branch for use in codes)):
        hint = _INTEGERS + ("use swap-onnx" if merging else "give that")
    codes_of = [miss.target for miss in misses if miss.kind == "integers"]
    if not merging and codes_of and all(target.action == "replace" for target in codes_of):
        # Beside these codes LoRA can have a branch; only whole copies of them can't.
        hint = _COPIES
    return (
        f"{file} has quantised weights{_operators(codes)}: {name} can't be "
        f"{'merged into' if merging else 'exposed at'} {len(misses)} of its {total} parameters' places",
        hint,
    )


def _lost(
    file: str, misses: Sequence[Miss], name: str, checked: bool, uses: Sequence[Use]
) -> tuple[str, str]:
    """Return message and hint for an adapter of which nothing was found."""
    total = len(misses)
    is_foreign = checked and all(miss.is_foreign for miss in misses)
    if checked and not is_foreign:
        return (
            f"{file} holds the checkpoint's values of none of the {total} parameters of {name}",
            "give the folder that the graph was exported from, and the graph as its exporter wrote it: a "
            "tool may have changed its weights since",
        )
    if not checked and any(miss.kind == "nameless" for miss in misses):
        return (
            f"{file} does not say where its weights belong: none of the {total} parameters of {name} is "
            "named in it",
            f"{BY_VALUE}, or the graph as its exporter wrote it",
        )
    # The values of codes are not the checkpoint's.
    codes = any(use.quantised for use in uses)
    nameless = "export it with names (torch.onnx.export(..., optimize=False)) and quantise that"
    values = nameless if codes else BY_VALUE
    wanted = {miss.target.key: miss.target.shape for miss in misses if miss.target.module is not None}
    pairs = counterparts(wanted, _matrices(uses))
    if pairs:
        listed = ", ".join(f"{one} is perhaps {other}" for one, other in pairs)
        return (
            f"{name} names its modules in another way than {file}: none of its {total} parameters is found",
            f"the shapes fit ({listed}): rename the adapter's tensors"
            + ("" if checked else f"; or {values}"),
        )
    if checked:
        return (
            f"{name} was made for another model: neither {file} nor the checkpoint has any of its {total} "
            "parameters",
            "give the base that the adapter was trained on: its graph, and with --checkpoint its folder",
        )
    return (
        f"{name} was made for another model: none of its {total} parameters has a place in {file}",
        f"check the base; if the graph's names are gone, {values}",
    )


def _matrices(uses: Sequence[Use]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a graph's matrices by the module that reads them, else by their own names."""
    found = {}
    for use in uses:
        if use.operand.kind in ("linear", "conv", "embedding") and use.root.const_value is not None:
            shape = use.operand.shape or shape_of(use.root.const_value)
            found[module_by_name(use.node) or str(use.root.name)] = shape
    return found


def _arranged(graph: GraphFile) -> str:
    """List ONNX Runtime's operators that store weights in blocks of channels, or channels last."""
    nodes = (node for node in graph.graph.all_nodes() if node.domain in _ARRANGED)
    found = {f"{_ARRANGED[node.domain]}{node.op_type}" for node in nodes if _is_arranged(node)}
    return ", ".join(sorted(found))


def _is_arranged(node: ir.Node) -> bool:
    return node.domain != _CONTRIB or node.op_type.startswith("Nhwc")


def _operators(uses: Sequence[Use]) -> str:
    """Return ``" (MatMulInteger)"``, the operators of quantised weights, whatever their names; else ""."""
    found = {use.node.op_type for use in uses}
    return f" ({', '.join(sorted(found))})" if found else ""


def _rows_hints(misses: Sequence[Miss]) -> list[str]:
    """Return hints for a base that lacks rows for new tokens, or the head, that an adapter has."""
    hints = []
    for miss in misses:
        key, shape = miss.target.key, miss.target.shape
        if miss.target.action == "replace" and miss.kind == "shape" and may_be_tied(key):
            hints.append(f"for new tokens or labels: give the base {shape[0]} rows before it is exported")
        elif miss.target.action == "replace" and miss.kind in LOST:
            hints.append(head_hint(key, shape, of_graph=True))
    return [hint for hint in dict.fromkeys(hints) if hint]


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
        if first.shift:
            words.append(f"plus {first.shift:g}")
        layouts.append(" ".join(words) or "as in PyTorch")
    return PlanRow(
        adapter=adapter.name,
        parameter=site.target.key,
        tensors=site.target.tensor_names,
        action=action or site.target.action,
        place=", ".join(str(part.root.name) for part in site.parts),
        operator=", ".join(operators),
        layout="; ".join(layouts),
        reason=site.evidence,
        proof=site.proof,
        trained_otherwise=site.trained_otherwise,
    )


def refused_row(adapter: Adapter, miss: Miss) -> PlanRow:
    """Return the plan's row of a miss."""
    target = miss.target
    return PlanRow.refused(adapter.name, target.key, target.tensor_names, miss.refusal)
