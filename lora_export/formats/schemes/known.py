"""Find the module paths of a base, with or without their dots and after an outer prefix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property


def flatten(path: str) -> str:
    """Return a path with its dots as underscores."""
    return path.replace(".", "_")


def _modules(parameters: Iterable[str]) -> set[str]:
    return {path for name in parameters if (path := name.rpartition(".")[0])}


class KnownModules:
    """Find the modules of a base.

    Args:
        parameters: Dotted parameter paths of the base.
        others: Function that returns more of its parameters, as far as they have names, which show its
            structure but take no adapter; None if ``parameters`` are all.

    Attributes:
        paths: Module paths.
        is_complete: True if ``parameters`` are all that the base has.
    """

    def __init__(self, parameters: Iterable[str], others: Callable[[], Iterable[str]] | None = None) -> None:
        self._others = others or tuple
        self.is_complete = others is None
        self.paths = _modules(parameters)
        self._tails: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for path in self.paths:
            parts = path.split(".")
            for start in range(len(parts)):
                tail = ".".join(parts[start:])
                self._tails[flatten(tail)][".".join(parts[:start])].append(tail)
                if parts[start].isdigit():
                    # A wrapper has no number: the inside of a repeated block is not a model of its own.
                    break

    @cached_property
    def structure(self) -> set[str]:
        """Paths of all modules, those that take no adapter included."""
        return self.paths | _modules(self._others())

    def has(self, path: str) -> bool:
        """Return whether the base has a module, after any prefix, even if it takes no adapter.

        Args:
            path: Dotted path of the module.
        """
        return any(name == path or name.endswith(f".{path}") for name in self.structure)

    def find(self, path: str) -> Mapping[str, str]:
        """Return outer prefix → dotted path after it, for each prefix under which ``path`` is known.

        Args:
            path: A module path; dots and underscores count as the same.
        """
        found = self._tails.get(flatten(path), {})
        return {prefix: tails[0] for prefix, tails in found.items() if len(tails) == 1}
