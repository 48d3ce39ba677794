"""Read ``NAME=PATH``, as verbs take adapters with names."""

from __future__ import annotations


def split_named(entry: str) -> tuple[str, str | None]:
    """Return name and path, which may be empty; the path is None where there is no ``=``."""
    name, equals, path = entry.partition("=")
    return name, path if equals else None
