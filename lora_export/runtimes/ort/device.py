"""Convert between numpy arrays and ONNX Runtime's tensors, on the CPU or a CUDA device, for all float types.

ONNX Runtime converts only the types that numpy itself has. bfloat16 and float8 (`ml_dtypes`) are passed as
integers of the same size, and read back from the tensor's memory.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

from lora_export.adapter import Array

Provider = Literal["cpu", "cuda"]
# An `onnxruntime.OrtValue`; the package is imported late and has no types.
OrtValue = Any

# onnx.TensorProto.DataType of the types that ONNX Runtime can't turn into numpy arrays.
_EXTENDED: dict[int, np.dtype[Any]] = {
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    18: np.dtype(ml_dtypes.float8_e4m3fnuz),
    19: np.dtype(ml_dtypes.float8_e5m2),
    20: np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_ELEMENT_OF = {dtype: element for element, dtype in _EXTENDED.items()}
_INTEGER_OF_SIZE: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16}

_INTEGERS = ("int", "uint")
# ONNX Runtime's names of input types; others (strings, sequences) are not checked.
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": _EXTENDED[16],
    "tensor(float8e4m3fn)": _EXTENDED[17],
    "tensor(float8e4m3fnuz)": _EXTENDED[18],
    "tensor(float8e5m2)": _EXTENDED[19],
    "tensor(float8e5m2fnuz)": _EXTENDED[20],
    "tensor(bool)": np.dtype(np.bool_),
    **{f"tensor({kind}{bits})": np.dtype(f"{kind}{bits}") for kind in _INTEGERS for bits in (8, 16, 32, 64)},
}


class DeviceMemory:
    """Make tensors on one device and read them back.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        device_id: Number of the device.
    """

    def __init__(self, kind: Provider, device_id: int = 0) -> None:
        self.kind = kind
        self.device_id = device_id

    def put(self, values: Array) -> OrtValue:
        """Copy an array to the device; later changes of the array have no effect on the copy."""
        tensor = self.empty(values.shape, values.dtype)
        tensor.update_inplace(_as_known(np.ascontiguousarray(values)))
        return tensor

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> OrtValue:
        """Make a tensor on the device with undefined values."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), _ELEMENT_OF.get(dtype, dtype), self.kind, self.device_id
        )

    def like(self, value: OrtValue) -> OrtValue:
        """Make a tensor on the device with another's shape and type, and undefined values."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(value.shape()), value.element_type(), self.kind, self.device_id
        )

    def read(self, value: OrtValue) -> Array:
        """Return a tensor's values; those of a CPU tensor may share its memory and keep it alive."""
        dtype = _EXTENDED.get(value.element_type())
        if dtype is None:
            known: Array = value.numpy()
            return known
        if value.device_name() != "cpu":
            host = DeviceMemory("cpu").like(value)
            host.update_inplace(value)
            value = host
        return _from_memory(value, dtype)


def host_value(values: Array) -> OrtValue:
    """Wrap an array as a tensor on the CPU, without a copy."""
    import onnxruntime as ort

    element = _ELEMENT_OF.get(values.dtype)
    if element is None:
        return ort.OrtValue.ortvalue_from_numpy(values)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(_as_known(values), element)


def _as_known(values: Array) -> Array:
    """Return the bytes of bfloat16 or float8 as integers of their size; other arrays unchanged."""
    return values.view(_INTEGER_OF_SIZE[values.itemsize]) if values.dtype in _ELEMENT_OF else values


def _from_memory(value: OrtValue, dtype: np.dtype[Any]) -> Array:
    shape = tuple(value.shape())
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), dtype).reshape(shape).copy()
