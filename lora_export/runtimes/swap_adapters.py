"""Bind the adapters of a swap graph, put them on the device, evict them, and read them again on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic

import numpy as np

from lora_export.adapter import Adapter, Array
from lora_export.binding.bind import bind_adapter
from lora_export.binding.cast import dtype_of
from lora_export.binding.pack import cut_b
from lora_export.errors import AdapterError
from lora_export.runtimes.adapter_cache import AdapterCache, Prepared
from lora_export.runtimes.feeds import Feeds
from lora_export.runtimes.model import Model, R
from lora_export.storage.inputs import same_inputs


class SwapAdapters(Generic[R]):
    """The adapters of one session.

    Attributes:
        cache: Adapters by name.
    """

    def __init__(self, model: Model[R], max_adapters: int, max_bytes: int | None) -> None:
        self.cache: AdapterCache[R] = AdapterCache(max_adapters, max_bytes)
        self._model = model
        self._base = model.put(model.fitted(_neutral_tensors(model), "the base")[0])

    def names(self) -> list[str]:
        """Return the names that a run may ask for, in the order of loading, evicted ones as well."""
        return self.cache.names()

    def on_device(self) -> list[str]:
        """Return the names of the adapters on the device, the least recently used first."""
        return self.cache.on_device()

    @contextmanager
    def use(self, feeds: Feeds, adapter: str | None, adapters: object) -> Iterator[tuple[R, Feeds]]:
        """Give a run an adapter's tensors, or the base's for None, and keep them on the device meanwhile.

        Raises:
            AdapterError: No adapter has this name, it was evicted and can't be read again, or the request has
                an adapter for each row.
        """
        if adapters is not None:
            raise AdapterError(
                f"{self._model.path.name} is a swap graph: it takes one adapter for each run",
                "give adapter=, or make a bank with bank-onnx",
            )
        if adapter is None:
            yield self._base, feeds
        else:
            with self.cache.use(adapter) as resident:
                yield resident, feeds

    def load(
        self,
        name: str,
        read: Callable[[], Adapter],
        slot: str | None = None,
        *,
        allow_unmatched: bool = False,
        any_base: bool = False,
        replace: bool = False,
    ) -> tuple[str, ...]:
        """Put an adapter on the device; return what the user should know.

        Args:
            name: The adapter's name in requests.
            read: Function that reads it; called again when a run asks for it after it was evicted.
            slot: For a bank only; refused here.
            allow_unmatched: Leave out modules that have no site.
            any_base: Load an adapter that was trained on, or converted for, another base.
            replace: Replace the adapter of this name.

        Raises:
            AdapterError: The name is taken, the adapter can't be used, or exceeds the byte budget.
            SiteError: A module of the adapter has no site.
            InputChangedError: Its tensors are computed from W0, and the graph is not the file that was
                opened.
        """
        if slot is not None:
            raise AdapterError(f"{self._model.path.name} has no slots: it is a swap graph", "omit slot=")
        if not replace:
            self.cache.check_free(name)
        with same_inputs(at_end=True):
            adapter = read()
            known = _fingerprint(adapter)
            prepared, notes = self._bind(adapter, allow_unmatched, any_base, own_base=True)

        def again() -> Prepared[R]:
            with same_inputs(at_end=True):
                fresh = read()
                # What was read then was compared then.
                prepared = self._bind(fresh, allow_unmatched, any_base)[0]
            if _fingerprint(fresh) != known:
                raise AdapterError(
                    f"adapter '{name}' was evicted, and {fresh.source} has changed since it was loaded",
                    "load it again with replace=True, or give the session larger max_adapters and max_bytes",
                )
            return prepared

        self.cache.add(name, prepared, again, replace=replace)
        return notes

    def unload(self, name: str) -> None:
        """Forget an adapter; runs that use it finish with it.

        Raises:
            AdapterError: No adapter has this name.
        """
        self.cache.remove(name)

    def _bind(
        self, adapter: Adapter, allow_unmatched: bool, any_base: bool, *, own_base: bool = False
    ) -> tuple[Prepared[R], tuple[str, ...]]:
        binding = bind_adapter(
            adapter,
            self._model.record,
            where=str(self._model.path),
            weight_of=self._model.weight_of,
            allow_unmatched=allow_unmatched,
            any_base=any_base,
            unused=self._model.unused,
            own_base=own_base,
        )
        tensors, notes = self._model.fitted(binding.tensors, f"adapter '{adapter.name}'")

        def place() -> R:
            # Tensors that the adapter doesn't set are the base's, if the graph has no default for them.
            return self._model.put(tensors, self._base)

        nbytes = sum(values.nbytes for values in tensors.values())
        return Prepared(nbytes, place), (*binding.notes, *notes)


def _fingerprint(adapter: Adapter) -> tuple[Any, ...]:
    """Return what identifies an adapter's content: the hash of its weights file, and ranks and scalings."""
    return adapter.sha256, *((key, module.rank, module.scaling) for key, module in adapter.modules.items())


def _neutral_tensors(model: Model[R]) -> dict[str, Array]:
    """Return tensors without effect for inputs without a default (flavour ``tensorrt``)."""
    tensors: dict[str, Array] = {}
    for module in model.record.modules:
        rank = module.rank or module.groups  # the smallest rank that the graph takes
        dtype = dtype_of(module.dtype)
        tensors[module.lora_a] = np.zeros(module.a_shape(rank), dtype)
        tensors |= cut_b(module, np.zeros(module.b_shape(rank), dtype))
        if model.record.dora:
            tensors[module.scale] = np.ones(module.out_dim, dtype)
        if module.bias:
            tensors[module.lora_bias] = np.zeros(module.out_dim, dtype)
    return {name: values for name, values in tensors.items() if model.lora[name].required}
