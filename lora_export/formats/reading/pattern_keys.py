"""Keys of ``rank_pattern`` and ``alpha_pattern`` that fit a file's modules but for how their paths begin.

PEFT matches a key against the module's path in the model that was trained. Where a file's names begin in
another way (saved from an inner model, or without the outer one's name), a key that is anchored or is a whole
path fits nothing, and its module would get the general rank or alpha without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_export.formats.reading.lora_config import pattern_values
from lora_export.formats.reading.patterns import fullmatch

KEYS = ("rank_pattern", "alpha_pattern")
# A literal name at the beginning of a key, as far as its dot.
_FIRST_NAME = re.compile(r"\^?(?:[A-Za-z_]\w*)(?:\\\.|\.)(?![*+?{])")


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
        for key in map(str, pattern) if isinstance(pattern, Mapping) else ():
            if any(pattern_values({kind: {key: 1}}, kind, path) for path in paths):
                continue
            if (meant := next((path for path in paths if _is_meant(kind, key, path)), None)) is not None:
                yield (
                    f"config {kind} {key!r}: fits no module as the file calls them; it would fit "
                    f"{meant} with another beginning: write it as that path begins"
                )


def _is_meant(kind: str, key: str, path: str) -> bool:
    """Whether a key fits a path without its first names, or without its own first names all of a path."""
    names = path.split(".")
    ends = (".".join(names[first:]) for first in range(1, len(names) - 1))
    if any(pattern_values({kind: {key: 1}}, kind, end) for end in ends):
        return True
    while found := _FIRST_NAME.match(key):
        key = key[found.end() :]
        try:
            if fullmatch(kind, key.removesuffix("$"), path):
                return True
        except re.error:
            return False
    return False
