"""Write outputs so that a killed process leaves the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from lora_export.errors import OutputError

_ANOTHER_NAME = "choose another name"


class OutputSet:
    """A group of files that appear together.

    Each file is written under a temporary name in its own folder. `commit` syncs them and renames
    them in the order of their creation. Where the *last* file exists already it is removed before
    the first rename: a process killed between two renames leaves no last file, and never one that
    points at data of another run. Leaving the `with` block without `commit` removes every temporary.

    Args:
        force: Replace files that exist already.
    """

    def __init__(self, force: bool = False) -> None:
        self._force = force
        self._staged: list[tuple[Path, Path]] = []
        self._suffix = f".tmp-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> OutputSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for temporary, _ in self._staged:
            with contextlib.suppress(OSError):
                if temporary.is_dir():
                    shutil.rmtree(temporary)
                else:
                    temporary.unlink()

    def stage(self, target: Path, folder: bool = False) -> Path:
        """Return the temporary path under which ``target`` is to be written.

        Args:
            target: What to write.
            folder: It is a folder, and the caller has made sure that one of that name may be replaced.

        Raises:
            OutputError: ``target`` exists and ``force`` is off, it is a folder where a file is to be written
                or the other way round, or its folder can't be written.
        """
        if folder:
            refuse_existing([target], self._force)
            if target.is_file():
                raise OutputError(f"{target} is a file, and a folder is to be written", _ANOTHER_NAME)
        else:
            refuse_replacing([target], self._force)
        make_parent(target)
        temporary = target.with_name(target.name + self._suffix)
        self._staged.append((temporary, target))
        return temporary

    def commit(self) -> None:
        """Sync every staged file and give each its own name."""
        if not self._staged:
            return
        with output_errors(self._staged[-1][1]):
            for temporary, _ in self._staged:
                sync_tree(temporary)
            last = self._staged[-1][1]
            retired = last.with_name(last.name + self._suffix + ".old")
            if last.is_dir():
                last.rename(retired)
            elif last.exists() and len(self._staged) > 1:
                last.unlink()
            for temporary, target in self._staged:
                temporary.replace(target)
            for folder in {target.parent for _, target in self._staged}:
                sync_path(folder)
            if retired.is_dir():
                shutil.rmtree(retired)
        self._staged.clear()


def refuse_existing(targets: list[Path], force: bool) -> None:
    """Raise `OutputError` naming every target that exists already, unless ``force``."""
    existing = [str(target) for target in targets if target.exists() or target.is_symlink()]
    if existing and not force:
        raise OutputError(
            "the output exists already", "choose another name, or give --force (force=True)", existing
        )


def refuse_replacing(files: list[Path], force: bool) -> None:
    """Raise `OutputError` for files that exist already, unless ``force``; for folders always."""
    folders = [str(file) for file in files if file.is_dir()]
    if folders:
        raise OutputError("the output is a folder, and a file is to be written", _ANOTHER_NAME, folders)
    refuse_existing(files, force)


def places_of(path: Path) -> set[Path]:
    """Return where a file lies and where that leads: files of a Hugging Face cache are links to elsewhere."""
    return {path.resolve(), path.parent.resolve() / path.name}


def make_parent(target: Path) -> None:
    """Create the folder of ``target``; `OutputError` if that can't be done or it can't be written."""
    check_parent(target)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)


def check_parent(target: Path) -> None:
    """Raise `OutputError` if ``target`` can't have its folder, or that can't be written; nothing is made."""
    above = next((path for path in target.absolute().parents if path.exists()), Path())
    if not above.is_dir():
        raise OutputError(f"cannot write {target}: {above} is a file, not a folder", _ANOTHER_NAME)
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {above}", "choose a folder that you may write to")


def sync_tree(path: Path) -> None:
    """Flush a file, or each file of a folder, to the disk."""
    if path.is_dir():
        for child in path.rglob("*"):
            sync_path(child)
    sync_path(path)


def sync_path(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn an `OSError` met while writing into an `OutputError` about ``target``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = (
            "free some space and run it again"
            if error.errno == errno.ENOSPC
            else "check the path and its permissions"
        )
        raise OutputError(f"cannot write {target}: {reason} (nothing was replaced)", hint) from error
