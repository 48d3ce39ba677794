"""Apply a scheme to an adapter: each module becomes its counterparts, and none is lost.

Rules:

1. A base that has one of the scheme's own names uses the scheme itself: nothing is translated.
2. One outer prefix of the base applies to all counterparts; the search for sites adds it, not the scheme.
3. A module whose counterpart is missing gets a name that no base has, so that the plan refuses it.
4. Two modules never become one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.formats.schemes.cutting import cut_module, take_rows
from lora_export.formats.schemes.known import KnownModules, flatten
from lora_export.formats.schemes.rules import Counterpart, Scheme, inner


@dataclass(kw_only=True)
class Translation:
    """The translation of an adapter by a scheme.

    Attributes:
        scheme: The scheme.
        adapter: The translated adapter.
        found: Number of counterparts that the base has.
        missing: The adapter's paths without one, each with the counterpart that the base lacks, if any.
        problems: Modules that can't be cut, or that collide.
    """

    scheme: Scheme
    adapter: Adapter
    found: int = 0
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def apply_scheme(scheme: Scheme, adapter: Adapter, known: KnownModules) -> Translation | None:
    """Return the translation, or None if the base isn't of the scheme's family, or has the scheme's names.

    Args:
        scheme: A scheme that recognises the adapter.
        adapter: The adapter.
        known: The base's modules.

    Raises:
        AdapterError: The base's structure is not clear from its names.
    """
    lookup = scheme.lookup(known)
    mine = [m.path for m in adapter.modules.values() if m.component in scheme.components]
    mine += [key.rpartition(".")[0] for key in adapter.extras]
    targets = {path: found for path in mine if (found := lookup(path))}
    renamed = [path for path, found in targets.items() if flatten(found[0].path) != flatten(inner(path))]
    if any(known.find(path) for path in renamed):
        # Rule 1.
        return None
    prefix = _outer_prefix(targets, known)
    if prefix is None:
        return None
    return _Translator(Translation(scheme=scheme, adapter=adapter), known, prefix, targets).run(adapter)


def _outer_prefix(targets: Mapping[str, Sequence[Counterpart]], known: KnownModules) -> str | None:
    """Return the prefix under which most counterparts are known (rule 2), or None if none is known."""
    votes: Counter[str] = Counter()
    for found in targets.values():
        for target in found:
            votes.update(known.find(target.path).keys())
    return min(votes, key=lambda prefix: (-votes[prefix], prefix), default=None)


class _Translator:
    """Make the new modules and whole parameters."""

    def __init__(
        self,
        result: Translation,
        known: KnownModules,
        prefix: str,
        targets: Mapping[str, Sequence[Counterpart]],
    ) -> None:
        self._result, self._known, self._prefix, self._targets = result, known, prefix, targets

    def run(self, adapter: Adapter) -> Translation:
        """Return the translation."""
        modules: dict[str, LoraModule] = {}
        owners: dict[str, LoraModule] = {}
        for module in adapter.modules.values():
            for new in self._modules_of(module):
                place = f"{new.path}.{new.parameter}"
                first = owners.setdefault(place, module)  # rule 4
                if first is not module and {first.path, module.path} & self._targets.keys():
                    self._result.problems.append(f"{module.key} and {first.key} are both the base's {place}")
                modules[new.key] = new
        extras: dict[str, Array] = {}
        names = dict(adapter.extra_tensors)
        for key, values in adapter.extras.items():
            tensor = names.pop(key, key)
            for new_key, part in self._extras_of(key, values, adapter).items():
                if new_key in extras:
                    self._result.problems.append(f"{key}: {new_key} is replaced already")
                extras[new_key], names[new_key] = part, tensor
        self._result.adapter = replace(
            adapter, modules=modules, extras=extras, extra_tensors=names, flattened=False
        )
        return self._result

    def _modules_of(self, module: LoraModule) -> list[LoraModule]:
        targets = self._targets.get(module.path, ())
        if module.component not in self._result.scheme.components or not targets:
            return [self._left(module)]
        found = []
        for target in targets:
            path = self._path(module.path, target)
            spans = target.rows(module.lora_b.shape[0], module.lora_a.shape[1])
            cuttable = module.kind in ("linear", "conv") and module.groups == 1
            if not spans or (spans != ((0, module.lora_b.shape[0]),) and not cuttable):
                self._cannot_cut(module.path, module.weight_shape, targets)
                return []
            found.append(cut_module(module, path, spans) if cuttable else replace(module, path=path))
        return found

    def _extras_of(self, key: str, values: Array, adapter: Adapter) -> dict[str, Array]:
        path, _, leaf = key.rpartition(".")
        targets = self._targets.get(path, ())
        if not targets:
            return {key: values}
        sizes = [m.lora_a.shape[1] for m in adapter.modules.values() if m.path == path]
        cols = values.shape[1] if values.ndim > 1 else sizes[0] if sizes else len(values)
        parts = {}
        for target in targets:
            spans = target.rows(len(values), cols)
            if not spans:
                self._cannot_cut(key, values.shape, targets)
                return {}
            parts[f"{self._path(path, target)}.{leaf}"] = take_rows(values, spans)
        return parts

    def _path(self, path: str, target: Counterpart) -> str:
        """Return a counterpart's path in the base's spelling, or a name that no base has (rule 3)."""
        found = self._known.find(target.path).get(self._prefix)
        if found is None:
            self._result.missing.append(f"{path}  the base has no {target.path}")
            # Without dots no prefix can turn it into the name of another module.
            return f"{flatten(inner(path))} → {target.path.replace('.', '/')}"
        self._result.found += 1
        return found

    def _left(self, module: LoraModule) -> LoraModule:
        """Return a module that the scheme does not name, in the base's spelling if the base has it."""
        path = self._known.find(inner(module.path)).get(self._prefix)
        if path is not None:
            return replace(module, path=path)
        if module.component in self._result.scheme.components:
            self._result.missing.append(f"{module.path}  not a name of {self._result.scheme.name}")
        return module

    def _cannot_cut(self, path: str, shape: tuple[int, ...], targets: Sequence[Counterpart]) -> None:
        names = ", ".join(target.path for target in targets)
        self._result.problems.append(f"{path}: {shape} can't be cut into {names}")
