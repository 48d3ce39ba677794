"""How much memory this process takes: the host's from the system, a GPU's from the driver's own tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_TIMEOUT_S = 20
_MIB = 1 << 20


@dataclass(frozen=True)
class HostMemory:
    """What this process has of the host's memory.

    Attributes:
        resident_bytes: In memory now; None where the system doesn't say.
        file_bytes: Of these, pages of files that are mapped, such as a graph's weights; other processes
            that map the same file share them.
        peak_bytes: The most that it ever had.
    """

    resident_bytes: int | None
    file_bytes: int | None
    peak_bytes: int


def host_memory() -> HostMemory:
    """Ask Linux for this process's memory; other systems tell the peak alone."""
    if not _STATUS.is_file():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return HostMemory(None, None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    lines = (line.split(":") for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    sizes = {name: text.split() for name, text in lines}
    resident, file, peak = (
        int(sizes[name][0]) * 1024 if name in sizes else None for name in ("VmRSS", "RssFile", "VmHWM")
    )
    return HostMemory(resident, file, peak or 0)


def gpu_memory() -> tuple[int, str] | None:
    """Return the bytes of GPU memory in use and whose they are, or None where the driver doesn't say.

    Those of this process where the driver knows it, else of the whole GPU.
    """
    own = _ask("--query-compute-apps=pid,used_memory")
    for line in own:
        pid, _, used = line.partition(", ")
        if pid == str(os.getpid()) and used.isdigit():
            return int(used) * _MIB, "this process's"
    whole = _ask("--query-gpu=memory.used")
    if whole and whole[0].isdigit():
        return int(whole[0]) * _MIB, "the whole GPU's, other programs' changes included"
    return None


def _ask(query: str) -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
