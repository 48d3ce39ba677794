"""What a session needs of a model, whichever runtime has it open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from lora_export.adapter import Array
from lora_export.binding.base_weights import WeightOf
from lora_export.graph.exposed import ExposedGraph
from lora_export.runtimes.feeds import DeviceValue, Feeds, Input

# LoRA tensors on the device, ready for a run, as the runtime keeps them.
R = TypeVar("R")


class Model(Protocol[R]):
    """A graph with exposed LoRA, or an engine built from one, opened by a runtime."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def record(self) -> ExposedGraph:
        """What it says about its LoRA tensors."""

    @property
    def lora(self) -> Mapping[str, Input]:
        """LoRA's inputs, by name."""

    @property
    def weight_of(self) -> WeightOf:
        """The base's weights by name, for adapters whose tensors are computed from them."""

    def choose_outputs(self, names: Sequence[str] | None) -> Sequence[str]:
        """Return the outputs to compute; `BackendError` where there are no such."""

    def check_feeds(self, feeds: Mapping[str, Array | DeviceValue]) -> Feeds:
        """Return the feeds as they are bound; `BackendError` with all that is wrong with them."""

    def fitted(self, tensors: Mapping[str, Array], adapter: str) -> tuple[Mapping[str, Array], list[str]]:
        """Return an adapter's tensors in shapes that it takes, and notes; `AdapterError` if it takes none."""

    def put(self, tensors: Mapping[str, Array], beside: R | None = None) -> R:
        """Copy LoRA tensors to the device; those that are not among them are ``beside``'s."""

    def run(self, resident: R, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """Run it; return the outputs' values in the order asked for."""

    def run_on_device(self, resident: R, feeds: Feeds, outputs: Sequence[str]) -> list[DeviceValue]:
        """Run it; leave the outputs on the device."""

    def save_runtime_cache(self) -> None:
        """Keep what was compiled for this GPU, where a runtime compiles."""

    def close(self) -> None:
        """Save the cache and give back what the model holds."""
