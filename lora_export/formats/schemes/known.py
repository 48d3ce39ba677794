"""The module paths of a base, found with or without their dots and behind an outer prefix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping


def flatten(path: str) -> str:
    """Return a path with its dots as underscores."""
    return path.replace(".", "_")


class KnownModules:
    """Finds the modules of a base.

    Args:
        parameters: Dotted parameter paths of the base.

    Attributes:
        paths: Module paths.
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        self.paths = {path for name in parameters if (path := name.rpartition(".")[0])}
        self._tails: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for path in self.paths:
            parts = path.split(".")
            for start in range(len(parts)):
                tail = ".".join(parts[start:])
                self._tails[flatten(tail)][".".join(parts[:start])].append(tail)
                if parts[start].isdigit():
                    # A wrapper has no number: what is inside of a repeated block is no model of its own.
                    break

    def find(self, path: str) -> Mapping[str, str]:
        """Return outer prefix → dotted path behind it, for each prefix under which ``path`` is known.

        Args:
            path: A module path; dots and underscores count as the same.
        """
        found = self._tails.get(flatten(path), {})
        return {prefix: tails[0] for prefix, tails in found.items() if len(tails) == 1}
