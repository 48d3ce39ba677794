"""Read where a check runs: the machine, and the versions of packages that its numbers depend on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lora_export.machines.environment import read_environment
from lora_export.machines.packages import package_versions

_PACKAGES = ("torch", "transformers")


def environment(runtime: str, provider: str) -> dict[str, Any]:
    """Return the machine, packages, runtime and provider."""
    found = asdict(read_environment(with_gpus=provider == "cuda"))
    found["packages"] |= package_versions(_PACKAGES)
    return {"runtime": runtime, "provider": provider, **found}
