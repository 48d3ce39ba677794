"""Examine a torch checkpoint's dictionaries and lists, each once, before other code walks them.

A pickle may put one dictionary twice into the next, thirty times over: a kilobyte then means 2³⁰ of them for
code that walks it, and one that holds itself has no end. All facts on containers are found here, without
recursion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 64


class TangledError(Exception):
    """Error for containers that hold themselves, or are nested too deeply."""


class Contents:
    """Facts on the contents of containers, at any depth.

    Args:
        content: Dictionaries, lists, tuples and sets of anything; it has to outlive this object.
        tensor_type: torch's tensor type.

    Raises:
        TangledError: The containers can't be walked.
    """

    def __init__(self, content: Any, tensor_type: type) -> None:
        self._tensor_type = tensor_type
        # By identity: number of levels; dictionaries with tensors in them or in their dictionaries; lists
        # with a value that is not plain.
        self._levels: dict[int, int] = {}
        self._with_tensors: set[int] = set()
        self._not_plain: set[int] = set()
        if _is_container(content):
            self._walk(content)

    def has_tensors(self, value: Any) -> bool:
        """Return whether a value is a dictionary that holds tensors, itself or in dictionaries of its own."""
        return id(value) in self._with_tensors

    def is_plain(self, value: Any) -> bool:
        """Return whether a value is a number or a list of plain values: nothing that could hold a weight."""
        if isinstance(value, (list, tuple, set)):
            return id(value) not in self._not_plain
        return isinstance(value, (bool, int, float))

    def _walk(self, content: Any) -> None:
        path: list[tuple[Any, Iterator[Any]]] = [(content, _containers_in(content))]
        open_ids = {id(content)}
        while path:
            outer, rest = path[-1]
            inner = next(rest, None)
            if inner is None:
                open_ids.remove(id(outer))
                self._close(outer)
                path.pop()
            elif id(inner) in open_ids:
                raise TangledError("a dictionary or list in it holds itself")
            elif id(inner) not in self._levels:
                open_ids.add(id(inner))
                path.append((inner, _containers_in(inner)))
            if len(path) > MAX_DEPTH:
                raise TangledError(f"it is nested deeper than {MAX_DEPTH} levels")

    def _close(self, outer: Any) -> None:
        """Record the facts on a container, once those on its own containers are known."""
        values = list(_values_of(outer))
        levels = 1 + max((self._levels[id(one)] for one in values if _is_container(one)), default=0)
        if levels > MAX_DEPTH:
            raise TangledError(f"it is nested deeper than {MAX_DEPTH} levels")
        self._levels[id(outer)] = levels
        if isinstance(outer, Mapping):
            if any(isinstance(one, self._tensor_type) or self.has_tensors(one) for one in values):
                self._with_tensors.add(id(outer))
        elif not all(isinstance(one, str) or self.is_plain(one) for one in values):
            self._not_plain.add(id(outer))


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, set))


def _values_of(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, Mapping) else container)


def _containers_in(container: Any) -> Iterator[Any]:
    return (one for one in _values_of(container) if _is_container(one))
