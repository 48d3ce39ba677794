"""Read how much memory this process uses: the host's from the system, a GPU's from the driver's tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lora_export.untrusted.places import is_file

_STATUS = Path("/proc/self/status")
_TIMEOUT_S = 20
_MIB = 1 << 20


@dataclass(frozen=True)
class HostMemory:
    """Host memory of this process.

    Attributes:
        resident_bytes: Memory in use now; None if the system doesn't say.
        file_bytes: Part of it in pages of mapped files, such as a graph's weights; other processes that map
            the same file share them.
        peak_bytes: Largest memory in use so far.
    """

    resident_bytes: int | None
    file_bytes: int | None
    peak_bytes: int


def host_memory() -> HostMemory:
    """Return this process's memory; systems other than Linux tell the peak alone."""
    if not is_file(_STATUS):
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
    """Return the bytes of GPU memory in use and a text on what they count, or None if the driver doesn't say.

    They are this process's if the driver lists it, otherwise the whole GPU's.
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
