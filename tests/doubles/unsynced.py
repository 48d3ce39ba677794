"""`os.fsync` without the disk: files of tests are gone in a moment, and a flushed one is slow to remove.

Milliseconds each, thousands of times. That a file is flushed, and what happens when that fails, is tested
with `faults`, which counts the calls; processes of their own (the demos) flush really.
"""

from __future__ import annotations

import os
from typing import Any


def unsynced() -> None:
    """Let `os.fsync` check the file's descriptor and nothing else, in this process."""
    os.fsync = _checked


def _checked(file: Any) -> None:
    os.fstat(file if isinstance(file, int) else file.fileno())
