"""Read the machine, its packages and its load, to report with measured times."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_export.machines.local_gpus import local_gpus
from lora_export.machines.packages import package_versions

_PACKAGES = (
    *("lora-export", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu13"),
    *("tensorrt-rtx", "tensorrt-rtx-cu13", "cuda-bindings"),
)
_CPU = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Everything apart from the models that measured times depend on.

    Attributes:
        cpu: The processor's name.
        cores: Logical cores that this process may use.
        physical_cores: Cores of the machine without hyper-threads; None if unknown.
        cpu_quota: Number of cores that a container's CPU limit allows; None if no limit is known.
        memory_bytes: The machine's memory; None if unknown.
        governor: Linux's policy for the CPU's frequency, or "unknown".
        turbo: ``on``, ``off`` or ``unknown``.
        system: Operating system and processor.
        python: Version of Python.
        packages: Versions of the packages that matter, if installed.
        omp_num_threads: The variable OMP_NUM_THREADS, or "".
        gpus: Name and driver version of each GPU; empty where no GPU is used.
    """

    cpu: str
    cores: int
    physical_cores: int | None
    cpu_quota: float | None
    memory_bytes: int | None
    governor: str
    turbo: str
    system: str
    python: str
    packages: Mapping[str, str]
    omp_num_threads: str
    gpus: tuple[str, ...]


def read_environment(with_gpus: bool) -> Environment:
    """Read the machine's facts; what can't be read is None or "unknown"."""
    name, physical = _cpu()
    gpus = local_gpus().gpus if with_gpus else ()
    return Environment(
        cpu=name,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        physical_cores=physical,
        cpu_quota=_quota(),
        memory_bytes=_memory_bytes(),
        governor=_first_line(_CPU / "cpu0" / "cpufreq" / "scaling_governor") or "unknown",
        turbo=_turbo(),
        system=platform.platform(),
        python=sys.version.split()[0],
        packages=package_versions(_PACKAGES),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS", ""),
        gpus=tuple(f"{gpu.name}, driver {gpu.driver or 'unknown'}" for gpu in gpus),
    )


def load_average() -> tuple[float, ...] | None:
    """Return how many programs wanted to run, on average over 1, 5 and 15 minutes; None where unknown."""
    try:
        return tuple(round(value, 2) for value in os.getloadavg())
    except (OSError, AttributeError):
        return None


def _cpu() -> tuple[str, int | None]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), None
    blocks = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in text.split("\n\n")
    ]
    names = [block["model name"] for block in blocks if "model name" in block]
    cores = {(block["physical id"], block["core id"]) for block in blocks if "core id" in block}
    return names[0] if names else platform.machine(), len(cores) or None


def _quota() -> float | None:
    quota, _, period = _first_line(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _turbo() -> str:
    off = _first_line(_CPU / "intel_pstate" / "no_turbo")
    boost = _first_line(_CPU / "cpufreq" / "boost")
    return {"0": "on", "1": "off"}.get(off) or {"1": "on", "0": "off"}.get(boost) or "unknown"


def _first_line(path: Path) -> str:
    try:
        return (path.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[0].strip()
    except OSError:
        return ""
