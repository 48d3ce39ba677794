"""Write outputs so that a killed process leaves either the old files or the new ones, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType

from lora_export.errors import OutputError
from lora_export.storage.commit.leases import Leases
from lora_export.storage.commit.leftovers import tidy
from lora_export.storage.commit.lock import locked
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import (
    Staged,
    StuckError,
    discard,
    give_names,
    itself,
    places_below,
    sync_path,
)
from lora_export.storage.commit.told import has_begun, has_ended
from lora_export.storage.inputs import forget_inputs, refuse_changed_inputs
from lora_export.untrusted.places import all_below, exists, is_file, is_folder, is_link, is_there, special

_ANOTHER_NAME = "choose another name"
_SHOWN = 8
# Files that callers are reading; see `reading`.
_READ_ABOVE: ContextVar[tuple[Path, ...]] = ContextVar("_READ_ABOVE", default=())


class OutputSet:
    """A group of files that appear together.

    Each file is written under a temporary name in its own folder. `commit` syncs them and gives them their
    names in the order of their creation (`commit.steps`): the last one points to the others. An interrupt
    during the renaming waits for its end; an error undoes all of it. Leaving the `with` block without
    `commit` removes all temporary files.

    Args:
        force: Replace existing files.
        reads: The files that were read for it; none of them is ever replaced.
        listed: Tell the user of it when a later step of the same run fails; False for caches.
    """

    def __init__(self, force: bool = False, reads: Iterable[Path] = (), *, listed: bool = True) -> None:
        self._force, self._reads, self._listed = force, list(reads), listed
        self._staged: list[Staged] = []
        # Folder as it was named → the folder itself.
        self._folders: dict[Path, Path] = {}
        self._kept: list[Path] = []
        self._leases = Leases()
        self._is_stuck = False

    def __enter__(self) -> OutputSet:
        has_begun(self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close()
        finally:
            self._close()  # an interrupt may have broken into the first lines of the same call

    def _close(self) -> None:
        """Remove files that were not committed, and release the leases."""
        with Uninterrupted() as calm:
            if not self._is_stuck:  # else they are needed to put the folder in order
                for entry in self._staged:
                    discard(entry.path, calm)
            names = [name for entry in self._staged for name in (entry.path, entry.retired)]
            is_left = self._is_stuck or any(map(is_there, names))
            self._leases.release(calm, remove=not is_left)
            self._staged.clear()
        has_ended(self._close)

    def stage(self, target: Path, folder: bool = False, force: bool | None = None) -> Path:
        """Return the temporary path under which to write ``target``.

        Args:
            target: The output.
            folder: True for a folder; the caller has made sure that one of that name may be replaced.
            force: Like the set's ``force``, for this file alone.

        Raises:
            OutputError: ``target`` exists and ``force`` is off, is an input, is a folder instead of a file or
                the other way round, is or holds neither (`refuse_special`), or its folder can't be written.
        """
        refuse_inputs([target], self._reads)
        force = self._force if force is None else force
        if target.name in ("", ".."):
            raise OutputError(
                f"the output {target} has no name of its own, so it can't get a temporary one",
                f"give the folder's name: {target.resolve()}",
            )
        # One look for all of the set: a link on the way may lead elsewhere before it is complete.
        target = self._folders.setdefault(target.parent, itself(target.parent)) / target.name
        if target.parent not in {entry.target.parent for entry in self._staged}:
            tidy(target.parent)
        if folder:
            _refuse_replacing_folder(target, force)
        else:
            refuse_replacing([target], force)
        make_parent(target)
        with output_errors(target):
            entry = self._leases.staged(target)
        self._staged.append(entry)
        if not force:
            self._kept.append(target)
        return entry.path

    def commit(self, check: Callable[[], object] | None = None) -> None:
        """Sync every staged file and give each its own name.

        Args:
            check: Function that raises if the output must not be replaced after all. Called while no other
                process can give names in the folder.

        Raises:
            OutputError: A file can't be written or renamed, or another process has written it in the meantime
                and ``force`` is off.
            InputChangedError: An input has changed, see `lora_export.storage.inputs`.
        """
        if not self._staged:
            return
        with output_errors(self._staged[-1].target):
            for entry in self._staged:
                sync_tree(entry.path)
        folders = list(dict.fromkeys(entry.target.parent for entry in self._staged))
        with locked(folders):
            # Another process may have been here, and may have been killed between its renames.
            for folder in folders:
                tidy(folder, held=folders)
            refuse_inputs([entry.target for entry in self._staged], self._reads)
            _refuse(_existing(self._kept))
            targets = [entry.target for entry in self._staged]
            refuse_special(targets)
            # Before they are judged: what comes later is found when they are renamed.
            known = {path: frozenset(places_below(path)) for path in targets if is_folder(path)}
            if check is not None:
                check()
            if self._listed:
                refuse_changed_inputs()
            try:
                give_names(self._staged, self._leases.mark, self._remember, listed=self._listed, known=known)
            except StuckError:
                self._is_stuck = True
                raise
            forget_inputs(entry.target for entry in self._staged)
            self._close()

    def _remember(self) -> None:
        self._leases.first.remember(self._staged)


def refuse_existing(targets: list[Path], force: bool) -> None:
    """Raise `OutputError` naming every target that already exists, unless ``force`` is set.

    What is neither a file nor a folder is refused always (`refuse_special`).
    """
    refuse_special(targets)
    if force:
        return
    existing = _existing(targets)
    # A set that an ended run left between two renames is finished or put back first.
    if existing:
        for folder in {target.parent for target in targets}:
            tidy(folder)
        existing = _existing(targets)
    _refuse(existing)


def refuse_special(targets: Iterable[Path]) -> None:
    """Raise `OutputError` for each target that is a device, a pipe or a socket, or a link to one.

    An output replaces what has its name: ``/dev/stdout`` would be a file for every program from then on.
    """
    if found := [
        f"{target}: is not a regular file but {what}" for target in targets if (what := special(target))
    ]:
        raise OutputError(
            "an output can't replace what is neither a file nor a folder, even with --force",
            "name a file; for output on the terminal use --json",
            found[:_SHOWN],
        )


def _refuse_replacing_folder(folder: Path, force: bool) -> None:
    """Raise `OutputError` for an existing folder, unless ``force``; always for a file or special content."""
    refuse_existing([folder], force)
    if is_file(folder):
        raise OutputError(f"{folder} is a file, but the output is a folder", _ANOTHER_NAME)
    if is_folder(folder) and not is_link(folder):
        with output_errors(folder):
            refuse_special(all_below(folder))


def _existing(targets: list[Path]) -> list[str]:
    return [str(target) for target in targets if is_there(target)]


def _refuse(existing: list[str]) -> None:
    if existing:
        raise OutputError(
            "the output exists already", "choose another name, or give --force (force=True)", existing
        )


def refuse_replacing(files: list[Path], force: bool, reads: Iterable[Path] = ()) -> None:
    """Raise `OutputError` for files that already exist, unless ``force``; for folders and inputs always."""
    refuse_inputs(files, reads)
    folders = [str(file) for file in files if is_folder(file)]
    if folders:
        raise OutputError(
            "a folder of the output's name exists, but the output is a file", _ANOTHER_NAME, folders
        )
    refuse_existing(files, force)


def places_of(path: Path) -> set[Path]:
    """Return a file's path and its target: files of a Hugging Face cache are links."""
    return set(map(Path, _places_of(path, os.path.realpath)))


def _places_of(path: Path, resolved: Callable[[Path], str]) -> set[str]:
    if path.name in ("", ".."):
        return {resolved(path)}
    place = os.path.join(resolved(path.parent), path.name)  # noqa: PTH118 - text, for the comparisons below
    return {place, os.path.realpath(place)} if is_link(place) else {place}


@contextlib.contextmanager
def reading(files: Iterable[Path]) -> Iterator[None]:
    """Refuse to replace ``files`` within the block, for example a recipe while its steps run."""
    token = _READ_ABOVE.set((*_READ_ABOVE.get(), *files))
    try:
        yield
    finally:
        _READ_ABOVE.reset(token)


def refuse_inputs(targets: Iterable[Path], reads: Iterable[Path]) -> None:
    """Raise `OutputError` if an output would replace a file that was read, with or without ``force``."""
    replaced = _search([*reads, *_READ_ABOVE.get()])
    both = [
        f"{target}" if path == target else f"{target} is {path}"
        for target in targets
        for path in replaced(target)[:1]
    ]
    if both:
        raise OutputError("the output would replace a file that is read", _ANOTHER_NAME, both)


def replaced_inputs(target: Path, reads: Iterable[Path]) -> list[Path]:
    """Return the files that writing ``target`` would replace: itself under any name or link, or files in it.

    Args:
        target: A file or folder to write.
        reads: The files that were read.
    """
    return _search(reads)(target)


def _search(reads: Iterable[Path]) -> Callable[[Path], list[Path]]:
    """Return `replaced_inputs` of these files, which are looked up once for all outputs."""
    resolved = functools.cache(os.path.realpath)  # files share folders
    known = [(path, _places_of(path, resolved)) for path in dict.fromkeys(reads)]

    def replaced(target: Path) -> list[Path]:
        own, identity = _places_of(target, resolved), _identity(target)
        folders = tuple(os.path.join(place, "") for place in own)  # noqa: PTH118
        return [
            path
            for path, places in known
            if places & own
            or any(place.startswith(folders) for place in places)
            or (identity is not None and identity == _identity(path))
        ]

    return replaced


def _identity(path: Path) -> tuple[int, int] | None:
    """Return an identity that hard links share."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def make_parent(target: Path) -> None:
    """Create the folder of ``target``; raise `OutputError` if it can't be created or written."""
    check_parent(target)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)


def check_parent(target: Path) -> None:
    """Raise `OutputError` if the folder of ``target`` can't be created or written; nothing is created."""
    above = next((path for path in target.absolute().parents if exists(path)), Path())
    if not is_folder(above):
        raise OutputError(f"cannot write {target}: {above} is a file, not a folder", _ANOTHER_NAME)
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {above}", "choose a folder that you may write to")


def sync_tree(path: Path) -> None:
    """Flush a file, or each file of a folder, to the disk."""
    if is_folder(path):
        for child in all_below(path):
            sync_path(child)
    sync_path(path)


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn an `OSError` from writing into an `OutputError` about ``target``."""
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
