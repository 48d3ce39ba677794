"""Collect the branches of several adapters: one for each site, whatever the adapters call it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from lora_export.adapter import Adapter, LoraModule
from lora_export.base.planning.plan_rows import OtherValues
from lora_export.errors import SiteError
from lora_export.formats.provenance import refuse_other_bases
from lora_export.formats.schemes import fitted
from lora_export.graph.onnx_file import GraphFile
from lora_export.modes.branches.calls import Branch, Call
from lora_export.modes.branches.find_branches import find_branches
from lora_export.plan import Plan
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import Target, targets_of

_Places = frozenset[tuple[int, int, tuple[int, int]]]


class Union:
    """Collector of branches.

    Args:
        graph: The graph.
        resolver: Resolver of the graph's weights, with ``branches``.
        allow_unmatched: Leave out targets that have no site.
        dora: True if factors will be exposed as well.
        bank: True for a bank.

    Attributes:
        loras: Path of a branch → its factors, for each adapter.
    """

    def __init__(
        self,
        graph: GraphFile,
        resolver: Resolver,
        *,
        allow_unmatched: bool,
        dora: bool = False,
        bank: bool = False,
    ) -> None:
        self._graph, self._resolver = graph, resolver
        self._allow_unmatched, self._dora, self._bank = allow_unmatched, dora, bank
        self._calls: dict[int, Call] = {}
        self._by_place: dict[_Places, Branch] = {}
        self._plans: list[Plan] = []
        self._notes: list[str] = []
        self.loras: list[dict[str, LoraModule]] = []

    @property
    def branches(self) -> list[Branch]:
        """Branches in the order in which they were asked for."""
        return list(self._by_place.values())

    @property
    def known(self) -> AbstractSet[str]:
        """Parameters in the graph's names and in its checkpoint."""
        return self._resolver.known

    def add_adapters(self, adapters: Sequence[Adapter], base_sha256: str) -> None:
        """Find the sites of each adapter's modules.

        Args:
            adapters: The adapters.
            base_sha256: Hash of the base, which converted files have to match.

        Raises:
            SiteError: Targets of some adapters have no site; all are listed.
            AdapterError: A converted file is for another base.
        """
        refuse_other_bases(adapters, base_sha256)
        failed: list[SiteError] = []
        for given in adapters:
            adapter = fitted(given, self._resolver.known, self._notes)
            try:
                branches = self._place(adapter, targets_of(adapter))
            except SiteError as error:
                failed.append(error)
                continue
            self.loras.append({self._known(branch): branch.lora for branch in branches if branch.lora})
        if len(failed) == 1:
            raise failed[0]
        if failed:
            kind = next((type(error) for error in failed if isinstance(error, OtherValues)), SiteError)
            raise kind(
                f"{len(failed)} of {len(adapters)} adapters don't fit {self._graph.path.name}",
                "; ".join(dict.fromkeys(error.hint for error in failed if error.hint)),
                [line for error in failed for line in (error.message, *(f"  {p}" for p in error.problems))],
            )

    def add_targets(self, targets: Sequence[Target]) -> None:
        """Find the sites of modules that no adapter names."""
        for branch in self._place(None, targets):
            self._known(branch)

    def plan(self, notes: Sequence[str] = ()) -> Plan:
        """Return the plan with the rows of all, and further notes."""
        return Plan(
            tuple(row for plan in self._plans for row in plan.rows),
            (*self._notes, *(note for plan in self._plans for note in plan.notes), *notes),
        )

    def _place(self, adapter: Adapter | None, targets: Sequence[Target]) -> list[Branch]:
        plan, branches = find_branches(
            self._graph,
            self._resolver,
            adapter=adapter,
            targets=targets,
            calls=self._calls,
            allow_unmatched=self._allow_unmatched,
            dora=self._dora,
            bank=self._bank,
        )
        self._plans.append(plan)
        return branches

    def _known(self, branch: Branch) -> str:
        """Return the path under which the site of a branch is known."""
        places = frozenset((id(piece.call), piece.offset, piece.rows) for piece in branch.pieces)
        known = self._by_place.setdefault(places, branch)
        if branch.bias and not known.bias:
            # Only one adapter changes the bias; the others leave it as it is.
            known = replace(known, bias=True, stored_bias=branch.stored_bias)
        if branch.stored and not known.stored:
            # The others don't need the values of codes.
            known = replace(known, stored=branch.stored)
        if known.held_turned is None and branch.held_turned is not None:
            known = replace(known, held_turned=branch.held_turned)
        if branch.rank > known.rank:
            known = replace(known, lora=branch.lora)
        self._by_place[places] = known
        return known.path
