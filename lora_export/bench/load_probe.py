"""Measure the time and memory of opening one model, alone in a separate process.

In a process with several models, memory can't be attributed to one of them. Run as ``python -m
lora_export.bench.load_probe``: it reads a pickled `LoadJob` from stdin and prints a JSON object as its last
line.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_export.bench.contenders import AdapterChoice, Contender
from lora_export.bench.memory import gpu_memory, host_memory
from lora_export.bench.opened import Opened, Opening, open_for_timing
from lora_export.bench.workloads import Workload, make_feeds
from lora_export.untrusted.documents import DocumentError, parse_json
from lora_export.untrusted.fields import FieldError, from_plain

# Number of openings, and the time after which no further one is started.
_OPENINGS = 3
_OPENINGS_S = 20.0
_TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True)
class LoadJob:
    """Task of the process.

    Attributes:
        contender: The model with its choice of adapters.
        opening: Options for opening it.
        adapters: Adapters to load into it.
        workloads: Workloads to run once each, for the memory of the runs.
        seed: Seed of the feeds.
    """

    contender: Contender
    opening: Opening
    adapters: tuple[AdapterChoice, ...]
    workloads: tuple[Workload, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Cost of opening a model.

    Attributes:
        first_s: Time of the first opening in the process; on a GPU that includes starting CUDA. The files
            were read shortly before, so that the system holds them in memory as far as they fit.
        again_s: Median time of opening it again; None if there was no time for that.
        openings: Number of openings.
        loaded_bytes: Host memory that the opened model added.
        loaded_file_bytes: Part of it in pages of mapped files.
        running_bytes: Host memory added after the adapters were loaded and each workload was run once.
        peak_bytes: Largest host memory that opening, loading or running added at any time.
        gpu_loaded_bytes: GPU memory that the opened model added, CUDA's own included; None on the CPU.
        gpu_running_bytes: GPU memory added after the runs.
        gpu_whose: Text on what the driver counted.
        problem: The reason if it was not measured, or "".
    """

    first_s: float | None = None
    again_s: float | None = None
    openings: int = 0
    loaded_bytes: int | None = None
    loaded_file_bytes: int | None = None
    running_bytes: int | None = None
    peak_bytes: int | None = None
    gpu_loaded_bytes: int | None = None
    gpu_running_bytes: int | None = None
    gpu_whose: str = ""
    problem: str = ""


def measure_loading(job: LoadJob) -> Loaded:
    """Open a model in a separate process and return the cost; a failure is described in `Loaded.problem`."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    # -P: a script of the user's called "pickle.py" is not a package.
    command = [sys.executable, "-P", "-m", "lora_export.bench.load_probe"]
    try:
        done = subprocess.run(
            command,
            input=pickle.dumps(job),
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONPATH": path},
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Loaded(problem=f"the process did not end within {_TIMEOUT_S} s")
    last = (done.stdout.decode(errors="replace").strip().splitlines() or [""])[-1]
    try:
        return from_plain(Loaded, parse_json(last))
    except (DocumentError, FieldError):
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        return Loaded(problem=f"the process ended with exit code {done.returncode}: {lines[-1][:300]}")


def probe(job: LoadJob) -> Loaded:
    """Open the job's model in this process, run it, open it again, and return the cost."""
    import onnxruntime  # noqa: F401 - its memory does not count as a model's

    gpu = job.opening.device_of(job.contender.model) == "cuda"
    before, gpu_before = host_memory(), gpu_memory() if gpu else None
    start = time.perf_counter()
    session = open_for_timing(job.contender.model, job.opening)
    first_s = time.perf_counter() - start
    opened, gpu_opened = host_memory(), gpu_memory() if gpu else None
    _run_all(session, job)
    ran, gpu_ran = host_memory(), gpu_memory() if gpu else None
    session.close()
    del session
    again = _open_again(job, first_s)
    # The driver lists a process from its first use of the GPU on: before that, it uses 0 bytes.
    same = gpu_before and gpu_opened and gpu_before[1] == gpu_opened[1]
    own_before = gpu_before[0] if gpu_before and same else 0
    return Loaded(
        first_s=first_s,
        again_s=statistics.median(again) if again else None,
        openings=1 + len(again),
        loaded_bytes=_grown(opened.resident_bytes, before.resident_bytes),
        loaded_file_bytes=_grown(opened.file_bytes, before.file_bytes),
        running_bytes=_grown(ran.resident_bytes, before.resident_bytes),
        peak_bytes=_grown(ran.peak_bytes, before.resident_bytes or before.peak_bytes),
        gpu_loaded_bytes=gpu_opened[0] - own_before if gpu_opened else None,
        gpu_running_bytes=gpu_ran[0] - own_before if gpu_ran else None,
        gpu_whose=gpu_opened[1] if gpu_opened else "",
    )


def _run_all(session: Opened, job: LoadJob) -> None:
    for adapter in job.adapters:
        if adapter.path is not None:
            # A slot of the bank may already hold an adapter of this name.
            session.load(adapter.name, adapter.path, replace=job.contender.model.mode == "bank")
    for workload in job.workloads:
        feeds = make_feeds(job.contender.model, workload, job.seed)
        session.runner(feeds, job.contender.choice(workload.batch))()


def _open_again(job: LoadJob, first_s: float) -> Sequence[float]:
    times: list[float] = []
    while len(times) + 1 < _OPENINGS and first_s + sum(times) < _OPENINGS_S:
        gc.collect()
        start = time.perf_counter()
        session = open_for_timing(job.contender.model, job.opening)
        times.append(time.perf_counter() - start)
        session.close()
        del session
    return times


def _grown(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else max(now - before, 0)


def main() -> None:
    """Read the job from stdin, run it and print the result."""
    job: Any = pickle.load(sys.stdin.buffer)
    try:
        result = probe(job)
    except Exception as error:
        result = Loaded(problem=(str(error).splitlines() or [type(error).__name__])[0])
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
