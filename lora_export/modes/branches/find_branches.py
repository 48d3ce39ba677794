"""Find the branches of a graph for an adapter's targets; list targets without one with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_export.adapter import EVERYWHERE, Adapter
from lora_export.base.planning.hints import Situation, Verb, hints_of
from lora_export.base.planning.plan_rows import placed_row, refuse_misses, refuse_unaccounted, refused_row
from lora_export.base.ties.copies import is_same
from lora_export.errors import GraphError, SiteError
from lora_export.formats.reading.saved import with_bias
from lora_export.graph.exposed import KEY, StoredRows
from lora_export.graph.onnx_file import GraphFile, initializer_of
from lora_export.modes.branches.calls import Branch, Call, branch_of
from lora_export.plan import Plan, PlanRow, Refusal, RefusalKind, refuse
from lora_export.sites import operator_named
from lora_export.sites.bias import restore_biases
from lora_export.sites.doubts.contained import adapter_names
from lora_export.sites.grouped import grouped_dora
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import Miss, Site, Target, targets_of
from lora_export.sites.values.held import held_of
from lora_export.sites.values.verify import canonical_rows

_NO_ADAPTER = "--target-modules"
_REPLACED = "the adapter replaces this whole parameter, which has no low-rank branch"
_WITH_WEIGHT = Refusal("merge only", "it goes with its module's weight, which has no place")


def find_branches(
    graph: GraphFile,
    resolver: Resolver,
    adapter: Adapter | None,
    targets: Sequence[Target],
    calls: dict[int, Call],
    *,
    allow_unmatched: bool,
    dora: bool = False,
    bank: bool = False,
) -> tuple[Plan, list[Branch]]:
    """Find a branch for each target.

    Args:
        graph: The graph.
        resolver: Resolver of the graph's weights, with ``branches``.
        adapter: Adapter that owns the targets; None for --target-modules.
        targets: Targets that need a branch.
        calls: Node → its call; several adapters share them.
        allow_unmatched: Leave out targets that have no site.
        dora: True if factors will be exposed as well.
        bank: True for a bank.

    Returns:
        The plan and the branches, in the targets' order.

    Raises:
        GraphError: The graph has exposed LoRA already.
        SiteError: Targets have no site; all are listed.
    """
    refuse_exposed(graph)
    wanted = [target for target in targets if not _unsuited(target, dora)]
    flattened, scope = (adapter.flattened, adapter.scope) if adapter else (False, None)
    sites, misses = resolver.resolve(wanted, flattened, scope)
    sites, misses = restore_biases(sites, misses, resolver.weight_of)
    found, sites = sites, [site for site in sites if not _unsuited(site.target, dora)]
    misses += _unsuited_of([*targets, *(site.target for site in found if site not in sites)], dora)
    unchanged = [site for site in sites if site.target.action == "replace" and holds_already(site)]
    biases = [site for site in sites if site.target.kind == "vector" and site not in unchanged]
    weights = [site for site in sites if site not in unchanged and site not in biases]
    placed, branches, without = _branches_of(weights, calls, dora)
    misses += without
    misses += _add_biases(biases, placed, branches, misses)
    shown = adapter or Adapter(_NO_ADAPTER, "", "", {})
    if misses and not (allow_unmatched and branches):
        verb: Verb = "bank-onnx" if bank else "swap-onnx"
        checked = resolver.weight_of is not None
        refuse_misses(graph, shown, placed, misses, verb=verb, checked=checked, uses=resolver.uses)
    rows: list[PlanRow] = [placed_row(shown, site, "unchanged") for site in unchanged]
    rows += [placed_row(shown, site, "expose") for site in placed]
    rows += [refused_row(shown, miss) for miss in misses]
    if adapter:
        refuse_unaccounted(adapter, rows)
    if not branches:
        raise SiteError(
            f"{shown.name}: nothing to expose in {graph.path.name}", "check the base and the targets"
        )
    return Plan(tuple(rows)), branches


def refuse_unsuited(
    adapters: Sequence[Adapter], base: Path, *, allow_unmatched: bool, dora: bool = False, bank: bool = False
) -> None:
    """Refuse targets for which no graph could have a branch, before a folder is captured.

    Args:
        adapters: Adapters to expose.
        base: The folder.
        allow_unmatched: Leave out targets that have no site.
        dora: True if factors will be exposed as well.
        bank: True for a bank.

    Raises:
        AdapterError: An adapter replaces single rows.
        SiteError: Some targets of an adapter can't be exposed; all are listed.
    """
    for adapter in adapters:
        targets = targets_of(adapter)
        misses = _unsuited_of(targets, dora)
        some = len(misses) < len(targets)
        if misses and not (allow_unmatched and some):
            situation = Situation(into="bank-onnx" if bank else "swap-onnx", some=some)
            refuse(
                f"adapter {adapter.name!r}",
                f"a graph of {base.name}",
                [f"{miss.target.key}  {miss.reason}" for miss in misses],
                hints_of({miss.kind for miss in misses}, situation),
                count=len(misses),
                total=len(targets),
            )


def _branches_of(
    sites: Sequence[Site], calls: dict[int, Call], dora: bool
) -> tuple[list[Site], list[Branch], list[Miss]]:
    """Return the sites that get a branch, their branches, and misses for the others."""
    placed: list[Site] = []
    branches: list[Branch] = []
    misses: list[Miss] = []
    for site in sites:
        branch = branch_of(site, calls)
        if isinstance(branch, Branch) and dora:
            branch = _with_factor(branch, "integers" if site.is_quantised else "merge only")
            _name_weights(site)
        if isinstance(branch, Refusal):
            misses.append(Miss(site.target, branch))
        else:
            placed.append(site)
            branches.append(branch)
    misses += _doubled(placed, branches)
    return placed, branches, misses


def refuse_exposed(graph: GraphFile) -> None:
    """Raise `GraphError` for a graph that has LoRA already: as inputs, ours or another tool's, or inside."""
    inputs = [str(value.name) for value in graph.graph.inputs if ".lora_" in str(value.name)]
    if inputs or KEY in graph.model.metadata_props:
        raise GraphError(
            f"{graph.path} has exposed LoRA already", "give the base that it was made from", inputs[:4]
        )
    refuse_contained(graph)


def refuse_contained(graph: GraphFile) -> None:
    """Raise `GraphError` for a graph that contains an adapter's layers, as constants."""
    names = adapter_names(graph)
    if names:
        raise GraphError(
            f"{graph.path} contains an adapter already (exported from a PEFT model without "
            "merge_and_unload): another one would be added to it",
            "export the base model without the adapter, or give the graph that it was added to",
            names,
        )


def _unsuited_of(targets: Sequence[Target], dora: bool) -> list[Miss]:
    refusals = ((target, _unsuited(target, dora)) for target in targets)
    return [Miss(target, refusal) for target, refusal in refusals if refusal]


def _unsuited(target: Target, dora: bool) -> Refusal | None:
    """Return the reason why a target can't be exposed as a low-rank branch; None if it can."""
    if target.experts > 1:
        return Refusal("merge only", "stacked experts are not exposed")
    if target.module is not None and target.module.everywhere and target.module.kind_by == "file":
        return Refusal("merge only", EVERYWHERE)
    if target.module is not None and (refusal := grouped_dora(target.module)):
        return refusal
    if target.module is not None and target.module.has_dora and not dora:
        return Refusal("dora", "DoRA has a factor on the whole product")
    return None


def holds_already(site: Site) -> bool:
    """Return True if the graph holds a replacement's values already: PEFT saves untrained embeddings too."""
    target = site.target
    assert target.values is not None
    if site.is_quantised:
        return False
    for part in site.parts:
        (placement,) = part.placements
        wanted = np.asarray(target.values).reshape(target.matrix)[slice(*placement.rows)]
        if placement.shift:
            wanted = wanted.astype(np.float32) + np.float32(placement.shift)
        if placement.row_scale is not None or not is_same(wanted, canonical_rows(part, placement)):
            return False
    return True


def _add_biases(
    biases: Sequence[Site], placed: list[Site], branches: list[Branch], misses: Sequence[Miss]
) -> list[Miss]:
    """Add the changes of biases to their modules' branches; return those that have none.

    Args:
        biases: Sites of the biases.
        placed: List to which the added sites are appended.
        branches: List in which branches are replaced by those with a bias.
        misses: Targets without a site: a bias goes with its module's weight.
    """
    lost = {miss.target.path for miss in misses if miss.target.key.endswith(".weight")}
    without = []
    for site in biases:
        refusal = _WITH_WEIGHT if site.target.path in lost else _add_bias(site, branches)
        if refusal:
            without.append(Miss(site.target, refusal))
        else:
            placed.append(site)
    return without


def _add_bias(site: Site, branches: list[Branch]) -> Refusal | None:
    """Give a module's branch the change of its bias, or return the reason why it can't have it."""
    target = site.target
    number = next((n for n, branch in enumerate(branches) if branch.path == target.path), None)
    if not target.key.endswith(".bias") or number is None:
        return Refusal("merge only", _REPLACED)
    branch = branches[number]
    assert target.values is not None
    assert branch.lora is not None
    if branch.lora.has_dora:
        return Refusal("merge only", "its module has DoRA, whose factor would scale the bias as well")
    lora, change, (part, *more) = branch.lora, np.asarray(target.values), site.parts
    start = part.placements[0].row
    held = held_of(part.uses[0])
    if target.action == "replace":
        if isinstance(held, Refusal):
            return Refusal("merge only", f"the adapter replaces it, and {held.detail}")
        values = held.values[start : start + len(change)]
        if more or values.shape != change.shape:
            return Refusal("merge only", "its bias is stored in several parts")
        change = change.astype(np.float64) - values.astype(np.float64)
        lora = with_bias(lora, change, target.tensor_names)
    # Codes that can't be read are not a site for an adapter that replaces the bias.
    stored = (
        () if isinstance(held, Refusal) else (StoredRows(weight=held.name, rows=(0, len(change)), row=start),)
    )
    branches[number] = replace(branch, lora=lora, bias=True, stored_bias=stored)
    return None


def _name_weights(site: Site) -> None:
    """Turn Constant nodes into initializers: DoRA's factor is computed from W0, which is found by name."""
    for part in site.parts:
        maker = part.root.producer()
        if maker is not None and maker.graph is not None:
            initializer_of(part.root)


def _with_factor(branch: Branch, kind: RefusalKind) -> Branch | Refusal:
    """Return the branch if its product can have a factor and, if needed, DoRA's can be computed.

    Args:
        branch: The branch.
        kind: Kind of the refusal.
    """
    if branch.lora is not None and branch.lora.magnitude is not None and not branch.stored:
        return Refusal(
            kind,
            "DoRA's factor needs W0, which is quantised or rescaled here: merge it into the unquantised base",
        )
    operators = {piece.call.node.op_type for piece in branch.pieces}
    activated = [name for name in operators if (known := operator_named(name)) and known.without_activation]
    if activated:
        reason = f"{activated.pop()} applies its activation inside: DoRA's factor can't come before it"
        return Refusal(kind, reason)
    return branch


def _doubled(placed: list[Site], branches: list[Branch]) -> list[Miss]:
    """Remove modules whose path two targets have, because their tensors would have one name."""
    seen: set[str] = set()
    misses = []
    for number in range(len(branches) - 1, -1, -1):
        if branches[number].path in seen:
            reason = "two targets have this path"
            misses.append(Miss(placed[number].target, Refusal("double", reason)))
            del placed[number], branches[number]
        else:
            seen.add(branches[number].path)
    return misses
