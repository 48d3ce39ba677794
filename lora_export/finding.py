"""Where a module of an adapter stands in a graph with exposed LoRA, by its path.

As it is, else with one change of prefix for the whole adapter, with ``self_attn`` called ``attn``, or with
kohya's underscores. A file that was converted already may name a whole pack as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_export.adapter import Adapter
from lora_export.exposed import ExposedGraph, ExposedModule, Member
from lora_export.formats.provenance import is_converted
from lora_export.sites import names

# Part of the reason of a module that the graph has no tensors for.
NO_TENSORS = " has no LoRA tensors for it"
_WEIGHT = ".weight"
_SHOWN = 4


@dataclass(frozen=True)
class Place:
    """A module's place.

    Attributes:
        module: The pair of tensors.
        member: The module of the base; for a whole pack one that stands for all of them.
        how: What was assumed about names, for the plan.
    """

    module: ExposedModule
    member: Member
    how: str = ""


class Finder:
    """Finds places by path.

    Args:
        adapter: Whose paths they are.
        exposed: The graph's record.
        where: The graph's file, for reasons.

    Attributes:
        notes: What was assumed for all paths.
    """

    def __init__(self, adapter: Adapter, exposed: ExposedGraph, where: str) -> None:
        self._where, self._flattened = where, adapter.flattened
        self._places = _places(exposed, is_converted(adapter.config))
        self.notes: list[str] = []
        paths = [lora.path for lora in adapter.modules.values()]
        paths = paths or [key.rpartition(".")[0] for key in adapter.extras]
        self._table = names.Flattened(self._places) if adapter.flattened else None
        self._prefixes: Sequence[names.Prefix] = (names.Prefix(),)
        if not adapter.flattened:
            self._prefixes = names.find_prefixes([path + _WEIGHT for path in paths], self._places)
        if len(self._prefixes) == 1 and self._prefixes[0] != names.Prefix():
            self.notes.append(f"paths matched with {_said(self._prefixes[0])}")

    def find(self, path: str) -> Place | str:
        """Return the place of a module, or why it has none."""
        key = path + _WEIGHT
        if self._table is not None:
            fitting = self._table.find(key)
            if len(fitting) > 1:
                return f"ambiguous: may be {', '.join(fitting[:_SHOWN])}"
            if fitting:
                return Place(*self._places[fitting[0]], "path without its dots")
            return self._not_found(path)
        if len(self._prefixes) > 1:
            changes = ", ".join(sorted(map(_said, self._prefixes))[:_SHOWN])
            return f"ambiguous: the graph's paths fit with several changes ({changes})"
        prefix = self._prefixes[0] if self._prefixes else names.Prefix()
        how = _said(prefix) if prefix != names.Prefix() else ""
        for variant in names.variants(key):
            if variant.part is None and len(variant.keys) == 1:
                name = prefix.apply(variant.keys[0])
                if name is not None and name in self._places:
                    said = "; ".join(text for text in (how, variant.how) if text)
                    return Place(*self._places[name], said)
        return self._not_found(path)

    def _not_found(self, path: str) -> str:
        leaf = path.rpartition(".")[2]
        near = [key.removesuffix(_WEIGHT) for key in self._places if key.endswith(f"{leaf}{_WEIGHT}")][:2]
        seen = f"; it has {', '.join(near)}" if near else ""
        return f"{self._where}{NO_TENSORS}{seen}"


def _places(exposed: ExposedGraph, packs: bool) -> Mapping[str, tuple[ExposedModule, Member]]:
    """Parameter path in the base → where its change goes."""
    places = {}
    if packs:
        for module in exposed.modules:
            places[module.name + _WEIGHT] = (module, Member(module.name, 0, module.out_dim))
    return places | {member.path + _WEIGHT: (module, member) for module, member in exposed.members()}


def _said(prefix: names.Prefix) -> str:
    strip = f"'{prefix.strip}.' taken off" if prefix.strip else ""
    add = f"'{prefix.add}.' put in front" if prefix.add else ""
    return " and ".join(text for text in (strip, add) if text) or "no change"
