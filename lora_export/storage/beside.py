"""Small files that several outputs of a folder share: those that are there already, and equal, stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_export.errors import OutputError
from lora_export.storage.outputs import OutputSet
from lora_export.untrusted.places import is_file, is_there


def without_equal(files: Mapping[Path, bytes]) -> dict[Path, bytes]:
    """Return those of some files that are not there yet, or with another content."""
    return {path: content for path, content in files.items() if not _is_equal(path, content)}


def stage_beside(outputs: OutputSet, files: Mapping[Path, bytes], force: bool) -> Callable[[], None]:
    """Write files, but for those that are there already, as a part of a set.

    Args:
        outputs: The set.
        files: Path → content.
        force: Replace those with another content.

    Returns:
        The check for `OutputSet.commit`: another process may have written others meanwhile, and the folder
        would hold files of both.

    Raises:
        OutputError: A file of another content exists, or can't be written.
    """
    staged = without_equal(files)
    for path, content in staged.items():
        # Another process may write the same before this set is complete: that is looked at in the end.
        outputs.stage(path, force=force or not is_there(path)).write_bytes(content)

    def check() -> None:
        others = [
            str(path) for path in without_equal(files) if path not in staged or (not force and is_there(path))
        ]
        if others:
            raise OutputError(
                "another process has written other files beside the output meanwhile",
                "run it again when that has ended, or choose another folder",
                others,
            )

    return check


def _is_equal(path: Path, content: bytes) -> bool:
    # By size first: what lies there may be of any size.
    return is_file(path) and path.stat().st_size == len(content) and path.read_bytes() == content
