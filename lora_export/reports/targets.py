"""Write GPUs as a table."""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.machines.targets import PRECISIONS, Gpu
from lora_export.plan import align

_HEADINGS = ("target", "GPU", "compute", "memory", "bandwidth", "precisions", "compilers")
_GIB = 2**30
# Types that every GPU multiplies don't distinguish one.
_SHOWN_PRECISIONS = tuple(name for name in PRECISIONS if name not in ("fp32", "tf32"))


def target_lines(targets: Sequence[Gpu]) -> list[str]:
    """Return a table and its legend."""
    lines = align([_HEADINGS, *(_row(target) for target in targets)])
    if any(target.shared_memory for target in targets):
        lines.append("*: shared with the CPU")
    return lines


def hint_lines(targets: Sequence[Gpu]) -> list[str]:
    """Return lines on how to build for the GPUs."""
    rtx = next((target for target in targets if "tensorrt-rtx" in target.compilers), None)
    classic = next((target for target in targets if target.compilers == ("tensorrt",)), None)
    lines = []
    if rtx:
        lines.append(
            "tensorrt-rtx builds on any machine: "
            f"lora-export build-engine model.onnx --target {rtx.name} -o engines"
        )
    if classic:
        lines.append(f"tensorrt builds on a GPU of the same kind: an engine for {classic.name} on such a GPU")
    return lines


def _row(target: Gpu) -> tuple[str, ...]:
    memory = "–" if target.memory_bytes is None else f"{target.memory_bytes / _GIB:g} GB"
    bandwidth = "–" if target.bandwidth_bytes_s is None else f"{target.bandwidth_bytes_s / 1e9:g} GB/s"
    return (
        target.name,
        target.label,
        target.compute_capability,
        f"{memory}{'*' if target.shared_memory else ''}",
        bandwidth,
        " ".join(name for name in _SHOWN_PRECISIONS if name in target.precisions),
        ", ".join(target.compilers),
    )
