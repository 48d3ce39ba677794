"""Find names of a config's list in which a path ends, from a dot on, without trying them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lora_export.formats.reading.patterns import remembered

# In one message.
_SHOWN = 12


def path_ends(path: str) -> Iterator[str]:
    """Yield a path, then the path without its first name, without its first two, and so on."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def names_of(listed: Sequence[Any]) -> frozenset[str]:
    """Return the names in a config's list, which may hold other things."""
    return remembered(listed, lambda: frozenset(name for name in listed if isinstance(name, str)))


def has_end(path: str, listed: Sequence[Any]) -> bool:
    """Return whether a path is one of the listed names, or ends in a dot and one of them."""
    return not names_of(listed).isdisjoint(path_ends(path))


def by_module(targets: Sequence[str]) -> Mapping[str, Sequence[tuple[int, str]]]:
    """Return the parameters that targets name, with their numbers, by module ("" where a target has none)."""

    def make() -> dict[str, list[tuple[int, str]]]:
        found: dict[str, list[tuple[int, str]]] = {}
        for number, target in enumerate(dict.fromkeys(targets)):
            module, _, parameter = target.rpartition(".")
            found.setdefault(module, []).append((number, parameter))
        return found

    return remembered(targets, make)


def some(names: Sequence[str]) -> str:
    """Return the first names of a list, for messages."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def names_inside(paths: Iterable[str], names: Sequence[str]) -> set[str]:
    """Return the names in which a module's path ends that has one of the parameters below it.

    Args:
        paths: Paths of parameters.
        names: Names of modules, compared as plain text as PEFT does: ``head`` is an end of ``lm_head``.
    """
    wanted, lengths = set(names), {len(name) for name in names}
    found, seen = set[str](), set[str]()
    for path in paths:
        module = path.rpartition(".")[0]
        while module and module not in seen:
            seen.add(module)
            ends = {module[len(module) - length :] for length in lengths if length <= len(module)}
            found |= wanted & ends
            module = module.rpartition(".")[0]
    return found
