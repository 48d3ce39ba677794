"""Open a model for timing: its inputs lie on the device, and a run is one call.

On the CPU a timed run is that of a server: inputs in memory, outputs allocated by the runtime. On a GPU the
inputs are copied there before the run, outputs stay there, and the call returns when the GPU has finished; no
copy is timed. With CUDA graphs inputs are copied into the captured buffers and outputs are read, as sessions
do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_export.adapter import Array
from lora_export.bench.model import BenchModel
from lora_export.bench.rounds import Run
from lora_export.runtimes.ort.cuda_graphs import CudaGraphs
from lora_export.runtimes.ort.device import DeviceMemory, Provider
from lora_export.runtimes.ort.open import open_session
from lora_export.runtimes.ort.resident import Resident
from lora_export.runtimes.session import AdapterSession
from lora_export.runtimes.tensorrt.cuda import CudaDevice, DeviceBuffer, DeviceTensor
from lora_export.runtimes.tensorrt.session import EngineSession

# ONNX Runtime's log prints strangers' names unchanged to the terminal; its errors are raised anyway.
_FATAL_ONLY = 4
_MAX_CUDA_GRAPHS = 1024


@dataclass(frozen=True)
class Opening:
    """Options for opening models.

    Attributes:
        provider: Provider for graphs; engines always run on a GPU.
        threads: ONNX Runtime's threads within one operator; None: one for each core.
        cuda_graph: Replay runs as CUDA graphs.
    """

    provider: Provider = "cpu"
    threads: int | None = None
    cuda_graph: bool = False

    def device_of(self, model: BenchModel) -> Provider:
        """Return the device that a model runs on."""
        return "cuda" if model.kind == "engine" else self.provider

    def timed(self) -> str:
        """Return a text that says what a time includes."""
        if self.cuda_graph:
            return (
                "one run replayed as a CUDA graph, with copies of the inputs into its buffers and of the "
                "outputs to the host"
            )
        if self.provider == "cuda":
            return "one run until the GPU has finished; inputs are on the GPU before it, outputs stay there"
        return "one run, inputs in memory, outputs allocated by the runtime"


class Opened(Protocol):
    """A model that can be run."""

    def load(self, name: str, path: Path, *, replace: bool = False) -> None:
        """Load an adapter under a name."""

    def runner(self, feeds: Mapping[str, Array], choice: Mapping[str, Any]) -> Run:
        """Put feeds on the device; return a call that runs the model with them.

        Args:
            feeds: Input name → values.
            choice: The argument ``adapter`` or ``adapters`` of `AdapterSession.run`.
        """

    def close(self) -> None:
        """Release the memory that can be released."""


def open_for_timing(model: BenchModel, opening: Opening) -> Opened:
    """Open a model.

    Raises:
        LoraExportError: As for its session.
    """
    if model.exposed is not None:
        return _Exposed(model, opening)
    return _Engine(model, opening) if model.kind == "engine" else _Graph(model, opening)


@contextlib.contextmanager
def opened(model: BenchModel, opening: Opening) -> Iterator[Opened]:
    """Open a model, and close it after the block."""
    session = open_for_timing(model, opening)
    try:
        yield session
    finally:
        session.close()


class _Graph:
    """A graph without LoRA, run by ONNX Runtime."""

    def __init__(self, model: BenchModel, opening: Opening) -> None:
        self._memory = DeviceMemory(opening.provider)
        session = open_session(
            model.path,
            self._memory,
            threads=opening.threads,
            cuda_graph=opening.cuda_graph,
            session_options=_session_options(),
        )
        self._graphs = CudaGraphs(session, self._memory, _MAX_CUDA_GRAPHS) if opening.cuda_graph else None
        self._resident = Resident(session, {})
        self._outputs = [output.name for output in session.get_outputs()]

    def load(self, name: str, path: Path, *, replace: bool = False) -> None:
        raise AssertionError("a graph without LoRA takes no adapter")

    def runner(self, feeds: Mapping[str, Array], choice: Mapping[str, Any]) -> Run:
        fed = [(name, self._memory.put(values)) for name, values in feeds.items()]
        resident, outputs, graphs = self._resident, self._outputs, self._graphs
        if graphs:
            return lambda: graphs.run(resident, fed, outputs)
        kind, number = self._memory.kind, self._memory.device_id
        return lambda: resident.run(fed, outputs, kind, number)

    def close(self) -> None:
        pass


class _Engine:
    """An engine without LoRA, run by TensorRT."""

    def __init__(self, model: BenchModel, opening: Opening) -> None:
        self._session = EngineSession(
            model.path, cuda_graph=opening.cuda_graph, max_cuda_graphs=_MAX_CUDA_GRAPHS
        )
        self._run = self._session.run if opening.cuda_graph else self._session.run_on_device

    def load(self, name: str, path: Path, *, replace: bool = False) -> None:
        raise AssertionError("an engine without LoRA takes no adapter")

    def runner(self, feeds: Mapping[str, Array], choice: Mapping[str, Any]) -> Run:
        run, placed = self._run, _on_gpu(feeds)
        return lambda: run(placed)

    def close(self) -> None:
        self._session.close()


class _Exposed:
    """A swap graph, a bank, or an engine built from one, run by an `AdapterSession`."""

    def __init__(self, model: BenchModel, opening: Opening) -> None:
        self._engine = model.kind == "engine"
        graph_options: dict[str, Any] = {"threads": opening.threads, "session_options": _session_options()}
        self._memory = DeviceMemory(opening.device_of(model))
        self._session = AdapterSession(
            model.path,
            provider=opening.device_of(model),
            max_adapters=1024,
            cuda_graph=opening.cuda_graph,
            max_cuda_graphs=_MAX_CUDA_GRAPHS,
            **({} if self._engine else graph_options),
        )
        self._run = self._session.run if opening.cuda_graph else self._session.run_on_device

    def load(self, name: str, path: Path, *, replace: bool = False) -> None:
        self._session.load_adapter(name, path, replace=replace)

    def runner(self, feeds: Mapping[str, Array], choice: Mapping[str, Any]) -> Run:
        placed: Mapping[str, Any] = (
            _on_gpu(feeds) if self._engine else {name: self._memory.put(feeds[name]) for name in feeds}
        )
        run, given = self._run, dict(choice)
        return lambda: run(placed, **given)

    def close(self) -> None:
        self._session.close()


def _session_options() -> Any:
    """Return ONNX Runtime's options for models that are timed together in one process."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    # Otherwise threads of the session that has just run would spin on the cores that the next one needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _on_gpu(feeds: Mapping[str, Array]) -> dict[str, DeviceTensor]:
    device = CudaDevice()
    placed = {}
    for name, values in feeds.items():
        buffer = DeviceBuffer(device, values.nbytes)
        device.upload(buffer.address, values, device.copies)
        placed[name] = DeviceTensor(buffer, 0, values.shape, values.dtype)
    device.copies.synchronize()
    return placed
