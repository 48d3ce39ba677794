"""Find the site of an adapter's module in a graph with exposed LoRA by its path.

The path is tried as it is, then with one change of prefix for the whole adapter, with ``self_attn`` called
``attn``, and with kohya's underscores. A file that was converted already may also name a whole pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lora_export.adapter import Adapter
from lora_export.formats.provenance import is_converted
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member, path_of
from lora_export.plan import Refusal
from lora_export.sites.naming import names
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.renaming import NOT_FOUND, rename
from lora_export.sites.naming.towers import kinds_of_names

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Place:
    """Site of a module.

    Attributes:
        module: The pair of tensors.
        member: The module of the base; for a whole pack one that stands for all of them.
        how: Assumptions about names, for the plan.
    """

    module: ExposedModule
    member: Member
    how: str = ""


class SiteFinder:
    """Finder of sites by path.

    Args:
        adapter: The adapter that the paths are from.
        exposed: The graph's LoRA record.
        where: The graph's file, for reasons.
        others: Function that returns the names of the graph's constants, which tell the kind of model.

    Attributes:
        notes: Assumptions for all paths.
        hint: Hint for paths without a site, or an empty text.
    """

    def __init__(
        self,
        adapter: Adapter,
        exposed: LoraRecord,
        where: str,
        others: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._where, self._flattened = where, adapter.flattened
        self._places = _places(exposed, is_converted(adapter.config))
        self.notes: list[str] = []
        named = [
            *(
                _named(path_of(f"{m.path}.{m.parameter}"), m.component, m.told_shape)
                for m in adapter.modules.values()
            ),
            *(_named(key.rpartition(".")[0]) for key in adapter.extras),
        ]
        named = list(dict.fromkeys(named))
        known = KnownNames(self._places, self._shape, lambda: kinds_of_names(others()))
        self._renaming = rename(named, known, flattened=adapter.flattened, scope=adapter.scope)
        self._numbers = {one: number for number, one in enumerate(named)}
        if self._renaming.note:
            self.notes.append(f"paths matched with {self._renaming.note}")
        self.hint = self._renaming.hint

    def find(self, path: str, component: str | None = None) -> Place | Refusal:
        """Return the site of a module, or the reason why it has none."""
        number = self._numbers[_named(path, component)]
        key, problem = self._renaming.names[number], self._renaming.problems.get(number, NOT_FOUND)
        if key is None:
            is_lost = problem.kind == "not found"
            return self._not_found(path) if is_lost else Refusal(problem.kind, str(problem))
        notes = [self._renaming.note] if self._renaming.note else []
        notes += ["path without its dots"] if self._flattened else []
        for variant in names.variants(key):
            if variant.part is None and len(variant.keys) == 1 and variant.keys[0] in self._places:
                how = [*notes, variant.how] if variant.how else notes
                return Place(*self._places[variant.keys[0]], "; ".join(how))
        return self._not_found(path)

    def _shape(self, key: str) -> tuple[int, ...]:
        module, member = self._places[key]
        return (member.out_dim, module.in_dim, *module.kernel)

    def _not_found(self, path: str) -> Refusal:
        leaf = path.rpartition(".")[2]
        near = [key.removesuffix(_WEIGHT) for key in self._places if key.endswith(f"{leaf}{_WEIGHT}")][:2]
        seen = f"; it has {', '.join(near)}" if near else ""
        return Refusal("not exposed", f"{self._where} has no LoRA tensors for it{seen}")


def _places(exposed: LoraRecord, packs: bool) -> Mapping[str, tuple[ExposedModule, Member]]:
    """Map parameter paths in the base to the module and member that take their change."""
    places = {}
    if packs:
        for module in exposed.modules:
            places[module.name + _WEIGHT] = (
                module,
                Member(path=module.name, start=0, out_dim=module.out_dim),
            )
    return places | {member.path + _WEIGHT: (module, member) for module, member in exposed.members()}


def _named(path: str, component: str | None = None, shape: tuple[int, ...] | None = None) -> Named:
    return Named(path + _WEIGHT, "merge", component, shape)
