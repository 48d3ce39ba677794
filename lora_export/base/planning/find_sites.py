"""Find an adapter's sites in a checkpoint: make the plan, and patches that are computed when written.

A stored weight can have one of these layouts, compared with the module's canonical one:

- as it is (`nn.Linear`, convolutions, embeddings);
- transposed: GPT-2's Conv1D stores ``(in_dim, out_dim)``. Shapes tell, and for square ones the model's
  family (`lora_export.base.checkpoint.families`);
- experts stacked in one tensor, or one tensor for each expert and half;
- as codes with scales (`lora_export.base.checkpoint.quantised`);
- not at all: an output head that is tied to the input embedding. PEFT's `merge_and_unload` adds the head's
  change to the one shared parameter, so that the embedding changes as well, which the trained adapter
  never did (PEFT warns of it). Here the head becomes a tensor of its own and the config says
  ``tie_word_embeddings: false``; the same happens if only the embedding is changed, so that the head stays as
  it is (`lora_export.base.ties.tied_changes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule, TokenRows
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import StoredPart
from lora_export.base.checkpoint.quantised import Quantised, quantised_notes
from lora_export.base.checkpoint.vocabulary import grows, resize_hint, rows_hint
from lora_export.base.history.history import MANIFEST
from lora_export.base.planning.checkpoint_plan import AddedTensor, CheckpointPlan, NoSite, view_of
from lora_export.base.planning.fit import Fitted, fit_own_matrix, fit_weight
from lora_export.base.planning.ledger import Ledger
from lora_export.base.planning.lookup import Lookup
from lora_export.base.planning.settle import settle
from lora_export.base.ties.copies import UNCHANGED, Copied, are_judged, is_same, spread_copies, untrained_note
from lora_export.formats.reading.scope import SHARED
from lora_export.formats.reading.whole_copies import Reach, copy_reach
from lora_export.formats.schemes import fitted
from lora_export.plan import Plan, PlanRow, Refusal, unaccounted
from lora_export.sites.experts import settle_layout
from lora_export.sites.grouped import grouped_dora
from lora_export.sites.kinds import settle_kinds, unsettled_kind
from lora_export.sites.naming.names import Named
from lora_export.storage.patch import Patch, Placement, patch_from, replacement

_BIAS_IN_GRAPH = (
    "merge it into a graph (lora-export merge-onnx), where the product gets a bias, or keep it beside the "
    "weights (swap-onnx)"
)


@dataclass(frozen=True)
class _Settled:
    """Result for one parameter.

    Attributes:
        tensors: Names of the stored tensors.
        layout: Layout of the canonical weight in them.
        reason: Evidence for the site.
        is_unchanged: True if the base holds the same values already.
    """

    tensors: list[str]
    layout: str = ""
    reason: str = ""
    is_unchanged: bool = False


def plan_checkpoint(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    quantised: Quantised,
    resize: bool | None = None,
    shared: bool | None = None,
) -> CheckpointPlan:
    """Find the sites of adapters in a checkpoint; parameters without one are ``refused`` in the plan.

    Args:
        checkpoint: The base.
        adapters: Adapters to merge.
        weights: Factor of each adapter's ΔW.
        quantised: The base's quantised weights.
        resize: Give the base the rows for new tokens that an adapter holds; None if there is no such option.
        shared: True if the command's options hold for other adapters too; by default, if there are several.
    """
    shared = len(adapters) > 1 if shared is None else shared
    judged = are_judged(weights, checkpoint.folder / MANIFEST)
    planner, notes = _Planner(checkpoint, quantised, resize, judged), list[str]()
    for given, weight in zip(adapters, weights, strict=True):
        adapter = planner.settled(fitted(given, checkpoint.tensors, notes))
        start = len(planner.rows)
        planner.begin(adapter, weight, shared)
        for path, values in adapter.extras.items():
            names: tuple[str, ...] = (adapter.extra_tensors.get(path, path),)
            act = partial(planner.replaced, path, values, adapter)
            planner.add(adapter, path, tensors=names, action="replace", act=act)
        for path, rows in adapter.token_rows.items():
            act = partial(planner.rows_replaced, path, rows, adapter)
            planner.add(adapter, path, tensors=(rows.tensor_name,), action="replace", act=act)
        for module in adapter.modules.values():
            path = f"{module.path}.{module.parameter}"
            act = partial(planner.merged, module, adapter, weight)
            planner.add(adapter, path, tensors=module.weight_tensors, action="merge", act=act)
            if module.lora_bias is not None:
                act = partial(planner.bias_added, module, adapter, weight)
                bias = f"{module.path}.bias"
                planner.add(adapter, bias, tensors=module.bias_tensors, action="add to bias", act=act)
        lost = unaccounted(adapter.tensor_names, planner.rows[start:])
        unruled = Refusal("operator", "no rule for it")
        planner.rows.extend(PlanRow.refused(adapter.name, name, (name,), unruled) for name in lost)
    return planner.finish(notes)


class _Planner:
    """Collector of the plan's rows and changes of all adapters for one checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, quantised: Quantised, resize: bool | None, judged: bool
    ) -> None:
        self._checkpoint, self._are_judged = checkpoint, judged
        self._copied: list[Copied] = []
        self._warnings: list[str] = []
        self._owner, self._weight = -1, 1.0
        self._quantised, self._resize = quantised, resize
        self._ledger = Ledger(checkpoint=checkpoint)
        self._lookup = Lookup(checkpoint, quantised, self._ledger)
        self._stacked: set[str] = set()
        self._hints: list[str] = []
        self._notes: list[str] = []

    @property
    def rows(self) -> list[PlanRow]:
        """Rows of the plan so far."""
        return self._ledger.rows

    def begin(self, adapter: Adapter, weight: float, shared: bool) -> None:
        """Find the base's names for one adapter's parameters: one change of names holds for all."""
        self._ledger.begin(adapter)
        self._owner, self._weight = self._owner + 1, weight
        renaming = self._lookup.begin(adapter)
        if renaming.note:
            self._notes.append(f"adapter '{adapter.name}': paths matched with {renaming.note}")
        if hint := renaming.hint:
            self._hints += [f"for '{adapter.name}': {hint}", SHARED] if shared else [hint]

    def settled(self, adapter: Adapter) -> Adapter:
        """Return the adapter with the layout of this base's experts, and the kinds of its modules."""
        adapter, notes = settle_layout(adapter, self._lookup.held)
        adapter, kinds = settle_kinds(adapter, self._lookup.held, self._lookup.stored)
        self._notes += [*notes, *kinds]
        return adapter

    def add(
        self,
        adapter: Adapter,
        parameter: str,
        tensors: tuple[str, ...],
        action: str,
        act: Callable[[], _Settled],
    ) -> None:
        """Add one row of the plan; ``act`` registers the change and returns its site."""
        copies = len(self._copied)
        try:
            done = act()
        except NoSite as problem:
            # Withdraw parts that were registered before the one without a site.
            self._ledger.drop({len(self.rows)})
            del self._copied[copies:]
            self._hints += [problem.refusal.hint] * bool(problem.refusal.hint)
            self.rows.append(PlanRow.refused(adapter.name, parameter, tensors, problem.refusal))
            return
        shown = ", ".join(done.tensors[:2]) + (f", … ({len(done.tensors)})" if len(done.tensors) > 2 else "")
        row = PlanRow(
            adapter=adapter.name,
            parameter=parameter,
            tensors=tensors,
            action="unchanged" if done.is_unchanged else action,
            place=shown,
            layout=done.layout,
            reason=UNCHANGED if done.is_unchanged else done.reason,
        )
        self.rows.append(row)

    def finish(self, notes: Sequence[str]) -> CheckpointPlan:
        """Settle tied and resized weights, and return the plan with its changes."""
        ledger = self._ledger
        settled = settle(ledger, self._lookup.may_be_tied, lambda: self._lookup.ties, self._quantised)
        changes = {name: [c.make for c in changes] for name, changes in ledger.changes.items() if changes}
        notes = [*notes, *self._notes, *settled.notes, *quantised_notes(self._quantised, changes)]
        return CheckpointPlan(
            quantised=self._quantised,
            plan=Plan(tuple(ledger.rows), tuple(notes), tuple(self._warnings)),
            changes=changes,
            stacked=self._stacked,
            added=[AddedTensor(name, source) for name, source in settled.parted],
            untied=settled.untied,
            absent=self._lookup.absent,
            resized=ledger.resized,
            vocabulary=settled.vocabulary,
            hints=tuple(dict.fromkeys([*self._hints, *ledger.hints])),
            copied=[*self._copied, *spread_copies(self._copied, settled.copies)],
        )

    # --- one method for each kind of change

    def replaced(self, path: str, values: Array, adapter: Adapter) -> _Settled:
        """Replace a parameter by whole values."""
        name, reason = self._lookup.single(Named(path, "replace"), values.shape)
        tensor = self._ledger.tensor(name)
        if tensor.shape != values.shape:
            may_grow = self._resize and name not in self._quantised.scaled
            if not (may_grow and grows(path, tensor.shape, values.shape)):
                raise NoSite(
                    Refusal(
                        "shape",
                        f"stored with shape {tensor.shape}, the adapter's values have {values.shape}",
                        self._rows_hint(path, tensor.shape, values.shape),
                    )
                )
            self._ledger.resized[name] = values.shape
        source = self._ledger.sources.get(name, name)
        held = self._quantised.values(source) if source not in self._quantised.refused else None
        if held is not None and self._are_judged and is_same(values, held):
            return _Settled([name], is_unchanged=True)
        if held is not None and (warning := untrained_note(adapter, path, values, held)):
            self._warnings.append(warning)
        self._copied.append(
            Copied(
                place=name,
                stored=name,
                parameter=path,
                adapter=adapter.name,
                owner=self._owner,
                weight=self._weight,
                values=values,
            )
        )
        matrix = values.reshape(view_of(values.shape, name in self._stacked))
        reach = copy_reach(adapter, path)
        if reach == "unknown" and held is not None and is_same(values, held):
            reach = "all"
        self._ledger.add(name, lambda _: replacement(path, matrix), reach, is_copy=True)
        return _Settled([name], reason=reason)

    def rows_replaced(self, path: str, rows: TokenRows, adapter: Adapter) -> _Settled:
        """Replace single rows of an embedding, and of weights that are tied to it."""
        name, reason = self._lookup.single(Named(path, "replace rows"))
        shape = self._ledger.tensor(name).shape
        if shape[1:] != rows.values.shape[1:]:
            raise NoSite(
                Refusal(
                    "shape",
                    f"stored with shape {shape}, the adapter's rows have {rows.values.shape[1]} values",
                )
            )
        if max(rows.indices) >= shape[0]:
            wanted = max(rows.indices) + 1
            raise NoSite(Refusal("shape", f"row {wanted - 1} of {shape[0]}", resize_hint(wanted)))
        if self._are_judged and self._holds_rows(name, rows):
            return _Settled([name], f"{len(rows.indices)} rows", is_unchanged=True)
        self._copied.append(
            Copied(
                place=name,
                stored=name,
                parameter=path,
                adapter=adapter.name,
                owner=self._owner,
                weight=self._weight,
                row_count=len(rows.indices),
            )
        )
        for first, values in rows.runs():
            self._ledger.add(name, partial(_replaced, path, values, first), "all")
        return _Settled([name], f"{len(rows.indices)} rows", reason)

    def _holds_rows(self, name: str, rows: TokenRows) -> bool:
        """Return True if the base has these rows already; False if it can't be read."""
        source = self._ledger.sources.get(name, name)
        if name in self._ledger.resized or source in self._quantised.refused:
            return False
        return is_same(rows.values, self._quantised.values(source)[list(rows.indices)])

    def bias_added(self, module: LoraModule, adapter: Adapter, weight: float) -> _Settled:
        """Add the scaled bias of lora_B to the module's own bias."""
        assert module.lora_bias is not None
        path, bias = f"{module.path}.bias", module.lora_bias
        try:
            name, reason = self._lookup.single(Named(path, "add to bias", module.component))
        except NoSite as problem:
            if problem.refusal.kind != "not found":
                raise
            why = "lora_bias needs a bias to be added to, and the base has none here"
            raise NoSite(Refusal("not found", why, _BIAS_IN_GRAPH)) from None
        if self._ledger.tensor(name).shape != bias.shape:
            shape = self._ledger.tensor(name).shape
            raise NoSite(Refusal("shape", f"{name} has shape {shape}, lora_bias {bias.shape}"))

        def make(dtype: type[Any]) -> Patch:
            row = bias.astype(dtype)[None, :] * dtype(weight * module.scaling)
            return Patch(
                label=path, row=0, col=0, height=1, width=bias.size, left=np.ones((1, 1), dtype), right=row
            )

        self._ledger.add(name, make)
        self._copied.append(
            Copied(
                place=name,
                stored=name,
                parameter=path,
                adapter=adapter.name,
                owner=self._owner,
                weight=weight,
            )
        )
        return _Settled([name], reason=reason)

    def merged(self, module: LoraModule, adapter: Adapter, weight: float) -> _Settled:
        """Add ΔW to the stored weight of the module, or to each part of it."""
        if module.groups > 1:
            raise NoSite(
                grouped_dora(module)
                or Refusal(
                    "branch only",
                    f"a convolution of {module.groups} groups can't be merged (PEFT refuses it, too)",
                )
            )
        parts = self._lookup.parts(Named(f"{module.path}.{module.parameter}", "merge", module.component))
        rows, _ = module.matrix_shape
        experts = {part.expert for part in parts}
        if None not in experts and len(experts) != module.experts:
            raise NoSite(
                Refusal("shape", f"the base has {len(experts)} experts, the adapter {module.experts}")
            )
        layouts = []
        for part in parts:
            index, count = part.piece
            if rows % count:
                raise NoSite(Refusal("shape", f"{rows} rows can't be cut into {count} equal tensors"))
            span = (rows // count * index, rows // count * (index + 1))
            placements, layout = self._fit(module, adapter, part, span)
            layouts.append(layout)
            for placement in placements:
                reach: Reach = "all" if module.everywhere else "one"
                self._ledger.add(part.tensor, partial(_make, module, placement, weight), reach)
            self._copied.append(
                Copied(
                    place=part.tensor,
                    stored=part.tensor,
                    parameter=module.key,
                    adapter=adapter.name,
                    owner=self._owner,
                    weight=weight,
                    is_dora=module.magnitude is not None,
                )
            )
        return _Settled([part.tensor for part in parts], layouts[0], parts[0].reason)

    def _fit(self, module: LoraModule, adapter: Adapter, part: StoredPart, span: tuple[int, int]) -> Fitted:
        """Return the placements of canonical rows ``span`` in a stored tensor; raise NoPlace if none fits."""
        if refusal := unsettled_kind(module, self._lookup.held):
            raise NoSite(refusal)
        tensor = self._ledger.tensor(part.tensor)
        if module.kind != "parameter":
            return fit_weight(
                module,
                part,
                span,
                tensor,
                config=self._checkpoint.config,
                fan_in_fan_out=adapter.fan_in_fan_out,
                may_resize=self._resize is False,
            )
        held = self._lookup.held(f"{module.path}.{module.parameter}")
        placed = fit_own_matrix(module, part, span, tensor=tensor, held=held)
        if part.expert is None and module.experts > 1:
            self._stacked.add(tensor.name)
        return placed

    def _rows_hint(self, path: str, shape: tuple[int, ...], seen: tuple[int, ...]) -> str:
        return rows_hint(self._checkpoint.config, path, shape, seen, may_resize=self._resize is False)


def _make(module: LoraModule, placement: Placement, weight: float, dtype: type[Any]) -> Patch:
    return patch_from(module, placement, weight, dtype)


def _replaced(path: str, values: Array, row: int, _: type[Any]) -> Patch:
    return replacement(path, values, row)
