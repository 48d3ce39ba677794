"""Bind an adapter to a graph with exposed LoRA: find each tensor's site, check, scale and lay out its values.

`bind_adapter` makes the tensors of one adapter for a swap graph, `slot_blocks` the rectangles that it fills
in a bank. If a parameter of the adapter has no site, nothing is bound, unless the user allows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.base.history.in_graph import refuse_bound
from lora_export.base.planning.hints import Situation, hints_of, remake
from lora_export.binding.base_weights import WeightOf
from lora_export.binding.cast import Caster, dtype_of, wide_of
from lora_export.binding.dora import dora_factor, dora_problem
from lora_export.binding.match import Matches, Pairing, match_modules, split_pack
from lora_export.binding.own_values import compare_own_values
from lora_export.binding.pack import (
    Rectangle,
    assemble,
    blocks_of_factors,
    blocks_of_slot,
    cut_b,
    joined_bias,
)
from lora_export.errors import AdapterError, SiteError
from lora_export.formats.provenance import only_this_base, refuse_other_base
from lora_export.formats.reading.scope import how_to_part
from lora_export.graph.exposed import ExposedModule, LoraRecord
from lora_export.plan import Plan, PlanRow, Refusal, refuse, unaccounted

_MAX_LISTED = 40


@dataclass(frozen=True, kw_only=True, eq=False)
class Binding:
    """Tensors of an adapter as a swap graph takes them.

    Attributes:
        adapter: The adapter's name.
        tensors: Graph input → values, in the graph's layout and dtype, C-contiguous; perhaps read-only.
        ranks: `ExposedModule.name` → rank of its tensors, padding included.
        plan: A row for each parameter of the adapter.
        notes: Conversions, padding, assumptions and omissions.
        warnings: The notes that a user should not miss.
        only_this_base: True if some values were computed from the base's, see `Provenance`.
    """

    adapter: str
    tensors: Mapping[str, Array]
    ranks: Mapping[str, int]
    plan: Plan
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    only_this_base: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotBinding:
    """Tensors of an adapter as one slot of a bank takes them.

    Attributes:
        adapter: The adapter's name.
        slot: Number of the slot.
        blocks: All rectangles of the slot, zeros included: once written, nothing of its last adapter remains.
        ranks: `Member.path` → the adapter's rank.
        plan: A row for each parameter of the adapter.
        notes: Conversions, padding, assumptions and omissions.
        warnings: The notes that a user should not miss.
    """

    adapter: str
    slot: int
    blocks: tuple[Rectangle, ...]
    ranks: Mapping[str, int]
    plan: Plan
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def bind_adapter(
    adapter: Adapter,
    exposed: LoraRecord,
    *,
    where: str,
    weight_of: WeightOf | None = None,
    allow_unmatched: bool = False,
    any_base: bool = False,
    unused: Set[str] = frozenset(),
    own_base: bool = False,
) -> Binding:
    """Make the tensors that turn a swap graph into the adapted model.

    Modules that the adapter doesn't change get no tensors.

    Args:
        adapter: The adapter to bind.
        exposed: The graph's LoRA record.
        where: The graph's file, for messages.
        weight_of: Name of an initializer → its values: needed for DoRA, and to see that a whole parameter
            in the adapter's file is the base's own.
        allow_unmatched: Leave out parameters that have no site, unless none has one.
        any_base: Accept a file converted for another base, unless its values were computed from that base.
        unused: `ExposedModule.name` of modules whose tensors no output of the graph depends on.
        own_base: Compare the graph's W0 with the folder that the adapter names as its base, if it is here.

    Raises:
        SiteError: Parameters of the adapter have no site; all are listed.
        AdapterError: Values are NaN, infinite or too large for the graph's dtype; the adapter is for another
            base, was trained on other values, or is merged into the graph's weights already.
    """
    refuse_bound(adapter, exposed.merged, where)
    warnings = refuse_other_base(adapter, exposed.base_sha256, where, any_base)
    found = match_modules(adapter, exposed, where, weight_of)
    if own_base:
        warnings += _compare(found, adapter, exposed, where=where, weight_of=weight_of, any_base=any_base)
    _refuse_unused(found, adapter, unused)
    _refuse_ranks(found, adapter, exposed)
    _refuse_dora(found, adapter, weight_of)
    caster = Caster()
    tensors, ranks = _all_tensors(found, weight_of, caster)
    plan = _finish(
        adapter,
        exposed,
        found=found,
        caster=caster,
        where=where,
        allow_unmatched=allow_unmatched,
        warnings=warnings,
    )
    fixed = only_this_base(adapter) or any(pair.from_base or pair.has_dora for pair in found.pairings)
    return Binding(
        adapter=adapter.name,
        tensors=tensors,
        ranks=ranks,
        plan=plan,
        notes=plan.notes,
        warnings=(*warnings, *caster.warnings()),
        only_this_base=fixed,
    )


def slot_blocks(
    adapter: Adapter,
    exposed: LoraRecord,
    slot: int,
    *,
    where: str,
    weight_of: WeightOf | None = None,
    allow_unmatched: bool = False,
    any_base: bool = False,
    unused: Set[str] = frozenset(),
    own_base: bool = False,
) -> SlotBinding:
    """Make the rectangles of a bank's tensors that an adapter fills in one slot.

    Args:
        adapter: The adapter to bind.
        exposed: The LoRA record of a bank.
        slot: Number of the slot.
        where: The graph's file, for messages.
        weight_of: See `bind_adapter`.
        allow_unmatched: Leave out parameters that have no site, unless none has one.
        any_base: See `bind_adapter`.
        unused: See `bind_adapter`.
        own_base: See `bind_adapter`.

    Raises:
        SiteError: See `bind_adapter`; also where the slot's rank is too small.
        AdapterError: See `bind_adapter`.
    """
    refuse_bound(adapter, exposed.merged, where)
    warnings = refuse_other_base(adapter, exposed.base_sha256, where, any_base)
    found = match_modules(adapter, exposed, where, weight_of)
    if own_base:
        warnings += _compare(found, adapter, exposed, where=where, weight_of=weight_of, any_base=any_base)
    _refuse_unused(found, adapter, unused)
    loras = _slot_loras(found, adapter, slot)
    caster = Caster()
    blocks = blocks_of_slot(exposed, slot, loras, caster)
    plan = _finish(
        adapter,
        exposed,
        found=found,
        caster=caster,
        where=where,
        allow_unmatched=allow_unmatched,
        warnings=warnings,
    )
    ranks = {path: lora.rank for path, lora in loras.items()}
    return SlotBinding(
        adapter=adapter.name,
        slot=slot,
        blocks=blocks,
        ranks=ranks,
        plan=plan,
        notes=plan.notes,
        warnings=(*warnings, *caster.warnings()),
    )


def clear_slot(exposed: LoraRecord, slot: int) -> tuple[Rectangle, ...]:
    """Return the blocks that make a slot of a bank an empty one."""
    return blocks_of_slot(exposed, slot, {}, Caster())


def _compare(
    found: Matches,
    adapter: Adapter,
    exposed: LoraRecord,
    *,
    where: str,
    weight_of: WeightOf | None,
    any_base: bool,
) -> tuple[str, ...]:
    """Compare W0 with the adapter's own base, add notes on that, and return warnings."""
    notes, warnings = compare_own_values(
        adapter,
        found.pairings,
        merged=exposed.merged,
        where=where,
        weight_of=weight_of,
        any_base=any_base,
    )
    found.notes += notes
    return tuple(warnings)


def _refuse(found: Matches, adapter: Adapter, reasons: Mapping[int, Refusal]) -> None:
    """Move pairings to the refusals; ``reasons`` is keyed by identity."""
    for pair in found.pairings:
        if reason := reasons.get(id(pair)):
            for row in pair.rows(adapter.name):
                found.refuse(row.adapter, row.parameter, row.tensors, reason)
    found.pairings = [pair for pair in found.pairings if id(pair) not in reasons]


def _refuse_unused(found: Matches, adapter: Adapter, unused: Set[str]) -> None:
    reason = "the graph never uses it: no output depends on {}"
    _refuse(
        found,
        adapter,
        {
            id(pair): Refusal("unused", reason.format(pair.module.lora_a))
            for pair in found.pairings
            if pair.module.name in unused
        },
    )


def _refuse_ranks(found: Matches, adapter: Adapter, exposed: LoraRecord) -> None:
    reasons = {}
    for module, pairings in _by_module(found.pairings):
        total = sum(pair.lora.rank for pair in pairings)
        for pair in pairings:
            most = exposed.max_rank * (len(module.members) if pair.whole else 1)
            if pair.lora.rank > most:
                reason = f"rank {pair.lora.rank}, the graph takes {most} at most"
                reasons[id(pair)] = Refusal("rank", reason)
            elif module.rank and total > module.rank:
                reasons[id(pair)] = Refusal("not exposed", f"rank {total}, the graph fixes {module.rank}")
    _refuse(found, adapter, reasons)


def _refuse_dora(found: Matches, adapter: Adapter, weight_of: WeightOf | None) -> None:
    trained = [pair for pair in found.pairings if pair.lora.scale is None and pair.lora.magnitude is not None]
    reasons = {id(pair): dora_problem(pair.member, weight_of) for pair in trained}
    _refuse(found, adapter, {key: reason for key, reason in reasons.items() if reason})


def _slot_loras(found: Matches, adapter: Adapter, slot: int) -> dict[str, LoraModule]:
    """Return `Member.path` → factors of the modules that fit into the slot; refuse the others."""
    reasons: dict[int, Refusal] = {}
    loras: dict[str, LoraModule] = {}
    for pair in found.pairings:
        parts = split_pack(pair) if pair.whole else [pair]
        if isinstance(parts, Refusal):
            reasons[id(pair)] = parts
            continue
        for part in parts:
            room = part.member.ranks[slot]
            if part.lora.rank > room:
                reason = f"rank {part.lora.rank}, slot {slot} has {room} for {part.member.path}"
                reasons[id(pair)] = Refusal("slot rank", reason)
        if id(pair) not in reasons:
            loras |= {part.member.path: part.lora for part in parts}
    _refuse(found, adapter, reasons)
    return loras


def _by_module(pairings: Iterable[Pairing]) -> list[tuple[ExposedModule, list[Pairing]]]:
    """Group pairings by their tensors, in the adapter's order; members in the pack's order."""
    groups: defaultdict[str, list[Pairing]] = defaultdict(list)
    for pair in pairings:
        groups[pair.module.name].append(pair)
    return [(group[0].module, sorted(group, key=lambda pair: pair.member.start)) for group in groups.values()]


def _all_tensors(
    found: Matches, weight_of: WeightOf | None, caster: Caster
) -> tuple[dict[str, Array], dict[str, int]]:
    """Return all tensors of a swap graph that the matches fill, and `ExposedModule.name` → their rank."""
    tensors: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for module, pairings in _by_module(found.pairings):
        rank = sum(pair.lora.rank for pair in pairings)
        if module.rank > rank:
            found.notes.append(f"{module.name}: rank {rank}, padded with zeros to the graph's {module.rank}")
        ranks[module.name] = module.rank or rank
        tensors |= _tensors(module, pairings, ranks[module.name], weight_of=weight_of, caster=caster)
    return tensors, ranks


def _tensors(
    module: ExposedModule,
    pairings: Sequence[Pairing],
    rank: int,
    weight_of: WeightOf | None,
    caster: Caster,
) -> dict[str, Array]:
    """Make the tensors of a module or pack, with ``rank`` as their rank."""
    blocks, offset = [], 0
    for pair in pairings:
        factors = caster.factors(pair.lora, dtype_of(module.dtype))
        blocks += blocks_of_factors(module, pair.member, factors=factors, offset=offset, total=rank)
        offset += pair.lora.rank
    a, b = assemble(module, rank, blocks)
    tensors = {module.lora_a: a} | cut_b(module, b)
    if module.bias:
        parts = [(pair.member, pair.lora) for pair in pairings]
        tensors[module.lora_bias] = joined_bias(module, parts, caster)
    if any(pair.has_dora for pair in pairings):
        tensors[module.scale] = _scale(module, pairings, weight_of, caster)
    return tensors


def _scale(
    module: ExposedModule, pairings: Sequence[Pairing], weight_of: WeightOf | None, caster: Caster
) -> Array:
    """Return DoRA's factor of every output of a pack: 1 for members without DoRA."""
    dtype = dtype_of(module.dtype)
    scale = np.ones(module.out_dim, dtype)
    for pair in pairings:
        lora, member = pair.lora, pair.member
        factor = lora.scale
        if factor is None and lora.magnitude is not None:
            assert weight_of is not None
            try:
                factor = dora_factor(lora, member, weight_of, wide_of(dtype))
            except ValueError as error:
                caster.problems.append(f"{lora.path}: {error}")
        if factor is not None:
            rows = slice(member.start, member.start + member.out_dim)
            scale[rows] = caster.vector(factor, dtype, f"{lora.path} DoRA's factor")
    return scale


def _finish(
    adapter: Adapter,
    exposed: LoraRecord,
    found: Matches,
    caster: Caster,
    where: str,
    allow_unmatched: bool,
    warnings: Sequence[str],
) -> Plan:
    """Raise one error with all problems, or return the plan with its notes, ``warnings`` first."""
    placed = [row for pair in found.pairings for row in pair.rows(adapter.name)]
    rows = [*placed, *found.unchanged, *found.refused]
    order = {name: place for place, name in enumerate(adapter.tensor_names)}
    rows.sort(key=lambda row: min((order[name] for name in row.tensors if name in order), default=0))
    refused = [row for row in rows if row.action == "refused"]
    if refused and not (allow_unmatched and found.pairings):
        _raise_refused(adapter, exposed, where=where, rows=rows, found=found, more=caster.problems)
    if caster.problems:
        raise AdapterError(
            f"adapter '{adapter.name}' has values that can't be used with {where}",
            "train or save it again with finite values; a float32 or bfloat16 graph takes larger values",
            _listed(caster.problems),
        )
    lost = unaccounted(adapter.tensor_names, rows)
    if lost:
        raise SiteError(f"adapter '{adapter.name}' has tensors that are missing from the plan", "", lost)
    notes = [*warnings, *found.notes, *caster.notes()]
    if refused:
        left = ", ".join(row.parameter for row in refused[:4]) + (", …" if len(refused) > 4 else "")
        notes.append(f"left out {len(refused)} of {len(rows)} parameters: {left}")
    return Plan(tuple(rows), tuple(notes))


def _raise_refused(
    adapter: Adapter,
    exposed: LoraRecord,
    where: str,
    rows: Sequence[PlanRow],
    found: Matches,
    more: Sequence[str],
) -> None:
    refused, count = [row for row in rows if row.action == "refused"], len(rows)
    kinds = {row.kind for row in refused}
    lines = _listed([*(f"{row.parameter}  {row.reason}" for row in refused), *more])
    if len(refused) == count and kinds <= {"not exposed", "not found"} and not found.hints:
        raise SiteError(
            f"adapter '{adapter.name}' was made for another model, or for modules that {where} does not "
            f"expose: none of its {count} parameters has a place",
            f"check the base; if it is the right one, {remake(exposed.mode)}",
            lines,
        )
    doubled = {row.parameter for row in refused if row.kind == "double"}
    situation = Situation(
        into="bank graph" if exposed.mode == "bank" else "swap graph",
        some=bool(found.pairings),
        given=found.hints,
        parting=how_to_part(adapter, doubled) if doubled else "",
    )
    hints = hints_of(kinds, situation)
    refuse(f"adapter '{adapter.name}'", where, lines, hints, count=len(refused), total=count)


def _listed(lines: Sequence[str]) -> list[str]:
    if len(lines) <= _MAX_LISTED:
        return list(lines)
    return [*lines[:_MAX_LISTED], f"… and {len(lines) - _MAX_LISTED} more"]
