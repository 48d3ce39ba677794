"""Find the GPUs of this machine with ``nvidia-smi``, the driver's tool, which needs no Python package."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from lora_export.errors import BackendError
from lora_export.machines.targets import find_target

_COMMAND = ("--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader")
_TIMEOUT_S = 20
_MIB = 2**20
# What nvidia-smi prints where it has no answer, as for memory that the CPU shares.
_NONE = r"\[.+\]|N/A"
_LINE = re.compile(
    rf"^(?P<name>[^,]+), (?P<cc>\d+\.\d|{_NONE}), (?P<memory>\d+ MiB|{_NONE}), (?P<driver>[\d.]+|{_NONE})$"
)


@dataclass(frozen=True, kw_only=True)
class LocalGpu:
    """One GPU.

    Attributes:
        name: The driver's name for it.
        compute_capability: ``8.9``, or None where the driver doesn't say.
        memory_bytes: Memory that programs can get, or None where the CPU shares it.
        driver: The driver's version, or "".
        target: Its name in ``targets.toml``, or None if it isn't there.
    """

    name: str
    compute_capability: str | None
    memory_bytes: int | None
    driver: str
    target: str | None


@dataclass(frozen=True)
class LocalGpus:
    """The driver's answer.

    Attributes:
        gpus: GPUs in the driver's order.
        problem: The reason if there is no GPU or one can't be read, or "".
    """

    gpus: tuple[LocalGpu, ...]
    problem: str = ""


def local_gpus() -> LocalGpus:
    """Return the GPUs that ``nvidia-smi`` lists; a failure of any kind is described in `problem`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return LocalGpus((), "no NVIDIA GPU found (nvidia-smi is missing)")
    try:
        done = subprocess.run(
            [tool, *_COMMAND],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return LocalGpus((), f"nvidia-smi did not answer in {_TIMEOUT_S} s")
    except OSError as error:
        return LocalGpus((), f"nvidia-smi can't be run: {error.strerror or error}")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        # nvidia-smi prints its errors on stdout.
        complaint = next(iter([*lines, *done.stderr.splitlines()]), f"exit code {done.returncode}")
        return LocalGpus((), f"nvidia-smi failed: {complaint}")
    if not lines:
        return LocalGpus((), "no NVIDIA GPU found (nvidia-smi lists none)")
    found = [_gpu(line) for line in lines]
    gpus = tuple(gpu for gpu in found if gpu)
    if len(gpus) < len(found):
        return LocalGpus(gpus, f"can't read this line of nvidia-smi: {lines[found.index(None)][:80]!r}")
    return LocalGpus(gpus)


def _gpu(line: str) -> LocalGpu | None:
    matched = _LINE.match(line)
    if matched is None:
        return None
    target = _target_of(matched["name"])
    known = find_target(target).compute_capability if target else None
    return LocalGpu(
        name=matched["name"],
        compute_capability=matched["cc"] if matched["cc"][0].isdigit() else known,
        memory_bytes=int(matched["memory"].split()[0]) * _MIB if matched["memory"][0].isdigit() else None,
        driver=matched["driver"] if matched["driver"][0].isdigit() else "",
        target=target,
    )


def _target_of(name: str) -> str | None:
    try:
        return find_target(name).name
    except BackendError:
        return None
