"""Check links in a folder that somebody else made: files that are read or copied from it must be in it.

A link to a private file would be copied as that file, or merged into, and published with the output. Hugging
Face's cache has links everywhere: ``models--x/snapshots/COMMIT/config.json`` leads to
``models--x/blobs/HASH``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_export.errors import CheckpointError

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def refuse_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raise `CheckpointError` if files of a checkpoint, weights included, are links out of its folder.

    Args:
        folder: The folder.
        paths: Paths of files in it; missing ones are ignored.
    """
    found = (path for path in dict.fromkeys(paths) if path.is_symlink() or path.exists())
    if problems := link_problems(folder, found):
        raise CheckpointError(
            f"{len(problems)} files of {folder} would be read from somewhere else, or can't be",
            "put the files themselves into the folder instead of the links, or remove the links",
            problems,
        )


def link_problems(folder: Path, paths: Iterable[Path]) -> list[str]:
    """Return the files of a folder that can't be copied from it, each with the reason.

    Args:
        folder: The folder.
        paths: Paths of files in it, or below it.
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
    """Yield the folders that hold the files of a snapshot in Hugging Face's cache."""
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        if place.parent.name == _SNAPSHOTS:
            yield str(place.parent.parent / _BLOBS)
