"""Say how much memory this process may have: the machine's, or what its container is given."""

from __future__ import annotations

import contextlib
from pathlib import Path

# Limit of the process's control group (cgroup v2), in containers: a number, or "max".
_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_here() -> tuple[int, int]:
    """Return the bytes of memory and swap that this process may have, and how many of them are free."""
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    there, free = memory.total + swap.total, memory.available + swap.free
    with contextlib.suppress(OSError, ValueError):
        limit = int(_LIMIT.read_text(encoding="ascii"))
        there, free = min(there, limit), min(free, limit)
    return there, free
