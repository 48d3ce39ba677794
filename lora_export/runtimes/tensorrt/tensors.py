"""Put LoRA tensors into one block of a GPU's memory: one allocation and one copy for a whole adapter."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.runtimes.tensorrt.cuda import (
    ALIGNMENT,
    CudaDevice,
    DeviceBuffer,
    DeviceTensor,
    Stream,
    nbytes_of,
)


class EngineTensors:
    """Values of all LoRA inputs of an engine; a run holds them until it is done.

    Attributes:
        tensors: Input name → its tensor, in the engine's order.
        block: Buffer that they lie in.
        layout: Names, shapes and types; with equal layouts, tensors have the same offsets in their blocks.
        profiles: Numbers of the optimisation profiles that take these shapes.
    """

    def __init__(
        self, block: DeviceBuffer, tensors: Mapping[str, DeviceTensor], profiles: tuple[int, ...]
    ) -> None:
        self.block, self.tensors, self.profiles = block, tensors, profiles
        self.layout = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())

    def in_block(self, block: DeviceBuffer) -> EngineTensors:
        """Return tensors of the same layout in another block, with undefined values."""
        moved = {
            name: DeviceTensor(block, tensor.offset, tensor.shape, tensor.dtype)
            for name, tensor in self.tensors.items()
        }
        return EngineTensors(block, moved, self.profiles)


# Shape and type of each tensor.
_Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def put_together(
    device: CudaDevice,
    names: list[str],
    arrays: Mapping[str, Array],
    beside: EngineTensors | None,
    profiles: tuple[int, ...],
) -> EngineTensors:
    """Copy tensors to the device, into a new block.

    Args:
        device: The device.
        names: Names of the tensors in the engine's order.
        arrays: Values of those that are not copied from ``beside``.
        beside: Tensors that are already on the device, to copy the others from.
        profiles: As in `EngineTensors`.
    """
    known = beside.tensors if beside else {}
    layout: _Layout = {
        name: (arrays[name].shape, arrays[name].dtype)
        if name in arrays
        else (known[name].shape, known[name].dtype)
        for name in names
    }
    offsets, size = _offsets(layout)
    host: Array = np.zeros(size, np.uint8)
    for name, values in arrays.items():
        start = offsets[name]
        host[start : start + values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    block = DeviceBuffer(device, size)
    device.upload(block.address, host, device.copies)
    tensors = {
        name: DeviceTensor(block, offsets[name], shape, dtype) for name, (shape, dtype) in layout.items()
    }
    for name in names:
        if name not in arrays:
            device.copy(tensors[name].address, known[name].address, known[name].nbytes, device.copies)
    device.copies.synchronize()
    return EngineTensors(block, tensors, profiles)


def _offsets(layout: _Layout) -> tuple[dict[str, int], int]:
    """Return the offset of each tensor, and the size of all in bytes."""
    offsets, end = {}, 0
    for name, (shape, dtype) in layout.items():
        offsets[name] = end
        # Not even empty tensors may share an address.
        size = max(nbytes_of(shape, dtype), 1)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


class FixedTensors:
    """LoRA tensors at fixed addresses, so that one captured CUDA graph can run different adapters.

    Adapters of the same ranks share one block and one captured graph. Changing from one to another takes one
    copy within the GPU; running the same one again takes none.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._fixed: dict[Any, EngineTensors] = {}
        # The adapter whose values a block holds; a weak reference, which doesn't keep it alive.
        self._holds: dict[Any, weakref.ref[EngineTensors]] = {}

    def filled(self, lora: EngineTensors, stream: Stream) -> EngineTensors:
        """Return the fixed tensors of an adapter's layout; a copy on ``stream`` fills in its values."""
        fixed = self._fixed.get(lora.layout)
        if fixed is None:
            fixed = lora.in_block(DeviceBuffer(self._device, lora.block.nbytes))
            self._fixed[lora.layout] = fixed
        held = self._holds.get(lora.layout)
        if held is None or held() is not lora:
            # A failed copy leaves values of two adapters.
            self._holds.pop(lora.layout, None)
            self._device.copy(fixed.block.address, lora.block.address, lora.block.nbytes, stream)
            self._holds[lora.layout] = weakref.ref(lora)
        return fixed
