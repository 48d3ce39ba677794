"""Memory of a CUDA device, copies to and from it, and captured graphs, through NVIDIA's cuda-bindings.

Every call names what it does, so that an error says more than a number. Values go as bytes: bfloat16 and
float8 (`ml_dtypes`) like any other.
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

# What TensorRT asks of a tensor's address; cudaMalloc gives no less.
ALIGNMENT = 256

_HINTS = {
    "cudaErrorMemoryAllocation": "give the session smaller max_adapters or max_bytes",
    "cudaErrorInsufficientDriver": "install NVIDIA's driver, or one as new as cuda-bindings' CUDA; "
    "for a driver of CUDA 12: pip install 'cuda-bindings<13'",
    "cudaErrorNoDevice": "an engine runs on an NVIDIA GPU alone",
    "cudaErrorInvalidDevice": "give the device_id of a GPU that is there",
}


def cuda_runtime() -> Any:
    """Import CUDA's runtime API.

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
        device_id: Its number.
        copies: A stream for copies that belong to no run.
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
        """Call a function of CUDA's runtime; return what it gives besides its error code.

        Args:
            what: What it does, for messages: "CUDA could not …".
            name: The function.
            arguments: Its arguments.

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
        """Give a handle back when its owner is gone. What that returns is of no use to anybody."""
        weakref.finalize(owner, getattr(self._api, name), handle)

    def activate(self) -> None:
        """Make it the calling thread's device."""
        self.call(f"use GPU {self.device_id}", "cudaSetDevice", self.device_id)

    def compute_capability(self) -> str:
        """Return ``8.9`` or the like."""
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
            address: Where to.
            values: The array; it has been read when this returns, as it is no page-locked memory.
            stream: In whose order.
        """
        self._copy("to", address, values.ctypes.data, values.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, values: Array, address: int, stream: Stream) -> None:
        """Queue a copy from the device into an array, which must be C-contiguous."""
        self._copy("from", values.ctypes.data, address, values.nbytes, "cudaMemcpyDeviceToHost", stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Queue a copy within the device."""
        self._copy("within", target, source, nbytes, "cudaMemcpyDeviceToDevice", stream)

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
        """Wait until all of its work is done."""
        self._device.call("finish its work", "cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Keep what ``work`` queues here, in place of doing it.

        Raises:
            BackendError: Something in it can't be captured.
        """
        call = self._device.call
        # Of this thread alone: others go on allocating memory meanwhile.
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
        """End a capture that failed: a stream left in it takes no other work."""
        try:
            graph = self._device.call("end a capture", "cudaStreamEndCapture", self.handle)
        except BackendError:  # it says that the capture failed, which is known
            return
        self._device.call("free a captured CUDA graph", "cudaGraphDestroy", graph)


class CapturedGraph:
    """Work of a stream that is done again by one launch, at the addresses that it was captured with."""

    def __init__(self, device: CudaDevice, stream: Stream, graph: Any) -> None:
        self._device, self._stream = device, stream
        self._executable = device.call("prepare a CUDA graph", "cudaGraphInstantiate", graph, 0)
        device.on_release(self, "cudaGraphExecDestroy", self._executable)

    def launch(self) -> None:
        """Queue it on its stream."""
        self._device.call("launch a CUDA graph", "cudaGraphLaunch", self._executable, self._stream.handle)


class DeviceBuffer:
    """Memory of a device, given back when nobody holds it any more.

    Attributes:
        device: The device.
        address: Where it begins; never 0, also where it is empty: TensorRT wants an address for every tensor.
        nbytes: Its size.
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
        buffer: What it lies in.
        offset: Where it begins there.
        shape: Its shape.
        dtype: Its type.
    """

    buffer: DeviceBuffer
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        """Where its values begin."""
        return self.buffer.address + self.offset

    @property
    def nbytes(self) -> int:
        """Size of its values."""
        return nbytes_of(self.shape, self.dtype)

    def numpy(self) -> Array:
        """Copy its values to the host."""
        values: Array = np.empty(self.shape, self.dtype)
        device = self.buffer.device
        device.activate()
        device.download(values, self.address, device.copies)
        device.copies.synchronize()
        return values


def nbytes_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return how many bytes a tensor takes."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
