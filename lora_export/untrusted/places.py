"""Look at places that a stranger's file names: such a name may be one that no file can have.

`pathlib` raises for a name that is longer than the file system's (255 bytes), or has a null character; that
nothing is there is what a caller has an answer to.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


def is_possible(path: Path) -> bool:
    """Return whether something could be there, by its name."""
    try:
        path.lstat()
    except ValueError:
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def is_file(path: Path) -> bool:
    """Return whether there is a file, links followed; False for a name that none can have."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Return whether there is a folder, links followed; False for a name that none can have."""
    return os.path.isdir(path)  # noqa: PTH112


def is_link(path: Path) -> bool:
    """Return whether there is a link; False for a name that none can have."""
    return os.path.islink(path)  # noqa: PTH114
