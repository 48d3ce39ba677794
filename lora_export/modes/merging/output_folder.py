"""Refuse folders as outputs that must not be replaced."""

from __future__ import annotations

from pathlib import Path

from lora_export.base.history.history import MANIFEST
from lora_export.errors import OutputError
from lora_export.storage.folders import listed_files, refuse_strangers
from lora_export.untrusted.places import exists, is_folder


def refuse_output(target: Path, base: Path, force: bool) -> None:
    """Refuse to write into the base, and to replace a folder that is not a merged model.

    Args:
        target: The folder to write.
        base: The base's folder.
        force: Replace a folder that an earlier run has written.

    Raises:
        OutputError: The output is in the base, or would replace a folder that no run has written.
    """
    if base.resolve() in target.resolve().parents:
        raise OutputError(
            f"the output {target} is in the base {base}, and would be copied into itself",
            "choose another folder",
        )
    if not exists(target) or not force:
        return
    # A folder is removed as a whole: only one that an earlier merge wrote, never a model that somebody
    # trained.
    ours = is_folder(target) and (not any(target.iterdir()) or exists(target / MANIFEST))
    if not ours:
        raise OutputError(
            f"{target} has no {MANIFEST}, so no merge has written it: it is not replaced, even with --force",
            "choose another name, or remove it yourself",
        )
    refuse_strangers(target, listed_files(target / MANIFEST), "merged model")
