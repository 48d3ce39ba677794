"""Links in a folder that somebody else made: what is read or copied from it must lie in it.

A link to a private file would be copied as that file, or merged into, and published with the output; of a
config, values would be named in messages. A file that the user named may be a link. Hugging Face's cache is
full of links: ``models--x/snapshots/COMMIT/config.json`` leads to ``models--x/blobs/HASH``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lora_export.errors import LoraExportError
from lora_export.untrusted.places import exists, is_file, is_folder, is_link, is_there

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_HINT = "put the files themselves into the folder in place of the links, or remove the links"


# So many real paths are kept at once: a list may name any number of files.
_KEPT = 1 << 10


class RealPaths:
    """Real paths of many files, as of ``os.path.realpath``, which looks at every folder above each of them.

    A short list may name thousands of files a thousand folders down. Here a folder is resolved once.
    """

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """Return the path of a file or folder with all links followed."""
        if (known := self._known.get(path)) is not None:
            return known
        if path.name in ("", os.pardir) or _may_be_link(path):
            return self._keep(path, os.path.realpath(path))
        folder = self._known.get(path.parent)
        if folder is None:
            folder = self._keep(path.parent, os.path.realpath(path.parent))
        return self._keep(path, os.path.join(folder, path.name))  # noqa: PTH118

    def _keep(self, path: Path, real: str) -> str:
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[path] = real
        return real


def _may_be_link(path: Path) -> bool:
    try:
        return is_link(path)
    except OSError:  # its folder can't be searched
        return True


def refuse_links(folder: Path, paths: Iterable[Path], error: type[LoraExportError]) -> None:
    """Refuse files of a checkpoint or an adapter, weights too, that are links out of its folder.

    Args:
        folder: The folder.
        paths: Of files in it; those that are missing are not looked at.
        error: Class of the error to raise.

    Raises:
        LoraExportError: There are such links (of the class ``error``).
    """
    found = (path for path in dict.fromkeys(paths) if is_there(path))
    if problems := link_problems(folder, found):
        raise error(
            f"{len(problems)} files of {folder} would be read from somewhere else, or can't be",
            _HINT,
            problems,
        )


def refuse_link(path: Path, given: Path, error: type[LoraExportError]) -> None:
    """Raise an error of the class ``error`` where `leads_out` says that a file may not be read."""
    if problem := leads_out(path, given):
        raise error(f"{path} {problem}", _HINT)


def leads_out(path: Path, given: Path, real_of: Callable[[Path], str] = os.path.realpath) -> str:
    """Return what is wrong with a file that we looked for: it is a link out of the folder; or "".

    Args:
        path: The file.
        given: The folder or file that the user named. A file may be a link itself; what belongs to it may
            lie beside either of its two places.
        real_of: Function that returns a real path; `RealPaths.of` for many files.
    """
    folder = given if is_folder(given) else given.parent
    allowed = [real_of(folder), *_blobs(real_of(folder))]
    if folder is not given:
        allowed.append(os.path.dirname(real_of(given)))  # noqa: PTH120
    real = real_of(path)
    return "" if _lies_in(real, allowed) else f"is a link out of the folder, to {real}"


def link_problems(folder: Path, paths: Iterable[Path]) -> list[str]:
    """Return which of a folder's files can't be copied from it, each with the reason.

    Args:
        folder: The folder.
        paths: Of files in it, or below it.
    """
    allowed = [found := os.path.realpath(folder), *_blobs(found)]
    problems = []
    for path in paths:
        real, name = os.path.realpath(path), path.relative_to(folder)
        if is_link(path) and is_folder(path):
            problems.append(f"{name} is a link to the folder {real}")
        elif not _lies_in(real, allowed):
            problems.append(f"{name} is a link out of the folder, to {real}")
        elif not exists(path):
            problems.append(f"{name} is a link to {real}, where nothing is")
        elif not is_file(path):
            problems.append(f"{name} is not a file")
    return problems


def _lies_in(real: str, allowed: Iterable[str]) -> bool:
    return any(os.path.commonpath([place, real]) == place for place in allowed)


def _blobs(folder: str) -> Iterator[str]:
    """Yield where the files of a snapshot in Hugging Face's cache lie, by the snapshot's real path."""
    real = Path(folder)
    for place in (real, *real.parents):
        if place.parent.name == _SNAPSHOTS:
            yield str(place.parent.parent / _BLOBS)
