"""Keep LoRA tensors at fixed addresses, so that one captured CUDA graph can run different adapters.

Adapters of the same ranks share one block and one captured graph. Changing from one to another takes one copy
within the GPU; running the same one again takes none.
"""

from __future__ import annotations

import weakref
from typing import Any

from lora_export.runtimes.tensorrt.cuda import CudaDevice, DeviceBuffer, Stream
from lora_export.runtimes.tensorrt.tensors import EngineTensors


class FixedTensors:
    """One block for each layout of LoRA tensors."""

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
