"""Open an engine on this machine's GPU, or report every reason why it can't run here.

The engine record is checked first, which needs no GPU; then TensorRT-RTX checks the engine's header, for what
only the driver knows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.engines import compiler_of
from lora_export.engines.record import EngineRecord, platform_here
from lora_export.engines.source import graph_hashes
from lora_export.errors import BackendError, BackendUnavailable
from lora_export.graph.onnx_file import load_graph
from lora_export.runtimes.tensorrt.cuda import CudaDevice
from lora_export.storage.hashes import FileHash, identity_of

_KEPT_ERRORS = 40


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedEngine:
    """An engine on a GPU.

    Attributes:
        path: The engine's file.
        record: The engine record.
        trt: The package that runs it.
        engine: The ``ICudaEngine``.
        runtime: The ``Runtime`` that it belongs to.
        log: TensorRT's messages on it.
        device: The GPU.
    """

    path: Path
    record: EngineRecord
    trt: Any
    engine: Any
    runtime: Any
    log: EngineLog
    device: CudaDevice

    @property
    def compiles_at_run(self) -> bool:
        """True if it compiles its kernels while it runs: an engine of TensorRT-RTX."""
        return compiler_of(self.record.backend).compiles_at_run


class EngineLog:
    """TensorRT's error messages, kept to explain a failure.

    Attributes:
        logger: The ``ILogger``; it must outlive everything that is made with it.
    """

    def __init__(self, trt: Any) -> None:
        self._errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        errors, severe = self._errors, (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in severe:
                    errors.append(msg)

        self.logger = Logger()

    def take(self) -> list[str]:
        """Return the errors since the last call."""
        taken = list(self._errors)
        self._errors.clear()
        return taken

    def refused(self, path: Path, what: str, hint: str = "") -> BackendError:
        """Return the error for a call that TensorRT refused, with its messages."""
        return BackendError(f"{path.name}: TensorRT could not {what}", hint, self.take())


def gpu_compute_capability(device_id: int = 0) -> str | None:
    """Return a GPU's compute capability (``8.9``) as CUDA states it, or None if no GPU can be used."""
    try:
        return CudaDevice(device_id).compute_capability()
    except BackendError:
        return None


def load_engine(path: Path, record: EngineRecord, device_id: int = 0) -> LoadedEngine:
    """Load an engine onto a GPU.

    Args:
        path: The engine's file.
        record: The engine record, see `read_engine`.
        device_id: Number of the GPU.

    Raises:
        BackendUnavailable: Packages that it runs with are missing.
        BackendError: The engine can't run here; every reason is listed.
    """
    device = _checked_device(path, record, device_id)
    compiler = compiler_of(record.backend)
    trt = compiler.load()
    log = EngineLog(trt)
    runtime = trt.Runtime(log.logger)
    if record.options.version_compatible:
        # Such an engine contains host code. The hash in its record shows that lora-export wrote the file.
        runtime.engine_host_code_allowed = True
    data = path.read_bytes()
    if compiler.compiles_at_run:
        _check_validity(path, trt, runtime=runtime, data=data, log=log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise log.refused(path, "open it", "build it again on this machine, or for this GPU")
    return LoadedEngine(
        path=path, record=record, trt=trt, engine=engine, runtime=runtime, log=log, device=device
    )


def check_source(path: Path, record: EngineRecord, source: Path) -> None:
    """Refuse a graph that the engine was not built from.

    Args:
        path: The engine's file.
        record: The engine record.
        source: The ONNX graph.

    Raises:
        BackendError: The engine was built from another graph, or the graph's weights have changed.
        GraphError: The graph can't be read.
    """
    if not same_files(graph_hashes(load_graph(source)), record.source.files):
        raise BackendError(
            f"{path.name} was not built from {source} as it is now",
            "give the graph that it was built from, or build it again",
            [f"{file.name}: sha256 {file.sha256}" for file in record.source.files],
        )


def same_files(one: Sequence[FileHash], other: Sequence[FileHash]) -> bool:
    """Return True if two graphs have files of the same content, whatever their names are."""
    return identity_of(one) == identity_of(other)


def _checked_device(path: Path, record: EngineRecord, device_id: int) -> CudaDevice:
    """Return the GPU, or raise `BackendError` with every reason why the engine can't run on it."""
    refusals = _Refusals()
    compiler = compiler_of(record.backend)
    with refusals.collect():
        _check_version(record, compiler.version(), refusals)
    if record.platform != (here := platform_here()):
        refusals.problems.append(f"the engine is for {record.platform}, this machine is {here}")
    device = None
    with refusals.collect():
        device = CudaDevice(device_id)
        refusals.problems += _gpu_problems(record, device.compute_capability())
    refusals.finish(path)
    assert device is not None
    return device


class _Refusals:
    """Reasons why an engine can't run here, and how to fix them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.hints: list[str] = []
        self._missing = False

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Record an error raised inside as one of the reasons."""
        try:
            yield
        except BackendError as error:
            self._missing |= isinstance(error, BackendUnavailable)
            self.problems.append(error.message)
            self.hints += [error.hint] if error.hint else []

    def finish(self, path: Path) -> None:
        """Raise one error with all reasons, if there are any."""
        if self.problems:
            kind = BackendUnavailable if self._missing else BackendError
            hint = "; ".join(self.hints) or "build the engine again, for this machine"
            raise kind(f"{path.name} can't run here", hint, self.problems)


def _check_version(record: EngineRecord, here: str, refusals: _Refusals) -> None:
    """Add a refusal unless the installed version built the engine, or has its major version if compatible."""
    built = record.builder_version
    # trtexec states one number less than the package, whose last number counts packagings.
    parts = list(zip(built.split("."), here.split("."), strict=False))
    compared = parts[:1] if record.options.version_compatible else parts
    if all(one == other for one, other in compared):
        return
    name = compiler_of(record.backend).title
    refusals.problems.append(f"it was built by {name} {built}, but {here} is installed")
    refusals.hints.append(f"install {name} {built}, or build the engine again")


def _gpu_problems(record: EngineRecord, here: str) -> list[str]:
    compiler = compiler_of(record.backend)
    if compiler.runs_on is not None and here not in compiler.runs_on:
        return [
            f"the GPU has compute capability {here}, which {compiler.title} does not support: it runs on "
            f"{', '.join(compiler.runs_on)}"
        ]
    if here in record.compute_capabilities:
        return []
    # Ampere and later.
    if record.options.hardware_compatible and int(here.split(".")[0]) >= 8:
        return []
    supported = " or ".join(record.compute_capabilities)
    return [f"the GPU has compute capability {here}, the engine is for {supported}"]


def _check_validity(path: Path, trt: Any, runtime: Any, data: bytes, log: EngineLog) -> None:
    """Let TensorRT-RTX check the header: it knows the driver, CUDA's version and the free memory."""
    validity, diagnostics = runtime.get_engine_validity(data)
    if validity == trt.EngineValidity.SUBOPTIMAL:
        message = f"{path.name}: TensorRT-RTX says that an engine built again may be faster here"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    if validity != trt.EngineValidity.INVALID:
        return
    reasons = trt.EngineInvalidityDiagnostics.__members__.items()
    named = [name.lower().replace("_", " ") for name, bit in reasons if diagnostics & int(bit)]
    raise BackendError(
        f"{path.name}: TensorRT-RTX says that this engine is not valid here",
        "build it again, for this machine",
        [*named, *log.take()],
    )
