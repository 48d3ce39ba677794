"""Read ``SHA256SUMS``: a line for each file, its hash and its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lora_export.untrusted.documents import MAX_BYTES, open_regular

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")
# Number of wrong lines that are named; a stranger's list may have millions.
_NAMED = 20


@dataclass(frozen=True)
class Sums:
    """A list of hashes.

    Attributes:
        files: Pairs of name and SHA-256, in the order of the lines.
        problems: Lines that are none, the first of them one by one.
    """

    files: tuple[tuple[str, str], ...]
    problems: tuple[str, ...] = ()


def read_sums(path: Path) -> Sums:
    """Return the hashes of a list, line by line: what is not a hash and a name takes no memory.

    Raises:
        OSError: The file can't be read.
    """
    files: list[tuple[str, str]] = []
    problems: list[str] = []
    wrong, number, left = 0, 0, MAX_BYTES
    with open_regular(path) as file:
        while raw := file.readline(left + 1):
            left -= len(raw)
            if left < 0:
                return Sums((), (f"it is larger than {MAX_BYTES} bytes",))
            number += 1
            # A line break of its own, since a name may hold any other character.
            line = raw.decode("utf-8", "replace")
            if found := _LINE.fullmatch(line):
                files.append((found[2], found[1]))
                continue
            wrong += 1
            if wrong <= _NAMED:
                ended = line.endswith("\n") or not _LINE.fullmatch(f"{line}\n")
                what = "is not a hash and a name" if ended else "does not end with a line break"
                problems.append(f"line {number} {what}")
    if wrong > _NAMED:
        problems.append(f"{wrong - _NAMED} more lines are not a hash and a name")
    return Sums(tuple(files), tuple(problems))
