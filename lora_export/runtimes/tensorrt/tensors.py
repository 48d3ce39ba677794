"""LoRA tensors in one block of a GPU's memory: one allocation and one copy for all tensors of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.runtimes.tensorrt.cuda import ALIGNMENT, CudaDevice, DeviceBuffer, DeviceTensor, nbytes_of


class EngineTensors:
    """Values of all LoRA inputs of an engine; a run holds them until it is done.

    Attributes:
        tensors: Input → its tensor, in the engine's order.
        block: What they lie in.
        layout: Shapes and types: where two have the same, a tensor lies at the same place in both blocks.
        profiles: Numbers of the optimisation profiles that take these shapes.
    """

    def __init__(
        self, block: DeviceBuffer, tensors: Mapping[str, DeviceTensor], profiles: tuple[int, ...]
    ) -> None:
        self.block, self.tensors, self.profiles = block, tensors, profiles
        self.layout = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())

    def in_block(self, block: DeviceBuffer) -> EngineTensors:
        """Return tensors of the same layout in another block, whose values are not set."""
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
    """Copy tensors to the device, into a block of their own.

    Args:
        device: The device.
        names: Which tensors, in the engine's order.
        arrays: Their values, for those that are not ``beside``'s.
        beside: Tensors on the device already, to copy the others from.
        profiles: See `EngineTensors`.
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
    """Return where each tensor begins, and the size of all."""
    offsets, end = {}, 0
    for name, (shape, dtype) in layout.items():
        offsets[name] = end
        # Not even empty tensors may share an address.
        size = max(nbytes_of(shape, dtype), 1)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
