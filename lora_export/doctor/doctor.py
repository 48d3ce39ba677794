"""What this machine can do: its GPUs, the packages that are installed, and what follows from both."""

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

# Importing everything takes four seconds on a slow machine, and a hundred from a cold network disk.
_TIMEOUT_S = 240


@dataclass(frozen=True)
class DoctorReport:
    """The whole result.

    Attributes:
        version: Of lora-export.
        python: Version of Python.
        platform: Operating system and processor.
        gpus: What the driver says.
        packages: What came of importing each.
        capabilities: What works, why, and what would mend it.
        leftovers: What runs that were ended have left, and what was done about it.
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
    """Look at this machine; nothing that is broken raises. What ended runs have left here is put in order."""
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
    """Tidy the current folder, the system's temporary one and the engines' cache; return what there was."""
    lines: list[str] = []
    folders = [Path(), default_folder()]
    with contextlib.suppress(OSError):  # there is none, or no room in it
        folders.append(Path(tempfile.gettempdir()))
    for folder in folders:
        with listening(lines.append):
            tidy(folder)
    return lines


def probe_packages(names: Sequence[str] = tuple(PACKAGES)) -> tuple[Package, ...]:
    """Import packages in a process of their own.

    One process does all of them. Only if a package ends it, which makes that one ``broken``, another process
    goes on behind it.

    Args:
        names: Of `PACKAGES`.
    """
    found: dict[str, Package] = {}
    while left := [name for name in names if name not in found]:
        output, death = _run_probe(left)
        results, importing = read_lines(output)
        found.update({result.name: result for result in results})
        # Without an import to blame, no package can be looked at.
        guilty = [importing] if importing else [name for name in left if death and name not in found]
        found.update({name: Package(name, "broken", reason=death) for name in guilty})
    return tuple(found[name] for name in names)


def _run_probe(names: Sequence[str]) -> tuple[str, str]:
    """Return what the probe printed, and what it died of, or ""."""
    # -P: a folder of the user's called "torch" is no package. Our own place comes last, so that what is found
    # is what the command itself would import.
    own = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), own]))
    command = [sys.executable, "-P", "-m", "lora_export.machines.packages", *names]
    # Files, not pipes: what was printed before a timeout is there to read.
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
    said = f": {lines[-1].strip()[:200]}" if lines else ""
    if code < 0:
        try:
            return f"Python was ended by {signal.Signals(-code).name} while importing it{said}"
        except ValueError:
            return f"Python was ended by signal {-code} while importing it{said}"
    return f"Python ended with exit code {code} while importing it{said}"
