"""Find the user's folder for what is kept to be used again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the folder for one kind of thing, in the user's cache folder (``$XDG_CACHE_HOME``)."""
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / "lora-export" / kind


def chosen_folder() -> Path | None:
    """Return the folder that the user has chosen with ``$LORA_EXPORT_CACHE``, if any."""
    chosen = os.environ.get("LORA_EXPORT_CACHE")
    return Path(chosen) if chosen else None
