"""Find keys of ``rank_pattern`` and ``alpha_pattern`` that would fit a module if its path began differently.

PEFT matches a key against the module's path in the model that was trained. If a file's names begin
differently (saved from an inner model, or without the outer one's name), a key that is anchored or is a whole
path fits nothing, and its module would silently get the general rank or alpha.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lora_export.formats.reading.key_index import KeyIndex
from lora_export.formats.reading.patterns import timed

KEYS = ("rank_pattern", "alpha_pattern")
# A literal name at the beginning of a key, with its dot.
_FIRST_NAME = re.compile(r"\^?(?:[A-Za-z_]\w*)(?:\\\.|\.)(?![*+?{])")
_MOST_NAMES = 16


def misplaced_keys(config: Mapping[str, Any], paths: Collection[str]) -> Iterator[str]:
    """Yield a line for each key that fits none of a file's modules, but would with another beginning.

    Args:
        config: PEFT's config, without wrappers in its patterns.
        paths: Paths of the file's modules, which the keys are matched against.

    Raises:
        AdapterError: The keys take too long to match.
    """
    for kind in KEYS:
        pattern = config.get(kind)
        keys = list(map(str, pattern)) if isinstance(pattern, Mapping) else []
        index, whole = KeyIndex(kind, keys), set(paths)
        fitting = {number for path in paths for number in index.fitting(path)}
        left = [key for number, key in enumerate(keys) if number not in fitting and key not in whole]
        meant = _meant(kind, left, paths) if left else {}
        for key in left:
            if key in meant:
                yield (
                    f"config {kind} {key!r}: fits no module name of the file; it would fit {meant[key]} "
                    "with another beginning: begin it like that path"
                )


def _meant(kind: str, keys: Sequence[str], paths: Collection[str]) -> dict[str, str]:
    """Return the first path that each key fits after the key or the path loses some of its first names."""
    with timed(kind, keys[0]):
        index, meant, known = KeyIndex(kind, keys), dict[str, str](), set(keys)
        shorter = [(key, short) for key in keys for short in _shorter(key)]
        whole = KeyIndex(kind, (short.removesuffix("$") for _, short in shorter), whole=True)
    for path in paths:
        names = path.split(".")
        for first in range(1, len(names) - 1):
            end = ".".join(names[first:])
            for number in index.fitting(end):
                meant.setdefault(keys[number], path)
            if end in known:
                meant.setdefault(end, path)
        for number in whole.fitting(path):
            meant.setdefault(shorter[number][0], path)
    return meant


def _shorter(key: str) -> Iterator[str]:
    """Yield a key without its first name, without its first two, and so on."""
    for _ in range(_MOST_NAMES):
        if not (found := _FIRST_NAME.match(key)):
            return
        key = key[found.end() :]
        yield key
