"""Define what a session needs from a model, whichever runtime has it open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from lora_export.adapter import Array
from lora_export.binding.base_weights import WeightOf
from lora_export.graph.exposed import LoraRecord
from lora_export.runtimes.feeds import DeviceValue, Feeds, ModelInput

# LoRA tensors on the device, ready for a run, in the runtime's own type.
R = TypeVar("R")


class Model(Protocol[R]):
    """A graph with exposed LoRA, or an engine built from one, opened by a runtime."""

    @property
    def path(self) -> Path:
        """Path of the model's file."""

    @property
    def record(self) -> LoraRecord:
        """The model's LoRA record."""

    @property
    def lora(self) -> Mapping[str, ModelInput]:
        """LoRA's inputs by name."""

    @property
    def unused(self) -> frozenset[str]:
        """`ExposedModule.name` of those whose tensors change no output."""

    @property
    def weight_of(self) -> WeightOf:
        """The base's weights by name, for adapters whose tensors are computed from them."""

    def choose_outputs(self, names: Sequence[str] | None) -> Sequence[str]:
        """Return the outputs to compute; raise `BackendError` if the model lacks one."""

    def check_feeds(self, feeds: Mapping[str, Array | DeviceValue]) -> Feeds:
        """Return the feeds as they are bound; raise `BackendError` with all their problems."""

    def fitted(self, tensors: Mapping[str, Array], adapter: str) -> tuple[Mapping[str, Array], list[str]]:
        """Return an adapter's tensors in shapes that the model takes, and notes, or raise `AdapterError`."""

    def put(self, tensors: Mapping[str, Array], beside: R | None = None) -> R:
        """Copy LoRA tensors to the device; take missing ones from ``beside``."""

    def run(self, resident: R, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """Run the model and return the outputs' values in the requested order."""

    def run_on_device(self, resident: R, feeds: Feeds, outputs: Sequence[str]) -> list[DeviceValue]:
        """Run the model and leave the outputs on the device."""

    def save_runtime_cache(self) -> None:
        """Save the kernels compiled for this GPU, if the runtime compiles any."""

    def close(self) -> None:
        """Save the cache and release what the model holds."""
