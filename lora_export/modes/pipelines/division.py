"""Divide adapters between the graphs that one model becomes.

Rules:

1. A module goes into each graph that reads its weight: cross-attention's keys and values are the
   encoder's, an embedding of both may be in both.
2. A module that all graphs lack is refused with the last one: the model does not read it.
3. The LoRA record of each graph names the modules that are in others alone, so that the same adapter binds to
   all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from lora_export.adapter import Adapter
from lora_export.errors import SiteError
from lora_export.formats.reading.scope import only_some
from lora_export.formats.schemes import fitted
from lora_export.graph.onnx_file import GraphFile
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import BaseWeights, Target, targets_of

# Kinds of misses of a module that is in another graph: neither its weight nor a reader of it is here.
_ABSENT = ("not found", "unused")
# Adapters for a graph, and the paths of the modules that are in others alone.
Share = tuple[Sequence[Adapter], Sequence[str]]


@dataclass(kw_only=True)
class Division:
    """Division of adapters between the graphs, in their order.

    Attributes:
        adapters: The adapters.
        graphs_left: Number of graphs that were not seen yet.
        allow_unmatched: Leave modules to the last graph that none has, instead of refusing them.
        taken: Paths of each adapter's targets that the graphs before have.
        lost: Paths of targets that no graph has.
    """

    adapters: Sequence[Adapter]
    graphs_left: int
    allow_unmatched: bool
    taken: list[set[str]] = field(init=False)
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with nothing taken."""
        self.taken = [set() for _ in self.adapters]

    def share(self, graph: GraphFile, weight_of: BaseWeights | None) -> Share:
        """Return what goes into the next graph, and the paths of what is in others alone.

        Args:
            graph: The graph.
            weight_of: Weights of the folder that it is from.

        Raises:
            SiteError: The graph is the last one, and there are modules that none of them has.
        """
        self.graphs_left -= 1
        finder = _Finder(graph, weight_of)
        parts, elsewhere = [], dict[str, None]()
        for given, taken in zip(self.adapters, self.taken, strict=True):
            adapter = fitted(given, finder.known, [])
            targets = targets_of(adapter)
            absent = finder.absent(adapter, targets)
            if not self.graphs_left:  # rule 2
                self._refuse_lost(given, absent - taken, len(targets))
                absent &= taken
            own = {target.path for target in targets} - absent
            taken |= own
            elsewhere |= dict.fromkeys(sorted(absent))
            if own:
                parts.append(_part(adapter, own))
        return parts, tuple(elsewhere)

    def _refuse_lost(self, adapter: Adapter, lost: set[str], count: int) -> None:
        self.lost += sorted(lost)
        if lost and not self.allow_unmatched:
            raise SiteError(
                f"adapter {adapter.name!r} has {len(lost)} modules that none of the graphs reads (of {count} "
                "parameters): the model computes without them",
                "--allow-unmatched (allow_unmatched=True) goes on without them",
                sorted(lost),
            )


class _Finder:
    """Finds which targets a graph has.

    Args:
        graph: The graph.
        weight_of: Weights of the folder that it is from.

    Attributes:
        known: Parameters in the graph's names and in its folder.
    """

    def __init__(self, graph: GraphFile, weight_of: BaseWeights | None) -> None:
        self._names, self._weight_of = graph.model.graph.initializers, weight_of
        self._by_value = Resolver(graph, weight_of, branches=True)
        # A graph of ours has its names, and a search by value for what it lacks takes minutes.
        self._by_name = Resolver(graph, None, branches=True)
        self.known = self._by_value.known

    def absent(self, adapter: Adapter, targets: Sequence[Target]) -> set[str]:
        """Return the paths of the targets that the graph lacks, or does not read."""
        own = [target for target in targets if target.key in self._names]
        # Apart from the others, for which the whole adapter might be taken for another part's.
        _, lacking = self._by_name.resolve(own, adapter.flattened, adapter.scope)
        others = [target for target in targets if target.key not in self._names]
        sites, misses = self._by_name.resolve(others, adapter.flattened, adapter.scope)
        lost = [miss.target for miss in (*lacking, *misses) if miss.kind in _ABSENT]
        # Of tied weights the graph has one name.
        if tied := self._tied(lost, adapter):
            lost = [target for target in lost if target not in tied]
            lost += self._missed(tied, adapter, _ABSENT)
        # The end of a path may be that of another part's module: towers have layers of the same names.
        if ends := [site.target for site in sites]:
            lost += self._missed(ends, adapter, ("values",))
        return {target.path for target in lost}

    def _missed(self, targets: Sequence[Target], adapter: Adapter, kinds: Collection[str]) -> list[Target]:
        """Return the targets that values show to be missing, for reasons of some kinds."""
        _, misses = self._by_value.resolve(targets, adapter.flattened, adapter.scope)
        return [miss.target for miss in misses if miss.kind in kinds]

    def _tied(self, targets: Sequence[Target], adapter: Adapter) -> list[Target]:
        if self._weight_of is None or not targets:
            return []
        named = [target.named for target in targets]
        stored = self._weight_of.for_adapter(named, adapter.flattened, adapter.scope)
        return [target for target in targets if stored.is_tied(target)]


def _part(adapter: Adapter, paths: set[str]) -> Adapter:
    modules = [key for key, module in adapter.modules.items() if module.path in paths]
    others = [path for path in (*adapter.extras, *adapter.token_rows) if path.rpartition(".")[0] in paths]
    # The whole adapter was looked at for what its file lacks, and of a part the config names too much.
    config = {name: value for name, value in adapter.config.items() if name != "modules_to_save"}
    # Without the note that the rest is ignored: it goes into another graph.
    return replace(only_some(adapter, modules, others, "not here"), notes=adapter.notes, config=config)
