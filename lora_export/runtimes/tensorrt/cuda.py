"""Allocate and copy memory of a CUDA device and capture graphs, with NVIDIA's cuda-bindings.

Every call names what it does, so that an error says more than a number. Values are copied as bytes: bfloat16
and float8 (`ml_dtypes`) like any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16 and float8 by name
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError, BackendUnavailable

# Alignment that TensorRT needs for a tensor's address; cudaMalloc guarantees it.
ALIGNMENT = 256

_HINTS = {
    "cudaErrorMemoryAllocation": "give the session smaller max_adapters or max_bytes",
    "cudaErrorInsufficientDriver": "install NVIDIA's driver, or one as new as cuda-bindings' CUDA; "
    "for a driver of CUDA 12: pip install 'cuda-bindings<13'",
    "cudaErrorNoDevice": "an engine runs only on an NVIDIA GPU",
    "cudaErrorInvalidDevice": "give the device_id of a GPU of this machine",
}


def cuda_runtime() -> Any:
    """Import CUDA's runtime API and return it.

    Raises:
        BackendUnavailable: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendUnavailable(
            f"running an engine needs cuda-bindings, which can't be imported: {error}",
            "pip install cuda-bindings",
        ) from error
    return runtime


class CudaDevice:
    """One GPU.

    Attributes:
        device_id: Number of the GPU.
        copies: Stream for copies that belong to no run.
    """

    def __init__(self, device_id: int = 0) -> None:
        self._api = cuda_runtime()
        self.device_id = device_id
        count = self.call("find a GPU", "cudaGetDeviceCount")
        if device_id >= count:
            raise BackendError(
                f"there is no GPU {device_id}: CUDA sees {count}", _HINTS["cudaErrorInvalidDevice"]
            )
        self.activate()
        self.copies = Stream(self)

    def call(self, what: str, name: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime and return its result without the error code.

        Args:
            what: Text that completes the message "CUDA could not …".
            name: Name of the function.
            arguments: Arguments of the function.

        Raises:
            BackendError: The function failed.
        """
        error, *values = getattr(self._api, name)(*arguments)
        if int(error):
            known = [self._api.cudaGetErrorName(error)[1], self._api.cudaGetErrorString(error)[1]]
            title, text = (part.decode(errors="replace") for part in known)
            raise BackendError(f"CUDA could not {what}: {title}: {text}", _HINTS.get(title, ""))
        return values[0] if values else None

    def value(self, enumeration: str, member: str) -> Any:
        """Return a value of one of the API's enumerations."""
        return getattr(getattr(self._api, enumeration), member)

    def on_release(self, owner: object, name: str, handle: Any) -> None:
        """Free a handle when its owner is deleted; an error of that call is ignored."""
        weakref.finalize(owner, getattr(self._api, name), handle)

    def activate(self) -> None:
        """Make this GPU the calling thread's device."""
        self.call(f"use GPU {self.device_id}", "cudaSetDevice", self.device_id)

    def compute_capability(self) -> str:
        """Return the compute capability, as ``8.9``."""
        major, minor = (
            self.call(
                "read the compute capability",
                "cudaDeviceGetAttribute",
                self.value("cudaDeviceAttr", f"cudaDevAttrComputeCapability{part}"),
                self.device_id,
            )
            for part in ("Major", "Minor")
        )
        return f"{major}.{minor}"

    def upload(self, address: int, values: Array, stream: Stream) -> None:
        """Queue a copy of an array, which must be C-contiguous, to the device.

        Args:
            address: Address on the device.
            values: The array; it has been read when this returns, as its memory is not page-locked.
            stream: Stream to queue the copy on.
        """
        self._copy(
            "to",
            address,
            source=values.ctypes.data,
            nbytes=values.nbytes,
            kind="cudaMemcpyHostToDevice",
            stream=stream,
        )

    def download(self, values: Array, address: int, stream: Stream) -> None:
        """Queue a copy from the device into an array, which must be C-contiguous."""
        self._copy(
            "from",
            values.ctypes.data,
            source=address,
            nbytes=values.nbytes,
            kind="cudaMemcpyDeviceToHost",
            stream=stream,
        )

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Queue a copy within the device."""
        self._copy(
            "within", target, source=source, nbytes=nbytes, kind="cudaMemcpyDeviceToDevice", stream=stream
        )

    def _copy(self, way: str, target: int, source: int, nbytes: int, kind: str, stream: Stream) -> None:
        if nbytes:
            what = f"copy {nbytes} bytes {way} the GPU"
            direction = self.value("cudaMemcpyKind", kind)
            self.call(what, "cudaMemcpyAsync", target, source, nbytes, direction, stream.handle)


class Stream:
    """A queue of work for a device; it waits for no other queue."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        non_blocking = 1  # cudaStreamNonBlocking
        self.handle = device.call("make a stream", "cudaStreamCreateWithFlags", non_blocking)
        device.on_release(self, "cudaStreamDestroy", self.handle)

    def __int__(self) -> int:
        return int(self.handle)

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        self._device.call("finish its work", "cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Capture the work that ``work`` queues here instead of doing it.

        Raises:
            BackendError: A part of the work can't be captured.
        """
        call = self._device.call
        # Only this thread is captured: others may go on allocating memory.
        mode = self._device.value("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")
        call("begin the capture of a CUDA graph", "cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            self._abandon()
            raise
        graph = call("capture a CUDA graph", "cudaStreamEndCapture", self.handle)
        try:
            return CapturedGraph(self._device, self, graph)
        finally:
            call("free a captured CUDA graph", "cudaGraphDestroy", graph)

    def _abandon(self) -> None:
        """End a failed capture: a stream that is still capturing takes no other work."""
        try:
            graph = self._device.call("end a capture", "cudaStreamEndCapture", self.handle)
        except BackendError:  # the error says that the capture failed, which is known
            return
        self._device.call("free a captured CUDA graph", "cudaGraphDestroy", graph)


class CapturedGraph:
    """Captured work of a stream, repeated by one launch at the addresses of its capture."""

    def __init__(self, device: CudaDevice, stream: Stream, graph: Any) -> None:
        self._device, self._stream = device, stream
        self._executable = device.call("prepare a CUDA graph", "cudaGraphInstantiate", graph, 0)
        device.on_release(self, "cudaGraphExecDestroy", self._executable)

    def launch(self) -> None:
        """Queue the work on its stream."""
        self._device.call("launch a CUDA graph", "cudaGraphLaunch", self._executable, self._stream.handle)


class DeviceBuffer:
    """Memory of a device, freed when the buffer is deleted.

    Attributes:
        device: The device.
        address: Address of its first byte; never 0, even if it is empty: TensorRT needs an address for every
            tensor.
        nbytes: Size in bytes.
    """

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        device.activate()
        self.device, self.nbytes = device, nbytes
        self.address: int = device.call(f"take {nbytes} bytes of memory", "cudaMalloc", max(nbytes, 1))
        device.on_release(self, "cudaFree", self.address)


@dataclass(frozen=True, eq=False)
class DeviceTensor:
    """A tensor in a device's memory.

    Attributes:
        buffer: Buffer that it lies in.
        offset: Offset in the buffer, in bytes.
        shape: Shape of the tensor.
        dtype: Type of its elements.
    """

    buffer: DeviceBuffer
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        """Address of its first value."""
        return self.buffer.address + self.offset

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return nbytes_of(self.shape, self.dtype)

    def numpy(self) -> Array:
        """Copy its values to the host and return them."""
        values: Array = np.empty(self.shape, self.dtype)
        device = self.buffer.device
        device.activate()
        device.download(values, self.address, device.copies)
        device.copies.synchronize()
        return values


def nbytes_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the size of a tensor in bytes."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
