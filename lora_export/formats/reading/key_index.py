"""Find the keys of ``rank_pattern`` or ``alpha_pattern`` that fit a module without trying them all.

Training that gives each module a rank of its own (EVA, AdaLoRA) writes a key for each, and a mixture of
experts may have twenty thousand modules. Nearly all keys are paths, in which a dot stands for any character:
keys of one length, with their dots in the same positions, are looked up together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from lora_export.formats.reading.patterns import count, fullmatch, match, timed

# Characters that mean themselves, dots that mean any character, and what `re.escape` writes for a path; with
# ``^`` in front, the whole path.
_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.|\\-)+")
_PIECE = re.compile(r"\\.|.")
# Stands for any character in a looked-up key.
_ANY = "\0"


class KeyIndex:
    """Find keys by a module's path, under PEFT's rule: a key matches an end of it, from a dot on.

    Args:
        name: Name of the keys in the config.
        keys: Regular expressions; an invalid one fits nothing.
        whole: Let a key match the whole path only.
    """

    def __init__(self, name: str, keys: Iterable[str], *, whole: bool = False) -> None:
        self._name, self._keys, self._whole = name, list(keys), whole
        self._others: list[int] = []
        # Whether it is for whole paths, length, positions of the dots that mean any character → key without
        # them → numbers.
        self._plain: dict[tuple[bool, int, tuple[int, ...]], dict[str, list[int]]] = defaultdict(dict)
        for number, key in enumerate(self._keys):
            if not _PLAIN.fullmatch(key):
                self._others.append(number)
                continue
            letters = [_ANY if piece == "." else piece[-1] for piece in _PIECE.findall(key.removeprefix("^"))]
            dots = tuple(at for at, letter in enumerate(letters) if letter == _ANY)
            is_whole = whole or key.startswith("^")
            self._plain[is_whole, len(letters), dots].setdefault("".join(letters), []).append(number)

    def fitting(self, path: str) -> list[int]:
        """Return the numbers of the keys that fit a path, in their order.

        Raises:
            AdapterError: The keys take too long to match.
        """
        if not self._keys:
            return []
        with timed(self._name, self._keys[0]):
            return self._fitting(path)

    def _fitting(self, path: str) -> list[int]:
        # A dot does not match a line end, and $ matches before one.
        if "\n" in path or _ANY in path:
            return [number for number in range(len(self._keys)) if self._fits(number, path)]
        if self._plain:
            count(self._name, self._keys[0], path, len(self._plain))
        found = [number for number in self._others if self._fits(number, path)]
        for (is_whole, length, dots), keys in self._plain.items():
            start = len(path) - length
            if start < 0 or (start and (is_whole or path[start - 1] != ".")):
                continue
            letters = list(path[start:])
            for at in dots:
                letters[at] = _ANY
            found += keys.get("".join(letters), ())
        return sorted(found)

    def _fits(self, number: int, path: str) -> bool:
        try:
            if self._whole:
                return fullmatch(self._name, self._keys[number], path) is not None
            return match(self._name, rf"(.*\.)?({self._keys[number]})$", path) is not None
        except re.error:
            return False
