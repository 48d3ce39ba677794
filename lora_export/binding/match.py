"""Pair the targets of an adapter with the tensors of a graph with exposed LoRA, and check that they fit.

A whole parameter that the adapter replaces fits if the graph has tensors for its module: they take the change
from the base's values, which are read from the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_export.adapter import EVERYWHERE, MERGE_ROWS, Adapter, Array, Kind, LoraModule, token_rows_problems
from lora_export.binding.base_weights import WeightOf, has_constant, holds, read_stored
from lora_export.binding.paths import Place, SiteFinder
from lora_export.formats.reading.saved import change_of, with_bias
from lora_export.formats.schemes import fitted
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member, StoredRows, path_of
from lora_export.plan import PlanRow, Refusal
from lora_export.sites.grouped import grouped_dora
from lora_export.sites.kinds import as_seen
from lora_export.sites.matrices import embedding_of, linear_of
from lora_export.sites.whole import is_like_transpose

_ABSENT = ("not exposed", "not found")
_UNKNOWN = Refusal("not found", "the graph has no parameter of this name")
_UNREAD = Refusal("merge only", "replaces the whole parameter, whose values in the base can't be told")
_EITHER_WAY = Refusal(
    "unproven",
    "replaces a whole square matrix, and neither the graph's LoRA record nor its values say whether the "
    "module stores it transposed, as transformers' Conv1D does",
    "make the graph with this adapter and --checkpoint BASE_DIR (swap-onnx or bank-onnx)",
)
_REPLACED = Refusal("merge only", "replaces the whole parameter, which the graph keeps as a constant")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairing:
    """Module of an adapter and its site.

    Attributes:
        lora: The trained factors.
        module: The pair of tensors of the graph.
        member: The module of the base; for a whole pack one that stands for all of them.
        how: Assumptions about names, for the plan.
        from_base: True if it has the change from the base's values to a whole parameter.
    """

    lora: LoraModule
    module: ExposedModule
    member: Member
    how: str = ""
    from_base: bool = False

    @property
    def has_dora(self) -> bool:
        """True if the module's product has a factor."""
        return self.lora.has_dora

    @property
    def whole(self) -> bool:
        """True if the factors are those of a pack of several modules."""
        return self.member not in self.module.members

    def rows(self, adapter: str) -> list[PlanRow]:
        """Return the plan's rows for its weight, and for its bias if it has one."""
        lora, module = self.lora, self.module
        part = f"outputs {self.member.start}–{self.member.start + self.member.out_dim} of a pack"
        weight = PlanRow(
            adapter=adapter,
            parameter=f"{lora.path}.{lora.parameter}",
            tensors=lora.weight_tensors,
            action="expose",
            place=", ".join([module.lora_a, *(name for name, _, _ in module.b_parts)]),
            operator=module.kind,
            layout=part if self.member.out_dim < module.out_dim else "",
            reason=self.how or "path",
        )
        if lora.lora_bias is None:
            return [weight]
        bias = replace(
            weight, parameter=f"{lora.path}.bias", tensors=lora.bias_tensors, place=module.lora_bias
        )
        return [weight, bias]


@dataclass(kw_only=True)
class Matches:
    """Result of `match_modules`.

    Attributes:
        pairings: Modules with a site.
        unchanged: Whole parameters that the base holds already, and what the other graph of the model has.
        refused: Plan rows of parameters without a site, with the reason.
        notes: Assumptions.
        hints: Hints for parameters without a site that are more exact than those of the refusal's kind.
    """

    pairings: list[Pairing] = field(default_factory=list)
    unchanged: list[PlanRow] = field(default_factory=list)
    refused: list[PlanRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def elsewhere(self, adapter: str, parameter: str, tensors: Sequence[str]) -> None:
        """Add a parameter that the other graph of the model exposes."""
        self.unchanged.append(
            PlanRow(
                adapter=adapter,
                parameter=parameter,
                tensors=tuple(tensors),
                action="elsewhere",
                reason="the other graph of the model has it",
            )
        )

    def refuse(self, adapter: str, parameter: str, tensors: Sequence[str], refusal: Refusal) -> None:
        """Add a parameter without a site."""
        self.refused.append(PlanRow.refused(adapter, parameter, tensors, refusal))
        if refusal.hint and refusal.hint not in self.hints:
            self.hints.append(refusal.hint)


def is_elsewhere(path: str, exposed: LoraRecord) -> bool:
    """Return whether a module of an adapter is one that the other graph of the model exposes."""
    return any(
        f".{path}".endswith(f".{other}") or f".{other}".endswith(f".{path}") for other in exposed.elsewhere
    )


def match_modules(adapter: Adapter, exposed: LoraRecord, where: str, weight_of: WeightOf | None) -> Matches:
    """Pair the targets of an adapter with a graph's modules; each target without a site gets a reason.

    Args:
        adapter: The adapter to match.
        exposed: The graph's LoRA record.
        where: The graph's file, for reasons.
        weight_of: The graph's constants; without them every whole parameter is refused.
    """
    notes: list[str] = []
    known = {f"{member.path}.weight" for _, member in exposed.members()}
    names: Callable[[], Collection[str]] = getattr(weight_of, "names", tuple)

    def others() -> Collection[str]:
        return (*names(), *exposed.landmarks)

    adapter = fitted(adapter, known, notes, others=others)
    finder = SiteFinder(adapter, exposed, where, others)
    found = Matches(notes=notes, hints=[finder.hint] if finder.hint else [])
    found.notes += finder.notes
    for path, problem in token_rows_problems(adapter):
        tensors = (adapter.token_rows[path].tensor_name,)
        found.refuse(adapter.name, path, tensors, Refusal("merge only", problem, MERGE_ROWS))
    for lora in adapter.modules.values():
        key = f"{lora.path}.{lora.parameter}"
        place = finder.find(path_of(key), lora.component)
        if isinstance(place, Place):
            seen = as_seen(lora, place.module.kind)
            place, lora = (seen, lora) if isinstance(seen, Refusal) else (place, seen)
        place = _unsupported(lora, exposed) or place
        if isinstance(place, Place) and lora.kind == "parameter":
            made = _as_used(lora, place)
            place, lora = (made, lora) if isinstance(made, Refusal) else (place, made)
        if isinstance(place, Place):
            lora = _as_exposed(lora, place.module)
            place = _misfit(lora, place) or place
        if isinstance(place, Refusal):
            if place.kind in _ABSENT and is_elsewhere(lora.path, exposed):
                found.elsewhere(adapter.name, key, lora.tensor_names)
            else:
                _refuse_module(adapter, lora, place, found)
            continue
        if lora.lora_bias is not None and (reason := _no_bias(lora, place.module)):
            found.refuse(adapter.name, f"{lora.path}.bias", lora.bias_tensors, reason)
            lora = replace(lora, lora_bias=None, tensor_names=lora.weight_tensors)
        found.pairings.append(Pairing(lora=lora, module=place.module, member=place.member, how=place.how))
    _place_replaced(adapter, finder, found, weight_of, exposed=exposed)
    _drop_conflicts(adapter, found)
    return found


def split_pack(pairing: Pairing) -> list[Pairing] | Refusal:
    """Cut a whole pack's factors into its members'; return a refusal if that is impossible.

    Each rank's column of B must lie within one member; a column of zeros changes nothing and is omitted.
    """
    lora, module = pairing.lora, pairing.module
    used = np.stack([
        (lora.lora_b[member.start : member.start + member.out_dim] != 0).any(axis=0)
        for member in module.members
    ])  # fmt: skip
    if (used.sum(axis=0) > 1).any():
        return Refusal("mixed", "its B mixes the modules of the pack")
    parts = []
    for member, columns in zip(module.members, used, strict=True):
        rows = slice(member.start, member.start + member.out_dim)
        bias = None if lora.lora_bias is None else lora.lora_bias[rows]
        if not columns.any() and (bias is None or not bias.any()):
            continue
        # Only a bias is left: a column that is zero here carries it.
        columns = columns if columns.any() else np.arange(len(columns)) == 0
        rank = int(columns.sum())
        part = replace(
            lora,
            path=member.path,
            lora_a=lora.lora_a[columns],
            lora_b=lora.lora_b[rows][:, columns],
            rank=rank,
            alpha=lora.scaling * rank,
            rslora=False,
            lora_bias=bias,
        )
        parts.append(Pairing(lora=part, module=module, member=member, how=pairing.how))
    return parts


def _unsupported(lora: LoraModule, exposed: LoraRecord) -> Refusal | None:
    """Return the reason why no graph of this kind can take a module; None if one can."""
    if lora.experts > 1:
        return Refusal(
            "merge only", f"stacked experts ({lora.experts}) have no tensors of their own in the graph"
        )
    if lora.everywhere:
        return Refusal("merge only", EVERYWHERE)
    if not lora.has_dora or exposed.dora:
        return None
    return Refusal(
        "dora",
        "DoRA's factor can't differ by row"
        if exposed.mode == "bank"
        else "DoRA, and the graph has no factors",
    )


def _as_exposed(lora: LoraModule, module: ExposedModule) -> LoraModule:
    """Return the factors in the graph's form: a Linear may be a 1×1 convolution there, or the reverse."""
    ones = module.kind in ("linear", "conv") and all(size == 1 for size in module.kernel)
    return lora.with_kernel(len(module.kernel)) if ones and module.groups == 1 and lora.is_pointwise else lora


def _as_used(lora: LoraModule, place: Place) -> LoraModule | Refusal:
    """Return the change of a module's own matrix as the graph uses it, or the reason why that is unknown.

    A shape that is not square tells it; else the LoRA record, or a weight that kept its name.
    """
    module, member = place.module, place.member
    if module.kind == "conv":
        reason = f"the adapter changes a matrix {lora.matrix_shape}, the graph has a convolution"
        return Refusal("shape", reason)
    sizes = (member.out_dim, module.in_dim)
    canonical = sizes[::-1] if module.kind == "embedding" else sizes
    turned = member.held_turned
    if canonical[0] != canonical[1]:
        turned = lora.matrix_shape != canonical
    elif turned is None:
        turned = _kept_turned(f"{lora.path}.{lora.parameter}", member)
    if turned is None:
        return Refusal(
            "not exposed",
            f"the matrix is square {lora.matrix_shape}, and the graph's LoRA record doesn't say whether the "
            "module holds its transpose",
        )
    return embedding_of(lora, turned) if module.kind == "embedding" else linear_of(lora, turned)


def _kept_turned(name: str, member: Member) -> bool | None:
    """Return whether a module holds its matrix turned, if the graph keeps the matrix's name; else None."""
    named = [rows for rows in member.stored if rows.weight == name or name.endswith(f".{rows.weight}")]
    return named[0].transposed if named and len(named) == len(member.stored) else None


def _misfit(lora: LoraModule, place: Place) -> Refusal | None:
    """Return the reason why the factors don't fit their site; None if they do."""
    module = place.module
    if refusal := grouped_dora(lora):
        return refusal
    kind = lora.kind
    if kind != module.kind:
        return Refusal("shape", f"the adapter has a {kind} module, the graph a {module.kind} one")
    seen = (*lora.lora_a.shape[1:], lora.lora_b.shape[0])
    wanted = (module.in_dim, *module.kernel, place.member.out_dim)
    if seen != wanted:
        dims = "(in_dim, kernel…, out_dim)" if module.kind == "conv" else "(in_dim, out_dim)"
        return Refusal("shape", f"shapes differ: {dims} {seen}, the graph has {wanted}")
    if module.kind == "conv" and lora.groups != module.groups:
        reason = f"lora_B has {lora.groups} groups, the graph's convolution {module.groups}"
        return Refusal("shape", reason)
    return None


def _no_bias(lora: LoraModule, module: ExposedModule) -> Refusal | None:
    """Return the reason why the graph can't take a bias of the branch; None if it can."""
    if not module.bias:
        return Refusal("not exposed", "lora_bias: the graph has no tensor for a bias of lora_B")
    if lora.has_dora:
        reason = "lora_bias: its module has DoRA, whose factor would scale the bias as well"
        return Refusal("merge only", reason)
    return None


def _refuse_module(adapter: Adapter, lora: LoraModule, refusal: Refusal, found: Matches) -> None:
    parameters = [(f"{lora.path}.{lora.parameter}", lora.weight_tensors)]
    if lora.lora_bias is not None:
        parameters.append((f"{lora.path}.bias", lora.bias_tensors))
    for key, tensors in parameters:
        found.refuse(adapter.name, key, tensors, refusal)


def _place_replaced(
    adapter: Adapter,
    finder: SiteFinder,
    found: Matches,
    weight_of: WeightOf | None,
    *,
    exposed: LoraRecord,
) -> None:
    """Pair whole parameters; weights first, because a bias needs its module's pairing.

    PEFT saves whole embeddings together with LoRA on them; untrained ones change nothing.
    """
    for key, values in sorted(adapter.extras.items(), key=lambda extra: extra[0].endswith(".bias")):
        path, _, leaf = key.rpartition(".")
        tensors = (adapter.extra_tensors.get(key, key),)
        place = finder.find(path)
        member = place.member if isinstance(place, Place) else Member(path=path, start=0, out_dim=0)
        stored = member.stored_bias if leaf == "bias" else member.stored
        forms = _stored_forms(values, place)
        if weight_of is not None and any(holds(form, stored, key, weight_of) for form in forms):
            reason = "the base holds the same values"
            found.unchanged.append(
                PlanRow(
                    adapter=adapter.name, parameter=key, tensors=tensors, action="unchanged", reason=reason
                )
            )
            continue
        if isinstance(place, Refusal) and is_elsewhere(path, exposed):
            found.elsewhere(adapter.name, key, tensors)
            continue
        refusal = _replace_one(found, place, key=key, values=values, weight_of=weight_of, tensors=tensors)
        if refusal:
            found.refuse(adapter.name, key, tensors, refusal)


def _stored_forms(values: Array, place: Place | Refusal) -> list[Array]:
    """Return a whole parameter as it is, and turned if its module may store it so (transformers' Conv1D)."""
    if isinstance(place, Refusal) or place.module.kind != "linear" or values.ndim != 2:
        return [values]
    size = (place.member.out_dim, place.module.in_dim)
    turned = place.member.held_turned if size[0] == size[1] else values.shape != size
    return [values, values.T] if turned is None else [values.T if turned else values]


def _replace_one(
    found: Matches,
    place: Place | Refusal,
    key: str,
    values: Array,
    weight_of: WeightOf | None,
    tensors: tuple[str, ...],
) -> Refusal | None:
    """Add a whole parameter to the pairings, or return the reason why that is impossible."""
    path, _, leaf = key.rpartition(".")
    index = next((n for n, pair in enumerate(found.pairings) if pair.lora.path == path), None)
    if isinstance(place, Refusal):
        unknown = weight_of is not None and not has_constant(key, weight_of)
        return _UNKNOWN if unknown else _REPLACED
    stored = place.member.stored_bias if leaf == "bias" else place.member.stored
    if weight_of is None or not stored:
        return _REPLACED
    if leaf == "bias" and index is not None:
        pair = found.pairings[index]
        changed = _bias_change(pair, values, weight_of, tensors)
        if isinstance(changed, Refusal):
            return changed
        found.pairings[index] = replace(pair, lora=changed, from_base=True)
        return None
    if leaf != "weight" or index is not None:
        return _REPLACED
    lora = _weight_change(path, place, values=values, weight_of=weight_of, tensors=tensors)
    if isinstance(lora, Refusal):
        return lora
    refusal = _misfit(lora, place)
    if refusal is None:
        found.pairings.append(
            Pairing(lora=lora, module=place.module, member=place.member, how=place.how, from_base=True)
        )
    return refusal


def _weight_change(
    path: str, place: Place, values: Array, weight_of: WeightOf, tensors: tuple[str, ...]
) -> LoraModule | Refusal:
    module, size = place.module, (place.member.out_dim, place.module.in_dim)
    if any(length != 1 for length in module.kernel) or module.groups > 1:
        return _REPLACED
    wanted = size[::-1] if module.kind == "embedding" else size
    if module.kind == "linear" and values.ndim == 2 and values.shape == wanted[::-1] != wanted:
        values = values.T
    if values.shape[:2] != wanted or values.size != wanted[0] * wanted[1]:
        return Refusal("shape", f"shapes differ: {values.shape}, the graph has {wanted}")
    old = _values_of(place.member.stored, wanted, weight_of)
    if isinstance(old, Refusal):
        return old
    if module.kind != "embedding" and values.ndim == 2 and wanted[0] == wanted[1]:
        turned = _copy_turned(f"{path}.weight", place.member, values, old)
        if turned is None:
            return _EITHER_WAY
        values = values.T if turned else values
    kind: Kind = "embedding" if module.kind == "embedding" else "linear"
    return _as_exposed(
        change_of(path, kind, new=values.reshape(wanted), old=old, tensor_names=tensors), module
    )


def _copy_turned(key: str, member: Member, values: Array, old: Array) -> bool | None:
    """Return whether a square module stores its weight turned: by the record, by values, by a kept name."""
    if member.held_turned is not None:
        return member.held_turned
    by_values = None if np.isnan(old).any() else is_like_transpose(values, old)
    return _kept_turned(key, member) if by_values is None else by_values


def _bias_change(
    pair: Pairing, values: Array, weight_of: WeightOf, tensors: tuple[str, ...]
) -> LoraModule | Refusal:
    if reason := _no_bias(pair.lora, pair.module):
        return reason
    size = pair.member.out_dim
    if values.shape != (size,):
        return Refusal("shape", f"shapes differ: {values.shape}, the graph has {(size,)}")
    old = _values_of(pair.member.stored_bias, (size, 1), weight_of)
    if isinstance(old, Refusal):
        return old
    return with_bias(pair.lora, values.astype(np.float64) - old[:, 0], tensors)


def _values_of(stored: Sequence[StoredRows], shape: tuple[int, int], weight_of: WeightOf) -> Array | Refusal:
    """Return the base's values of a parameter, or a refusal if they are unknown."""
    try:
        return read_stored(stored, shape, weight_of)
    except KeyError:
        return _UNREAD


def _drop_conflicts(adapter: Adapter, found: Matches) -> None:
    """Refuse modules of one adapter that have the same site: they can't both be right."""
    taken = Counter((pair.module.name, pair.member.path) for pair in found.pairings)
    whole = {pair.module.name for pair in found.pairings if pair.whole}
    kept = []
    for pair in found.pairings:
        mixed = pair.module.name in whole and not pair.whole
        if taken[pair.module.name, pair.member.path] > 1 or mixed:
            reason = "ambiguous: another module of the adapter has the same place"
            _refuse_module(adapter, pair.lora, Refusal("double", reason), found)
        else:
            kept.append(pair)
    found.pairings = kept
