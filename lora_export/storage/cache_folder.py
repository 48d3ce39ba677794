"""Find the user's folder for what is kept to be used again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the folder for one kind of thing, in the user's cache folder (``$XDG_CACHE_HOME``)."""
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / "lora-export" / kind


def is_private(folder: Path) -> bool:
    """Return whether a folder is the user's own, and no one else may write to it; True if it is not there."""
    if not hasattr(os, "geteuid"):
        return True
    try:
        state = folder.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return state.st_uid == os.geteuid() and not state.st_mode & 0o022


def chosen_folder() -> Path | None:
    """Return the folder that the user has chosen with ``$LORA_EXPORT_CACHE``, if any."""
    chosen = os.environ.get("LORA_EXPORT_CACHE")
    return Path(chosen) if chosen else None
