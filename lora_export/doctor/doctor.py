"""Report what this machine can do: its GPUs, its installed packages, and what follows from both."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.doctor.checks import Capability, Machine, capabilities
from lora_export.engines.cache import default_folder
from lora_export.machines.local_gpus import LocalGpus, local_gpus
from lora_export.machines.packages import PACKAGES, Package, read_lines
from lora_export.storage.commit.leftovers import tidy
from lora_export.storage.commit.told import listening

# Importing all packages takes 4 s on a slow machine, and 100 s from a cold network disk.
_TIMEOUT_S = 240


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """Everything that `lora-export doctor` reports.

    Attributes:
        version: Version of lora-export.
        python: Version of Python.
        platform: Operating system and processor.
        gpus: The driver's answer.
        packages: Result of importing each package.
        capabilities: Each capability with the reason why it works or not, and the command that fixes it.
        leftovers: Files that earlier runs left when they were stopped, and what was done about them.
    """

    version: str
    python: str
    platform: str
    gpus: LocalGpus
    packages: tuple[Package, ...]
    capabilities: tuple[Capability, ...]
    leftovers: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def examine() -> DoctorReport:
    """Examine this machine and remove what stopped runs left behind; nothing broken raises an error."""
    gpus, packages = local_gpus(), probe_packages()
    return DoctorReport(
        version=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        gpus=gpus,
        packages=packages,
        capabilities=capabilities(Machine(gpus, {package.name: package for package in packages})),
        leftovers=tuple(_leftovers()),
    )


def _leftovers() -> list[str]:
    """Tidy the current and temporary folders and the engine cache; return a line for each thing found."""
    lines: list[str] = []
    folders = [Path(), default_folder()]
    with contextlib.suppress(OSError):  # the folder is missing or full
        folders.append(Path(tempfile.gettempdir()))
    for folder in folders:
        with listening(lines.append):
            tidy(folder)
    return lines


def probe_packages(names: Sequence[str] = tuple(PACKAGES)) -> tuple[Package, ...]:
    """Import packages in a separate process and return what happened.

    One process imports all of them. If a package ends that process, the package counts as ``broken``, and a
    new process imports the rest.

    Args:
        names: Names in `PACKAGES`.
    """
    found: dict[str, Package] = {}
    while left := [name for name in names if name not in found]:
        output, death = _run_probe(left)
        results, importing = read_lines(output)
        found.update({result.name: result for result in results})
        # The process ended before any import: no package can be examined.
        guilty = [importing] if importing else [name for name in left if death and name not in found]
        found.update({name: Package(name=name, status="broken", reason=death) for name in guilty})
    return tuple(found[name] for name in names)


def _run_probe(names: Sequence[str]) -> tuple[str, str]:
    """Return what the probe printed, and why it ended early, or ""."""
    # -P: a folder of the user's called "torch" is not a package. Our own folder comes last on the path, so
    # that the packages found are those that the command itself would import.
    own = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), own]))
    command = [sys.executable, "-P", "-m", "lora_export.machines.packages", *names]
    # Files, not pipes: what was printed before a timeout can still be read.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                timeout=_TIMEOUT_S,
                check=False,
            ).returncode
            death = _cause(code, _text_of(log))
        except subprocess.TimeoutExpired:
            death = f"its import was not done after {_TIMEOUT_S} s"
        return _text_of(out), death


def _text_of(file: Any) -> str:
    file.seek(0)
    return bytes(file.read()).decode(errors="replace")


def _cause(code: int, log: str) -> str:
    if code == 0:
        return ""
    lines = log.strip().splitlines()
    last = f": {lines[-1].strip()[:200]}" if lines else ""
    if code < 0:
        try:
            return f"Python was ended by {signal.Signals(-code).name} while importing it{last}"
        except ValueError:
            return f"Python was ended by signal {-code} while importing it{last}"
    return f"Python ended with exit code {code} while importing it{last}"
