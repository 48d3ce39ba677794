"""CUDA's runtime without a GPU: device memory is the host's, streams are queues, and misuse fails the test.

The functions have the names and arguments of ``cuda.bindings.runtime`` (a test compares them). What is queued
is done when the stream is waited for, so that a result that is read too early, or an upload that nobody
waited for, shows. Fresh memory holds no zeros, and freed memory is no memory.
"""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import numpy as np

SUCCESS, OUT_OF_MEMORY, NO_DEVICE, CAPTURE_FAILED = 0, 2, 100, 901
_NAMES = {
    OUT_OF_MEMORY: ("cudaErrorMemoryAllocation", "out of memory"),
    NO_DEVICE: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
    CAPTURE_FAILED: ("cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error"),
}
_ALIGNMENT = 256


class RecordingCuda:
    """A stand-in for the module ``cuda.bindings.runtime``.

    Attributes:
        calls: Name and arguments of every call, in order; `cudaSetDevice` and error texts left out.
        compute_capability: Of every device.
        devices: How many there are.
        limit_bytes: Allocations beyond this fail.
    """

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, compute_capability="8.9", devices=1):
        self.compute_capability, self.devices, self.limit_bytes = compute_capability, devices, 1 << 30
        self.calls = []
        self._memory, self._streams, self._graphs = {}, {}, {}
        self._next = 1000
        self._lock = threading.RLock()

    # --- what the tests and the other stand-in ask ---------------------------------------------------

    def allocated(self):
        """Return the addresses and sizes of what is not freed."""
        return {address: size for address, (_, size) in self._memory.items()}

    def view(self, address, nbytes):
        """Return bytes of device memory, which have to be allocated."""
        for start, (array, size) in self._memory.items():
            if start <= address < start + max(size, 1):
                assert address + nbytes <= start + size, "beyond the end of an allocation"
                offset = address - start
                return array[offset : offset + nbytes]
        raise AssertionError(f"{address} is no device memory, or was freed")

    def read(self, address, nbytes):
        return self.view(address, nbytes).copy()

    def write(self, address, values):
        self.view(address, values.nbytes)[:] = values

    def is_device(self, address):
        return any(start <= address < start + max(size, 1) for start, (_, size) in self._memory.items())

    def queue(self, stream, work):
        """Let a stream do something, in its order; a capturing one keeps it for its graph."""
        with self._lock:
            self._streams[int(stream)].append(work)

    def is_capturing(self, stream):
        return isinstance(self._streams[int(stream)], _Capture)

    def named(self, *names):
        """Return the recorded calls of these functions."""
        return [call for call in self.calls if call[0] in names]

    # --- the module's functions ------------------------------------------------------------------------

    def cudaGetDeviceCount(self):
        return (SUCCESS, self.devices) if self.devices else (NO_DEVICE, None)

    def cudaSetDevice(self, device):
        assert 0 <= device < self.devices
        return (SUCCESS,)

    def cudaDeviceGetAttribute(self, attr, device):
        return SUCCESS, int(self.compute_capability.split(".")[attr - 75])

    def cudaGetErrorName(self, error):
        return SUCCESS, _NAMES[error][0].encode()

    def cudaGetErrorString(self, error):
        return SUCCESS, _NAMES[error][1].encode()

    def cudaMalloc(self, size):
        with self._lock:
            self._record("cudaMalloc", size)
            assert size > 0
            assert not any(isinstance(queue, _Capture) for queue in self._streams.values())
            if sum(self.allocated().values()) + size > self.limit_bytes:
                return OUT_OF_MEMORY, None
            room = np.full(size + _ALIGNMENT, 0xA5, np.uint8)
            offset = -room.ctypes.data % _ALIGNMENT
            array = room[offset : offset + size]
            self._memory[array.ctypes.data] = array, size
            return SUCCESS, array.ctypes.data

    def cudaFree(self, devPtr):
        with self._lock:
            self._record("cudaFree", devPtr)
            for stream in self._streams:  # the real one waits for the device, too
                self._flush(stream)
            array, _ = self._memory.pop(devPtr)
            array[:] = 0xFF
            return (SUCCESS,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        with self._lock:
            self._record("cudaMemcpyAsync", dst, src, count, kind)
            to_device, from_device = kind in (1, 3), kind in (2, 3)
            assert self.is_device(dst) == to_device
            assert self.is_device(src) == from_device
            if kind == 3:
                self.queue(stream, lambda: self._copy(self.view(dst, count), self.view(src, count)))
                return (SUCCESS,)
            assert not self.is_capturing(stream), "pageable memory can't be part of a graph"
            if to_device:
                values = np.frombuffer(ctypes.string_at(src, count), np.uint8)  # read before it returns
                self.queue(stream, lambda: self._copy(self.view(dst, count), values))
            else:
                self._flush(int(stream))
                ctypes.memmove(dst, self.view(src, count).ctypes.data, count)
            return (SUCCESS,)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1
        with self._lock:
            self._next += 1
            self._streams[self._next] = []
            return SUCCESS, self._next

    def cudaStreamSynchronize(self, stream):
        with self._lock:
            self._record("cudaStreamSynchronize")
            assert not self.is_capturing(stream)
            self._flush(int(stream))
            return (SUCCESS,)

    def cudaStreamDestroy(self, stream):
        with self._lock:
            del self._streams[int(stream)]
            return (SUCCESS,)

    def cudaStreamBeginCapture(self, stream, mode):
        with self._lock:
            self._record("cudaStreamBeginCapture")
            assert mode == 1
            assert not self._streams[int(stream)], "the stream has other work"
            self._streams[int(stream)] = _Capture()
            return (SUCCESS,)

    def cudaStreamEndCapture(self, stream):
        with self._lock:
            self._record("cudaStreamEndCapture")
            capture = self._streams[int(stream)]
            self._streams[int(stream)] = []
            if capture.failed:
                return CAPTURE_FAILED, None
            self._next += 1
            self._graphs[self._next] = list(capture)
            return SUCCESS, self._next

    def cudaGraphInstantiate(self, graph, flags):
        self._next += 1
        self._graphs[self._next] = self._graphs[graph]
        return SUCCESS, self._next

    def cudaGraphLaunch(self, graphExec, stream):
        with self._lock:
            self._record("cudaGraphLaunch")
            for work in self._graphs[graphExec]:
                self.queue(stream, work)
            return (SUCCESS,)

    def cudaGraphExecDestroy(self, graphExec):
        del self._graphs[graphExec]
        return (SUCCESS,)

    def cudaGraphDestroy(self, graph):
        del self._graphs[graph]
        return (SUCCESS,)

    # --- inside ----------------------------------------------------------------------------------------

    def fail_capture(self, stream):
        """Let the stream's capture end with an error, as a forbidden call in it does."""
        self._streams[int(stream)].failed = True

    def _flush(self, stream):
        queue = self._streams[stream]
        if isinstance(queue, _Capture):
            return
        while queue:
            queue.pop(0)()

    def _copy(self, target, values):
        target[:] = values

    def _record(self, *call):
        self.calls.append(call)


class _Capture(list):
    """What a capturing stream was given."""

    failed = False


_OWN = vars(RecordingCuda).items()
FUNCTIONS = [name for name, value in _OWN if name.startswith("cuda") and callable(value)]
ENUMERATIONS = {name: list(vars(value)) for name, value in _OWN if isinstance(value, SimpleNamespace)}
