"""Keys of ``rank_pattern`` and ``alpha_pattern`` that fit a file's modules but for how their paths begin.

PEFT matches a key against the module's path in the model that was trained. Where a file's names begin in
another way (saved from an inner model, or without the outer one's name), a key that is anchored or is a whole
path fits nothing, and its module would get the general rank or alpha without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lora_export.formats.reading.key_index import KeyIndex

KEYS = ("rank_pattern", "alpha_pattern")
# A literal name at the beginning of a key, as far as its dot.
_FIRST_NAME = re.compile(r"\^?(?:[A-Za-z_]\w*)(?:\\\.|\.)(?![*+?{])")
_MOST_NAMES = 64


def misplaced_keys(config: Mapping[str, Any], paths: Collection[str]) -> Iterator[str]:
    """Yield a line for each key that fits none of a file's modules, and would with another beginning.

    Args:
        config: PEFT's, without wrappers in its patterns.
        paths: What the keys are matched against: of each module of the file.

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
                    f"config {kind} {key!r}: fits no module as the file calls them; it would fit "
                    f"{meant[key]} with another beginning: write it as that path begins"
                )


def _meant(kind: str, keys: Sequence[str], paths: Collection[str]) -> dict[str, str]:
    """Return the first path that each key fits if one of the two loses some of its first names."""
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
    """Yield a key without its first names."""
    for _ in range(_MOST_NAMES):
        if not (found := _FIRST_NAME.match(key)):
            return
        key = key[found.end() :]
        yield key
