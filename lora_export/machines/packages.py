"""Import packages and print what happened: ``python -m lora_export.machines.packages [PACKAGE …]``.

It runs in a separate process, because a package with broken libraries can end the process that imports it. It
prints a line of JSON before each import and one after it, so that the reader knows which import was the last.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

from lora_export.untrusted.documents import DocumentError, parse_json
from lora_export.untrusted.fields import FieldError, from_plain

Status = Literal["ok", "missing", "broken"]
_REASON_LENGTH = 300


@dataclass(frozen=True, kw_only=True)
class Package:
    """Result of importing a package.

    Attributes:
        name: Name that Python imports.
        status: ``missing``: not installed; ``broken``: installed, but can't be imported.
        version: Version of the package, or "".
        distribution: pip's name for it, or "" if pip did not install it.
        reason: Error of the import, or "".
        details: Facts on this machine: ``providers`` of onnxruntime, ``compute_capabilities`` of
            TensorRT-RTX, the ``cuda`` version that torch was built with.
    """

    name: str
    status: Status
    version: str = ""
    distribution: str = ""
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(asdict(self))


# Name that Python imports → names that pip may have for it: the first that is installed counts, the last has
# no CUDA variant in it.
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnxscript": ("onnxscript",),
    "peft": ("peft",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "onnxruntime_genai": ("onnxruntime-genai-cuda", "onnxruntime-genai"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    "cuda.bindings": ("cuda-bindings",),
}


def _torch(module: Any) -> dict[str, Any]:
    return {"cuda": module.version.cuda}


def _onnxruntime(module: Any) -> dict[str, Any]:
    return {"providers": module.get_available_providers()}


def _tensorrt_rtx(module: Any) -> dict[str, Any]:
    names = [name[2:] for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    return {"compute_capabilities": [f"{name[:-1]}.{name[-1]}" for name in names]}


def _cuda_bindings(module: Any) -> dict[str, Any]:
    # Import the part that we use: the package itself loads no library.
    import_module(f"{module.__name__}.runtime")
    return {}


_DETAILS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "tensorrt_rtx": _tensorrt_rtx,
    "cuda.bindings": _cuda_bindings,
}


def probe(name: str) -> Package:
    """Import a package and return the result; an error becomes the reason."""
    if not _is_installed(name):
        return Package(name=name, status="missing")
    distribution, number = _installed(name)
    try:
        module = import_module(name)
        details = _DETAILS[name](module) if name in _DETAILS else {}
    except (Exception, SystemExit) as error:
        return Package(
            name=name,
            status="broken",
            version=number,
            distribution=distribution,
            reason=_short(f"{type(error).__name__}: {error}"),
        )
    number = number or str(getattr(module, "__version__", ""))
    return Package(name=name, status="ok", version=number, distribution=distribution, details=details)


def _is_installed(name: str) -> bool:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    # A folder of that name without Python in it is not a package: a leftover, or the user's own.
    return spec is not None and spec.origin is not None


def _installed(name: str) -> tuple[str, str]:
    for distribution in PACKAGES.get(name, (name,)):
        try:
            return distribution, version(distribution)
        except PackageNotFoundError:
            continue
    return "", ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON_LENGTH else f"{line[: _REASON_LENGTH - 1]}…"


def read_lines(text: str) -> tuple[list[Package], str]:
    """Read what `main` printed.

    Returns:
        The packages that were finished, and the one whose import had begun and not ended, or "".
    """
    done, importing = [], ""
    for line in text.splitlines():
        try:
            data = parse_json(line)
            importing = str(data.get("importing", "")) if isinstance(data, dict) else ""
            if not importing:
                done.append(from_plain(Package, data))
        except (DocumentError, FieldError):
            continue  # cut off where the process ended
    return done, importing


def main(names: list[str]) -> None:
    """Import packages and print lines of JSON."""
    # Some packages print when they are imported: that goes to stderr, so that the JSON lines stay readable.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for name in names or list(PACKAGES):
            print(json.dumps({"importing": name}), file=out, flush=True)
            print(probe(name).to_json(), file=out, flush=True)
        # Some libraries crash while they are unloaded, when the results are already printed.
        os._exit(0)


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of packages; those not installed are left out."""
    found = {name: _version(name) for name in names}
    return {name: number for name, number in found.items() if number is not None}


@functools.cache  # each reads a file of all that pip says of a package
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
    else:
        main(sys.argv[1:])
