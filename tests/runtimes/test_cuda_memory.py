"""CUDA's memory, streams and captured graphs: on a GPU where there is one, and a clear error where not."""

import gc
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from lora_export import BackendError, BackendUnavailable
from lora_export.runtimes.tensorrt.cuda import (
    ALIGNMENT,
    CudaDevice,
    DeviceBuffer,
    DeviceTensor,
    Stream,
    cuda_runtime,
)
from lora_export.runtimes.tensorrt.engine import gpu_compute_capability

HERE = gpu_compute_capability()
gpu = pytest.mark.skipif(HERE is None, reason="no NVIDIA GPU, or no cuda-bindings")
DTYPES = [
    "float32",
    "float64",
    "float16",
    "int64",
    "int32",
    "bool",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
]


@pytest.fixture
def device():
    return CudaDevice()


def on(device, values):
    """Return an array as a tensor on the device."""
    tensor = DeviceTensor(DeviceBuffer(device, values.nbytes), 0, values.shape, values.dtype)
    device.upload(tensor.address, values, device.copies)
    device.copies.synchronize()
    return tensor


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_as_they_went(device, dtype):
    values = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, None) or dtype)
    for given in (values, np.ascontiguousarray(values.T), values[:0], np.asarray(values[0, 0])):
        tensor = on(device, given)
        back = tensor.numpy()
        assert back.dtype == given.dtype
        assert back.shape == given.shape
        assert np.array_equal(back, given)


@pytest.mark.gpu
@gpu
def test_addresses_are_aligned_and_never_nothing(device):
    buffers = [DeviceBuffer(device, size) for size in (0, 1, 1000, 1 << 20)]
    assert all(buffer.address and buffer.address % ALIGNMENT == 0 for buffer in buffers)
    assert len({buffer.address for buffer in buffers}) == len(buffers)


@pytest.mark.gpu
@gpu
def test_copies_within_the_device_and_offsets(device):
    values = np.arange(1024, dtype=np.float32)
    source, target = on(device, values), DeviceBuffer(device, values.nbytes)
    device.copy(target.address + 1024, source.address, 2048, device.copies)
    device.copies.synchronize()
    part = DeviceTensor(target, 1024, (512,), values.dtype)
    assert np.array_equal(part.numpy(), values[:512])


@pytest.mark.gpu
@gpu
def test_memory_is_given_back(device):
    def free():
        return device.call("ask for free memory", "cudaMemGetInfo")

    DeviceBuffer(device, 1 << 28)
    gc.collect()
    before = free()
    for _ in range(8):
        DeviceBuffer(device, 1 << 28)
    assert free() >= before - (1 << 27)


@pytest.mark.gpu
@gpu
def test_work_of_a_stream_is_in_order_and_waited_for(device):
    stream, values = Stream(device), np.arange(1 << 20, dtype=np.int64)
    source, middle, last = (DeviceBuffer(device, values.nbytes) for _ in range(3))
    device.upload(source.address, values, stream)
    device.copy(middle.address, source.address, values.nbytes, stream)
    device.copy(last.address, middle.address, values.nbytes, stream)
    stream.synchronize()
    assert np.array_equal(DeviceTensor(last, 0, values.shape, values.dtype).numpy(), values)
    assert int(stream) > 0


@pytest.mark.gpu
@gpu
def test_a_captured_graph_does_its_work_again(device):
    stream = Stream(device)
    first, second = np.full(256, 1, np.float32), np.full(256, 2, np.float32)
    source, target = on(device, first), on(device, np.zeros(256, np.float32))
    graph = stream.capture(lambda: device.copy(target.address, source.address, 1024, stream))
    assert not target.numpy().any(), "a capture does nothing yet"
    graph.launch()
    stream.synchronize()
    assert np.array_equal(target.numpy(), first)
    device.upload(source.address, second, stream)
    graph.launch()
    stream.synchronize()
    assert np.array_equal(target.numpy(), second)


@pytest.mark.gpu
@gpu
def test_a_capture_that_fails_leaves_a_stream_that_works(device):
    stream, values = Stream(device), np.arange(4, dtype=np.float32)
    target = on(device, np.zeros(4, np.float32))
    with pytest.raises(BackendError, match="CUDA could not"):
        stream.capture(stream.synchronize)  # waiting is what a capture can't do
    with pytest.raises(ZeroDivisionError):
        stream.capture(lambda: 1 // 0)
    device.upload(target.address, values, stream)
    stream.synchronize()
    assert np.array_equal(target.numpy(), values)


@pytest.mark.gpu
@gpu
def test_errors_have_cudas_names(device):
    with pytest.raises(BackendError, match="cudaErrorMemoryAllocation: out of memory") as full:
        DeviceBuffer(device, 1 << 50)
    assert "max_adapters" in full.value.hint
    with pytest.raises(BackendError, match="there is no GPU 99"):
        CudaDevice(99)
    with pytest.raises(BackendError, match="cudaErrorInvalidValue"):
        device.copy(1, 1, 16, device.copies)


@pytest.mark.gpu
@gpu
def test_the_compute_capability_is_the_drivers():
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[0] == HERE


# --- without a GPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(HERE is not None, reason="there is a GPU")
def test_no_gpu_is_a_clear_error():
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    with pytest.raises(BackendError, match="CUDA could not find a GPU: cudaError") as refused:
        CudaDevice()
    assert refused.value.hint


def test_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailable, match="needs cuda-bindings") as refused:
        cuda_runtime()
    assert refused.value.hint == "pip install cuda-bindings"
    assert gpu_compute_capability() is None


def test_nothing_of_cuda_is_loaded_before_it_is_used():
    script = "import sys, lora_export.runtimes.session; assert 'cuda.bindings' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
