"""Links in a folder that somebody else made: what is copied from it must lie in it.

A link to a private file would be copied as that file, and published with the output. Hugging Face's cache is
made of links: ``models--x/snapshots/COMMIT/config.json`` leads to ``models--x/blobs/HASH``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def link_problems(folder: Path, paths: Iterable[Path]) -> list[str]:
    """Return which of a folder's files can't be copied from it, each with the reason.

    Args:
        folder: The folder.
        paths: Of files in it, or below it.
    """
    allowed = [os.path.realpath(folder), *_blobs(folder)]
    problems = []
    for path in paths:
        real, name = os.path.realpath(path), path.relative_to(folder)
        if path.is_symlink() and path.is_dir():
            problems.append(f"{name} is a link to the folder {real}")
        elif not any(os.path.commonpath([place, real]) == place for place in allowed):
            problems.append(f"{name} is a link out of the folder, to {real}")
        elif not path.exists():
            problems.append(f"{name} is a link to {real}, where nothing is")
        elif not path.is_file():
            problems.append(f"{name} is not a file")
    return problems


def _blobs(folder: Path) -> Iterator[str]:
    """Yield where the files of a snapshot in Hugging Face's cache lie."""
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        if place.parent.name == _SNAPSHOTS:
            yield str(place.parent.parent / _BLOBS)
