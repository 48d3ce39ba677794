"""Find the sites of adapters in the constants of a graph, and the patches for each constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Adapter
from lora_export.base.history.history import rows_name
from lora_export.base.history.in_graph import (
    MERGED_BASE_KEY,
    MERGED_KEY,
    entries_of,
    joined_entries,
    merged_in,
    refuse_merged_into,
)
from lora_export.base.planning.plan_rows import placed_row, refuse_misses, refuse_unaccounted, refused_row
from lora_export.base.ties.copies import Copied, are_judged, refuse_copies, refuse_overwriting, untrained_note
from lora_export.base.ties.tied_ends import with_tied_ends
from lora_export.errors import SiteError
from lora_export.formats.schemes import fitted
from lora_export.graph.external_data import InitializerChange, merged_values
from lora_export.graph.onnx_file import GraphFile, drop_dead
from lora_export.modes.branches.find_branches import holds_already, refuse_exposed
from lora_export.plan import Plan, PlanRow, Refusal
from lora_export.sites.bias import restore_biases
from lora_export.sites.grouped import grouped_dora
from lora_export.sites.isolate import Isolator
from lora_export.sites.operand import Use
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import BaseWeights, Miss, Site, Target, targets_of
from lora_export.sites.values.grid import loss_of, quantisers
from lora_export.sites.values.ranges import cut_off
from lora_export.sites.values.verify import canonical_rows
from lora_export.storage.patch import Patch, Placement, join, patch_from, replacement
from lora_export.storage.rounding import WARN_RELATIVE

# Largest share of ‖ΔW‖ that a weight's grid may cut off: a tenth of the effect, as in parity.
_MOST_CUT = 0.1
_GROUPED = Refusal(
    "branch only",
    "a grouped convolution mixes the groups through lora_A and can't be merged (PEFT refuses it as well); "
    "expose it with swap-onnx instead",
)


def plan_changes(
    graph: GraphFile,
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    weight_of: BaseWeights | None,
    allow_unmatched: bool,
) -> tuple[Plan, dict[ir.Value, InitializerChange]]:
    """Resolve every target of every adapter, then give each its constant and its patches.

    Args:
        graph: The base; a target in a constant that others read too gets a copy of its own.
        adapters: Adapters to add.
        factors: Factor of each adapter.
        weight_of: The checkpoint's weights, if there is one.
        allow_unmatched: Leave out parameters that have no site.

    Returns:
        The plan, and the change of each constant.

    Raises:
        AdapterError: A whole copy that an adapter holds is not the only change of its parameter.
        GraphError: The graph has exposed LoRA, or one of the adapters merged into it.
        SiteError: Parameters of the adapters have no site in the graph; all are listed.
    """
    refuse_exposed(graph)
    refuse_merged_into(str(graph.path), merged_in(graph.model.metadata_props), adapters)
    manifest = graph.path.with_suffix(".lora.json")
    search = _Search(
        graph,
        weight_of,
        allow_unmatched=allow_unmatched,
        judged=are_judged(factors, manifest),
        shared=len(adapters) > 1,
    )
    found: list[tuple[Adapter, float, list[Site]]] = []
    for given, factor in zip(adapters, factors, strict=True):
        adapter, sites = search.place(given)
        found.append((adapter, factor, sites))
    isolator = Isolator()
    copied = [change for number, item in enumerate(found) for change in _copied(number, *item)]
    refuse_copies(copied, adapters)
    refuse_overwriting(copied, manifest, adapters)
    changes, rounded = _changes(found, isolator)
    warnings = [*search.warnings, *_kept_by_grids(graph, rounded, changes), *cut_off(_results(found))]
    drop_dead(graph)
    notes = (*search.notes, *isolator.notes)
    return Plan(tuple(search.rows), notes, tuple(filter(None, warnings))), changes


class _Search:
    """Search for the sites of one adapter after the other in the constants of a graph.

    Args:
        graph: The base.
        weight_of: The checkpoint's weights, if there is one.
        allow_unmatched: Leave out parameters that have no site.
        judged: Count copies with the base's values as unchanged.
        shared: True if the command's options hold for other adapters too.

    Attributes:
        rows: Rows of the plan.
        notes: Notes for the user.
        warnings: Warnings that a user should not miss, and empty texts.
    """

    def __init__(
        self,
        graph: GraphFile,
        weight_of: BaseWeights | None,
        *,
        allow_unmatched: bool,
        judged: bool,
        shared: bool,
    ) -> None:
        self._graph, self._weight_of, self._resolver = graph, weight_of, Resolver(graph, weight_of)
        self._allow_unmatched, self._judged, self._shared = allow_unmatched, judged, shared
        self.rows: list[PlanRow] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def place(self, given: Adapter) -> tuple[Adapter, list[Site]]:
        """Return an adapter as this base has it, and the sites that change.

        Raises:
            SiteError: Parameters of the adapter have no site in the graph; all are listed.
        """
        adapter, assumed = _settled(fitted(given, self._resolver.known, self.notes), self._weight_of)
        self.notes += assumed
        sites, misses = self._found(adapter)
        if misses and not (self._allow_unmatched and sites):
            refuse_misses(
                self._graph,
                adapter,
                sites,
                misses,
                verb="merge-onnx",
                checked=self._weight_of is not None,
                uses=self._resolver.uses,
                shared=self._shared,
            )
        unchanged = [site for site in sites if self._judged and _is_copy(site) and holds_already(site)]
        changed = [site for site in sites if site not in unchanged]
        self.rows += [placed_row(adapter, site, "unchanged") for site in unchanged]
        self.rows += [placed_row(adapter, site) for site in changed]
        self.rows += [refused_row(adapter, miss) for miss in misses]
        refuse_unaccounted(adapter, self.rows)
        return adapter, changed

    def _found(self, adapter: Adapter) -> tuple[list[Site], list[Miss]]:
        """Return the sites that can be merged into, tied ends included, and the misses."""
        resolver = self._resolver
        sites, misses = resolver.resolve(targets_of(adapter), adapter.flattened, adapter.scope)
        sites, misses = restore_biases(sites, misses, resolver.weight_of)
        grouped = [site for site in sites if site.target.module and site.target.module.groups > 1]
        sites = [site for site in sites if site not in grouped]
        for site in grouped:
            assert site.target.module is not None
            misses.append(Miss(site.target, grouped_dora(site.target.module) or _GROUPED))
        self.warnings += [_untrained(adapter, site) for site in sites if _is_copy(site)]
        sites, torn, tied = with_tied_ends(adapter, sites, resolver.uses, resolver.weight_of)
        self.notes += tied
        return sites, misses + torn


def _is_copy(site: Site) -> bool:
    return site.target.action == "replace"


def _copied(owner: int, adapter: Adapter, factor: float, sites: Sequence[Site]) -> Iterator[Copied]:
    """Yield the changes of an adapter, each of a constant (or some rows of one) for one reader.

    An exporter has one constant for biases of several modules that are zero, which is not one site.
    """
    for site in sites:
        target = site.target
        pairs = [(part, placement) for part in site.parts for placement in part.placements]
        for part, placement in pairs:
            assert part.root.const_value is not None
            count = placement.rows[1] - placement.rows[0]
            whole = count * target.matrix[1] == part.root.const_value.size
            name = str(part.root.name)
            stored = name if whole else rows_name(name, target.key)
            values = target.values if _is_copy(site) else None
            dora = target.module is not None and target.module.magnitude is not None
            for use in part.uses:
                place = (id(use), placement.row, placement.col)
                yield Copied(
                    place=place,
                    stored=stored,
                    parameter=target.key,
                    adapter=adapter.name,
                    owner=owner,
                    weight=factor,
                    values=values,
                    is_dora=dora,
                )


def _untrained(adapter: Adapter, site: Site) -> str:
    """Return a warning if a copy that training did not change differs from the graph, else ""."""
    target, (first, *more) = site.target, site.parts
    (placement,) = first.placements
    if more or placement.row_scale is not None or target.values is None or len(target.shape) < 2:
        return ""
    copy = np.asarray(target.values).reshape(target.matrix)
    return untrained_note(adapter, target.key, copy, canonical_rows(first, placement))


def _settled(adapter: Adapter, weights: BaseWeights | None) -> tuple[Adapter, tuple[str, ...]]:
    """Return the adapter with the experts' layout of the checkpoint's modules, if there is a checkpoint."""
    return weights.settled(adapter) if weights else (adapter, ())


def _results(found: list[tuple[Adapter, float, list[Site]]]) -> list[ir.Value]:
    """Return the values that are computed from the changed parameters."""
    uses = [use for _, _, sites in found for site in sites for part in site.parts for use in part.uses]
    return [use.node.outputs[0] for use in uses]


def _kept_by_grids(
    graph: GraphFile, rounded: Mapping[ir.Value, list[Use]], changes: Mapping[ir.Value, InitializerChange]
) -> list[str]:
    """Return a warning for each weight that the graph rounds to a grid which loses much of the change.

    Raises:
        SiteError: A grid's range cuts off so much that the adapter would be lost.
    """
    refused, warnings = [], []
    for value, uses in rounded.items():
        tensor = value.const_value
        assert tensor is not None
        before, after = np.asarray(tensor.numpy()), merged_values(value, changes[value])
        loss = max((loss_of(use, before, after) for use in uses), key=lambda loss: loss.cut)
        line = (
            f"{value.name}: {loss.beyond:.1%} of the changed values are beyond the range of "
            f"{loss.node or 'its QuantizeLinear'}, which cuts off {loss.cut:.1%} of ‖ΔW‖"
        )
        if loss.cut > _MOST_CUT:
            refused.append(line)
        elif loss.beyond:
            warnings.append(line)
        if loss.cut <= _MOST_CUT and loss.error > WARN_RELATIVE:
            warnings.append(
                f"{value.name}: the graph rounds it to the grid of {loss.node or 'a QuantizeLinear'}, which "
                f"changes ΔW by {loss.error:.0%} of ‖ΔW‖; swap-onnx keeps the adapter beside it"
            )
    if refused:
        raise SiteError(
            f"{graph.path.name} rounds its weights to ranges that were calibrated without the adapter, and "
            f"they would cut off more than {_MOST_CUT:.0%} of its change in {len(refused)} of them",
            "keep the adapter beside the rounded weights (lora-export swap-onnx), or merge it into the "
            "model before its scales are calibrated",
            refused,
        )
    return warnings


def _changes(
    found: list[tuple[Adapter, float, list[Site]]], isolator: Isolator
) -> tuple[dict[ir.Value, InitializerChange], dict[ir.Value, list[Use]]]:
    """Return the change of each constant, and the uses of those that the graph rounds."""
    wanted: dict[ir.Value, list[tuple[Target, Placement, float]]] = defaultdict(list)
    rounded: dict[ir.Value, list[Use]] = defaultdict(list)
    for _, factor, sites in found:
        for site in sites:
            target = site.target
            for part in site.parts:
                value = isolator.constant_for(part, target.path, target.key.rpartition(".")[2])
                wanted[value] += [(target, placement, factor) for placement in part.placements]
                if ways := [use for use in part.uses if quantisers(use)]:
                    rounded[value] += ways
    changes = {
        value: InitializerChange(partial(_patches, group, _work_dtype(value)), group[0][0].experts > 1)
        for value, group in wanted.items()
    }
    return changes, rounded


def _patches(
    group: Sequence[tuple[Target, Placement, float]], dtype: type[np.floating[Any]]
) -> tuple[Patch, ...]:
    return tuple(join([_patch_of(target, placement, factor, dtype) for target, placement, factor in group]))


def _work_dtype(value: ir.Value) -> type[np.floating[Any]]:
    return np.float64 if value.dtype == ir.DataType.DOUBLE else np.float32


def _patch_of(target: Target, placement: Placement, factor: float, dtype: type[np.floating[Any]]) -> Patch:
    if target.action == "merge":
        assert target.module is not None
        return patch_from(target.module, placement, factor, dtype)
    assert target.values is not None
    start, stop = placement.rows
    values = np.asarray(target.values).reshape(target.matrix)[start:stop].astype(dtype)
    if placement.row_scale is not None:
        values = values * placement.row_scale.astype(dtype)[:, None]
    if target.action == "replace" and placement.shift:
        values = values + dtype(placement.shift)
    if placement.transposed:
        values = np.ascontiguousarray(values.T)
    if target.action == "replace":
        return replacement(target.key, values, placement.row, placement.col)
    # A vector is one column, so that its addend is the outer product with 1.
    one = np.ones((1, 1), dtype)
    height, width = values.shape
    return Patch(
        label=target.key,
        row=placement.row,
        col=placement.col,
        height=height,
        width=width,
        left=values * dtype(factor),
        right=one,
    )


def mark_merged(
    model: ir.Model, adapters: Sequence[Adapter], factors: Sequence[float], base_sha256: str
) -> None:
    """Write into the graph itself which adapters were merged, and into which base.

    A later merge of the same adapter is then refused, and an engine built from it can go back to the base.

    Args:
        model: The merged graph.
        adapters: The merged adapters.
        factors: Factor of each adapter.
        base_sha256: Hash of the base.
    """
    before = model.metadata_props.get(MERGED_KEY, "")
    model.metadata_props[MERGED_KEY] = joined_entries(before, entries_of(adapters, factors))
    model.metadata_props.setdefault(MERGED_BASE_KEY, base_sha256)
