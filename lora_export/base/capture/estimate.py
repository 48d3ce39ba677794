"""Estimate what a capture takes before it starts, and refuse one that this machine has no room for.

The rates are those of `tools/bench_capture.py` on two cores (docs/results/benchmarks.md), rounded.
Of a model that is loaded, weights are in memory twice (as parameters and in the exported program), and of one
that is traced in outline a tensor at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.module_counts import weights_bytes
from lora_export.errors import CheckpointError
from lora_export.machines.memory import memory_here
from lora_export.progress import tell_stage
from lora_export.storage.free_space import as_decimal, refuse_small_disk

# Of Python with torch, transformers and onnxscript, and of a graph without weights.
_PACKAGES_BYTES = 600 << 20
# Copies that a loaded model's capture has of its weights at once.
_COPIES = 2
_TRACE_SECONDS = {True: 15, False: 40}
_BYTES_A_SECOND = {True: 250e6, False: 160e6}
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Below this nobody waits or runs out of anything.
_SMALL_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class CaptureEstimate:
    """Time, memory and disk of a capture.

    Attributes:
        written: Bytes of the graph's data on the disk.
        memory: Largest number of bytes in memory.
        seconds: Time on two cores, without that of a proof.
    """

    written: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        minutes = round(self.seconds / 60)
        time = f"{minutes} min" if minutes else f"{10 * round(self.seconds / 10)} s"
        disk = f"{as_decimal(self.written)} of disk" if self.written else "no copy of the weights"
        return f"about {time}, {as_decimal(self.memory)} of memory, {disk}"


def estimate_capture(
    folder: Path, dtype: str, *, in_outline: bool, shares_weights: bool = False
) -> CaptureEstimate:
    """Return an estimate of what the capture of a folder takes.

    Args:
        folder: Folder of the checkpoint.
        dtype: Dtype of the graph.
        in_outline: True if the model is traced without its weights.
        shares_weights: True if weights stay in the checkpoint's files.
    """
    try:
        sizes = [
            math.prod(tensor.shape) * _SIZES[dtype] for tensor in Checkpoint.open(folder).tensors.values()
        ]
    except CheckpointError:  # files that only torch reads; each value has two bytes or four
        sizes = [weights_bytes(folder) * _SIZES[dtype] // 2]
    total, largest = sum(sizes), max(sizes, default=0)
    return CaptureEstimate(
        written=0 if shares_weights else total,
        memory=_PACKAGES_BYTES + (largest if in_outline else _COPIES * total),
        seconds=_TRACE_SECONDS[in_outline] + (0 if shares_weights else total / _BYTES_A_SECOND[in_outline]),
    )


def tell_and_refuse(
    folder: Path, output: Path, dtype: str, *, in_outline: bool, shares_weights: bool = False
) -> None:
    """Tell what a capture will take, as a stage of the work; refuse one that this machine has no room for.

    Args:
        folder: Folder of the checkpoint.
        output: The graph's file.
        dtype: Dtype of the graph.
        in_outline: True if the model is traced without its weights.
        shares_weights: True if weights stay in the checkpoint's files.

    Raises:
        CheckpointError: The machine's memory, all of it, is smaller than what is needed.
        OutputError: The disk has too little space.
    """
    if weights_bytes(folder) < _SMALL_BYTES:
        return
    estimate = estimate_capture(folder, dtype, in_outline=in_outline, shares_weights=shares_weights)
    refuse_small_disk(output.parent, estimate.written, f"the graph of {folder}")
    there, free = memory_here()
    if estimate.memory > there:
        raise CheckpointError(
            f"the capture of {folder} takes about {as_decimal(estimate.memory)} of memory, and this machine "
            f"has {as_decimal(there)}",
            "take a machine with more memory"
            if in_outline
            else "omit --trace loaded (traced in outline, a model is never in memory), give --dtype float16 "
            "or bfloat16, or take a machine with more memory",
        )
    short = f"; only {as_decimal(free)} of memory is free" if estimate.memory > free else ""
    tell_stage(f"capturing {folder}: {estimate}{short}")
