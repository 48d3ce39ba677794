"""LoRA tensors that lie on the device, and the I/O bindings that have them bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_export.runtimes.feeds import Feeds
from lora_export.runtimes.ort.device import OrtValue, Provider, host_value

# Bindings kept per set of tensors: as many threads can use one adapter at once without binding anew.
_IDLE_BINDINGS = 16
_NOTHING = np.zeros(0, np.float32)


class Resident:
    """Tensors on the device under the graph's names, ready for a run.

    Binding a few hundred tensors takes longer than a small graph's run, so that a binding is kept after its
    run and taken again. A binding holds its tensors: a run in flight is not disturbed when its adapter is
    unloaded, and one binding serves one run at a time.

    Attributes:
        tensors: Name → tensor. Inputs that are not here keep the graph's own default.
    """

    def __init__(self, session: Any, tensors: Mapping[str, OrtValue]) -> None:
        self.tensors = dict(tensors)
        self._session = session
        self._defaults = frozenset(port.name for port in session.get_overridable_initializers())
        self._idle: deque[Any] = deque(maxlen=_IDLE_BINDINGS)

    def run(
        self, feeds: Feeds, outputs: Sequence[str], device: Provider, device_id: int = 0
    ) -> list[OrtValue]:
        """Run the graph with these tensors; return the outputs in the order asked for, on ``device``."""
        try:
            binding = self._idle.pop()
        except IndexError:
            binding = self.new_binding()
        self.bind_feeds(binding, feeds)
        for name in outputs:
            binding.bind_output(name, device, device_id)
        # Never with RunOptions.add_active_adapter: ONNX Runtime ignores it beside an I/O binding.
        self._session.run_with_iobinding(binding)
        values: list[OrtValue] = binding.get_outputs()
        if not self._defaults.isdisjoint(name for name, _ in feeds):
            return values  # The next run may want the default: a binding gives none back.
        # A kept binding must not keep a request's feeds and results alive.
        binding.clear_binding_outputs()
        for name, _ in feeds:
            binding.bind_cpu_input(name, _NOTHING)
        self._idle.append(binding)
        return values

    def new_binding(self) -> Any:
        """Return a binding with the tensors bound, and nothing else."""
        binding = self._session.io_binding()
        for name, value in self.tensors.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def bind_feeds(self, binding: Any, feeds: Feeds) -> None:
        """Bind a run's inputs: arrays are used where they are (CPU) or copied (CUDA), tensors are bound."""
        for name, value in feeds:
            if not isinstance(value, np.ndarray):
                binding.bind_ortvalue_input(name, value)
            elif name in self._defaults:
                # ONNX Runtime looks arrays' names up among the inputs without a default only.
                binding.bind_ortvalue_input(name, host_value(value))
            else:
                binding.bind_cpu_input(name, value)
