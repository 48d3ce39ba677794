"""GPUs that engines are built for: data in ``targets.toml``, found by the names that people use."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lora_export.errors import BackendError

# Compute capabilities that TensorRT-RTX can build for; a test compares them with the package's own list.
RTX_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
COMPILERS = ("tensorrt-rtx", "tensorrt")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4", "fp4")
COMPUTE_CAPABILITIES_SOURCE = "https://developer.nvidia.com/cuda-gpus"

_HINT = "lora-export targets lists them"
_GIB = 2**30
_COMPUTE_CAPABILITY = re.compile(r"^(?:sm[\s_-]?(\d{1,2})(\d)|(\d{1,2})\.(\d))$")
# Words that some people write and others leave out: "NVIDIA GeForce RTX 4090", "RTX 6000 Ada Generation".
_OPTIONAL_WORDS = re.compile(
    r"\b(nvidia|geforce|tesla|jetson|gpu|generation|blackwell|workstation|edition|module)\b"
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, or all GPUs of one compute capability.

    Attributes:
        name: Name that the user types: ``rtx-4090``; ``sm89`` for all of one compute capability.
        label: The vendor's name for it.
        compute_capability: ``8.9``.
        memory_bytes: Memory on the board; a vendor's "GB" of GPU memory is 2**30 bytes. A program gets
            less: ECC and the driver take 1 to 8 %, and shared memory also serves the system.
        bandwidth_bytes_s: Bandwidth of that memory; a vendor's "GB/s" is 1e9 bytes a second.
        precisions: Those of `PRECISIONS` that its tensor cores multiply; ``int4`` for weights only.
        compilers: Those of `COMPILERS` that build for it.
        shared_memory: True if the CPU uses the same memory.
        source: The vendor's page that states memory and bandwidth.
    """

    name: str
    label: str
    compute_capability: str
    memory_bytes: int | None
    bandwidth_bytes_s: int | None
    precisions: frozenset[str]
    compilers: tuple[str, ...]
    shared_memory: bool
    source: str

    @property
    def sm(self) -> str:
        """The compute capability as compilers write it: ``sm89``."""
        return f"sm{self.compute_capability.replace('.', '')}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "label": self.label,
            "compute_capability": self.compute_capability,
            "memory_bytes": self.memory_bytes,
            "bandwidth_bytes_s": self.bandwidth_bytes_s,
            "precisions": [name for name in PRECISIONS if name in self.precisions],
            "compilers": list(self.compilers),
            "shared_memory": self.shared_memory,
            "source": self.source,
        }


def load_targets() -> dict[str, Gpu]:
    """Return all GPUs by name, in the order of the file."""
    return dict(_catalogue()[0])


def find_target(name: str) -> Gpu:
    """Return the GPU that a name means.

    Args:
        name: ``rtx-4090``, in any spelling that people use (``RTX 4090``, ``NVIDIA GeForce RTX 4090``), or a
            compute capability (``sm89``, ``8.9``), which stands for all of its GPUs.

    Raises:
        BackendError: No GPU has that name; the message suggests similar names.
    """
    targets, keys = _catalogue()
    if matched := _COMPUTE_CAPABILITY.match(name.strip().lower()):
        major, minor = (found for found in matched.groups() if found is not None)
        return _any_of(f"{int(major)}.{minor}")
    key = _key(name)
    if key in keys:
        return targets[keys[key]]
    raise BackendError(f"no GPU is called {name!r}{_did_you_mean(key, keys)}", _HINT)


def gpus_of(compute_capability: str) -> tuple[Gpu, ...]:
    """Return the GPUs of one compute capability (``8.9``)."""
    return tuple(t for t in _catalogue()[0].values() if t.compute_capability == compute_capability)


def known_compute_capabilities() -> tuple[str, ...]:
    """Return the compute capabilities that engines can be built for, in order."""
    return tuple(_data()["precisions"])


def select_targets(
    words: Sequence[str] = (),
    *,
    compiler: str | None = None,
    compute_capability: str | None = None,
    precision: str | None = None,
    min_memory_gb: float | None = None,
) -> list[Gpu]:
    """Return the GPUs that meet all conditions.

    Args:
        words: Words that all occur in the name or label, in any spelling.
        compiler: Compiler that builds for the GPU.
        compute_capability: ``8.9`` or ``sm89``.
        precision: Precision that its tensor cores multiply.
        min_memory_gb: Least memory; a GPU whose memory is unknown is left out.

    Raises:
        BackendError: No GPU has that compute capability.
    """
    capability = _capability_of(compute_capability) if compute_capability else None
    return [
        target
        for target in _catalogue()[0].values()
        if all(_has(target, word) for word in words)
        and compiler in (None, *target.compilers)
        and capability in (None, target.compute_capability)
        and precision in (None, *target.precisions)
        and (min_memory_gb is None or (target.memory_bytes or 0) >= min_memory_gb * _GIB)
    ]


def _has(target: Gpu, word: str) -> bool:
    """Return True if a word occurs in a GPU's name or label."""
    if key := _key(word):
        return key in f"{_key(target.name)} {_key(target.label)}"
    # A word that spellings leave out, alone: jetson chooses by the labels, nvidia fits every GPU.
    plain = word.strip().lower()
    if any(plain in other.label.lower() for other in _catalogue()[0].values()):
        return plain in target.label.lower()
    return True


def _capability_of(text: str) -> str:
    """Return the compute capability that a text states, or that of the GPU it names."""
    try:
        return find_target(text).compute_capability
    except BackendError as error:
        if not _COMPUTE_CAPABILITY.match(text.strip().lower()):
            known = ", ".join(known_compute_capabilities())
            error.message = f"{text!r} is not a compute capability ({known}), and {error.message}"
        raise


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((files(__package__) / "targets.toml").read_text(encoding="utf-8"))


@cache
def _catalogue() -> tuple[dict[str, Gpu], dict[str, str]]:
    """Return the GPUs by name, and all spellings: key → name."""
    targets: dict[str, Gpu] = {}
    keys: dict[str, str] = {}
    for family in _data()["family"]:
        for name, gpu in family["gpus"].items():
            targets[name] = _target(name, {**family, **gpu})
            for spelling in (name, *gpu.get("aliases", ())):
                keys[_key(spelling)] = name
    # A label never takes a name away from another GPU ("RTX 3060 12GB" is not "RTX 3060").
    for name, target in targets.items():
        keys.setdefault(_key(target.label), name)
    return targets, keys


def _target(name: str, row: dict[str, Any]) -> Gpu:
    memory, bandwidth = row.get("memory_gb"), row.get("bandwidth_gb_s")
    return Gpu(
        name=name,
        label=row["label"],
        compute_capability=row["compute_capability"],
        memory_bytes=None if memory is None else round(memory * _GIB),
        bandwidth_bytes_s=None if bandwidth is None else round(bandwidth * 1e9),
        precisions=frozenset(_data()["precisions"][row["compute_capability"]]),
        compilers=tuple(row["compilers"]),
        shared_memory=row.get("shared_memory", False),
        source=row["source"],
    )


def _any_of(compute_capability: str) -> Gpu:
    """Return a target that stands for all GPUs of a compute capability."""
    known = known_compute_capabilities()
    if compute_capability not in known:
        raise BackendError(
            f"no GPU here has compute capability {compute_capability} (there are: {', '.join(known)})", _HINT
        )
    rtx = compute_capability in RTX_COMPUTE_CAPABILITIES
    return Gpu(
        name=f"sm{compute_capability.replace('.', '')}",
        label=f"any GPU of compute capability {compute_capability}",
        compute_capability=compute_capability,
        memory_bytes=None,
        bandwidth_bytes_s=None,
        precisions=frozenset(_data()["precisions"][compute_capability]),
        compilers=COMPILERS if rtx else COMPILERS[1:],
        shared_memory=False,
        source=COMPUTE_CAPABILITIES_SOURCE,
    )


def _key(name: str) -> str:
    """Return a name without the characters and words in which spellings differ."""
    words = _OPTIONAL_WORDS.sub(" ", re.sub(r"[_-]", " ", name.lower()))
    return re.sub(r"[^a-z0-9]", "", words)


def _did_you_mean(key: str, keys: dict[str, str]) -> str:
    longer = [name for spelling, name in keys.items() if key and spelling.startswith(key)]
    close = [keys[found] for found in difflib.get_close_matches(key, keys, n=4, cutoff=0.7)]
    near = list(dict.fromkeys([*longer, *close]))[:4]
    return f"; did you mean {' or '.join(near)}?" if near else ""
