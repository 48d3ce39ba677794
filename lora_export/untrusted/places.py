"""Look whether something is at a place, and tell that nothing is there from that nobody can say.

`pathlib` takes every error for an absent file from Python 3.14 on, and `os.path` always did: a config in a
folder that can't be searched for a moment (``EACCES``, ``EIO``, ``ESTALE`` of a network's file system) would
be none, and an adapter be read without it. Here such an error is raised, with its path.

A stranger's file may also name a place by a name that no file can have: longer than the file system's (255
bytes), or with a null character. That nothing is there is what a caller has an answer to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

# What the system says of a place where nothing is; ELOOP of links that lead to each other.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBADF})
# The same on Windows: no device, no such name, a link that leads nowhere.
_ABSENT_WINDOWS = frozenset({21, 123, 1921})
# What is neither a file nor a folder, in everyday words.
_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a disk",
}


def is_possible(path: Path) -> bool:
    """Return whether something could be there, by its name."""
    try:
        path.lstat()
    except ValueError:
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def exists(path: str | Path) -> bool:
    """Return whether something is there, links followed; errors as of `is_file`."""
    return _mode(path, os.stat) is not None


def is_there(path: str | Path) -> bool:
    """Return whether something is there, perhaps a link that leads nowhere; errors as of `is_file`."""
    return _mode(path, os.lstat) is not None


def is_file(path: str | Path) -> bool:
    """Return whether there is a file, links followed; False for a name that none can have.

    Raises:
        OSError: The system can't say it.
    """
    return stat.S_ISREG(_mode(path, os.stat) or 0)


def is_folder(path: str | Path) -> bool:
    """Return whether there is a folder, links followed; errors as of `is_file`."""
    return stat.S_ISDIR(_mode(path, os.stat) or 0)


def is_link(path: str | Path) -> bool:
    """Return whether there is a link; errors as of `is_file`."""
    return stat.S_ISLNK(_mode(path, os.lstat) or 0)


def special(path: str | Path) -> str:
    """Return what is there, links followed, if it is neither a file nor a folder, such as "a pipe"; else "".

    A link into ``/proc`` stands for an open file of a process (``/dev/stdout``), whatever that is just now.

    Raises:
        OSError: The system can't say it.
    """
    if is_link(path) and os.fspath(Path(path).readlink()).startswith("/proc/"):
        return "a link to an open file of a process"
    mode = _mode(path, os.stat)
    if mode is None or stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return ("a link to " if is_link(path) else "") + _SPECIAL.get(stat.S_IFMT(mode), "a special file")


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what is in a folder and has such a name (as of `fnmatch`), in order; nothing if it is absent.

    Raises:
        OSError: The folder can't be listed, which ``Path.glob`` takes for an empty one.
    """
    if not is_folder(folder):
        return []
    return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern))


def walk(folder: Path, closed: Callable[[OSError], object]) -> Iterator[tuple[list[Path], list[Path]]]:
    """Yield the folders and all else that a folder has, in order, then so of each folder in it, but no links.

    ``os.walk`` calls itself for each folder until Python 3.12: a thousand of them, each in the one before,
    were too many.

    Args:
        folder: The folder.
        closed: Called with the error of each folder that can't be listed.
    """
    todo = [folder]
    while todo:
        place = todo.pop()
        try:
            kinds = {path: _is_certainly_folder(path) for path in sorted(place.iterdir())}
        except OSError as error:
            closed(error)
            continue
        folders = [path for path, is_one in kinds.items() if is_one]
        yield folders, [path for path, is_one in kinds.items() if not is_one]
        todo += [path for path in reversed(folders) if not is_link(path)]


def _is_certainly_folder(path: Path) -> bool:
    try:
        return is_folder(path)
    except OSError:  # a link into a folder that can't be searched
        return False


def all_below(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and in those below it; links to folders are not followed.

    Raises:
        OSError: One of the folders can't be listed, which ``Path.rglob`` takes for an empty one.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folders, others in walk(folder, refuse):
        yield from (*folders, *others)


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it, by their paths; errors as of `all_below`."""
    return sorted(filter(is_file, all_below(folder)))


def _mode(path: str | Path, look: Callable[[str | Path], os.stat_result]) -> int | None:
    try:
        return look(path).st_mode
    except ValueError:  # a null character
        return None
    except OSError as error:
        if error.errno in _ABSENT or getattr(error, "winerror", None) in _ABSENT_WINDOWS:
            return None
        raise
