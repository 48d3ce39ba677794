"""`AdapterSession`: one graph, many adapters, changed while it runs, by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter, Array
from lora_export.errors import AdapterError, BackendError
from lora_export.exposed import ExposedGraph
from lora_export.formats import load_adapter
from lora_export.runtimes.bank_slots import BankSlots, Rows
from lora_export.runtimes.device import OrtValue, Provider
from lora_export.runtimes.ort_model import OrtModel
from lora_export.runtimes.resident import Feeds, Resident
from lora_export.runtimes.swap_adapters import SwapAdapters

PathLike = str | os.PathLike[str]


class AdapterSession:
    """Runs a graph of ``swap-onnx`` or ``bank-onnx``, each request with an adapter of its own.

    Many threads may call everything at once. A run keeps the tensors that it started with: one that is in
    flight while its adapter is unloaded, replaced or evicted finishes with that adapter.

    *Swap graph.* `load_adapter` puts an adapter on the device, ``run(adapter=name)`` uses it, ``run()`` is
    the base. Above ``max_adapters`` or ``max_bytes`` the least recently used that no run is using leaves the
    device; its name stays known, and the next run that asks for it reads its source again (and refuses a
    source that has changed meanwhile). `unload_adapter` forgets it.

    *Bank.* The adapters are in the graph, ``run(adapters=[…])`` has one entry for each row. Those of a bank
    made with ``--resident inputs`` can be loaded and unloaded; each such change copies the bank's tensors.

    Example::

        session = AdapterSession("model.onnx", provider="cpu")
        session.load_adapter("emotion", "lora-emotion.pt", alpha=16)
        logits = session.run({"input_ids": ids}, adapter="emotion")["logits"]
    """

    def __init__(
        self,
        model: PathLike,
        *,
        provider: Provider = "cpu",
        max_adapters: int = 16,
        max_bytes: int | None = None,
        threads: int | None = None,
        cuda_graph: bool = False,
        max_cuda_graphs: int = 64,
        session_options: Any = None,
    ) -> None:
        """Open a graph.

        Args:
            model: The ``.onnx`` file.
            provider: ``cpu`` or ``cuda``.
            max_adapters: Most adapters of a swap graph on the device at once.
            max_bytes: Most bytes of them; None: no limit.
            threads: ONNX Runtime's threads within one operator; by default as many as there are cores.
            cuda_graph: Replay runs as CUDA graphs, one for each (adapter, input shapes, outputs). Runs then
                take turns, on a thread of the session's own.
            max_cuda_graphs: Most graphs captured in the session's life; further combinations run without.
            session_options: An `onnxruntime.SessionOptions`, where the defaults don't do.

        Raises:
            BackendUnavailable: ONNX Runtime, or its CUDA provider, is not installed.
            BackendError: ONNX Runtime can't open the graph, or options are wrong.
            GraphError: There is no such file, or its metadata have no LoRA record.
        """
        _check_options(provider, max_adapters, max_bytes, threads, cuda_graph, max_cuda_graphs)
        graphs = max_cuda_graphs if cuda_graph else 0
        self._model = OrtModel(Path(model), provider, threads, graphs, session_options)
        self._adapters = (
            BankSlots(self._model)
            if self._model.record.mode == "bank"
            else SwapAdapters(self._model, max_adapters, max_bytes)
        )

    @property
    def record(self) -> ExposedGraph:
        """What the graph says about its LoRA tensors."""
        return self._model.record

    @property
    def adapters(self) -> list[str]:
        """Names that `run` takes, evicted ones as well, in the order of loading; a bank's by slot."""
        return self._adapters.names()

    @property
    def on_device(self) -> list[str]:
        """Names of the adapters on the device, the least recently used first; a bank's all are."""
        return self._adapters.on_device()

    def load_adapter(
        self,
        name: str,
        source: PathLike | Adapter,
        *,
        alpha: float | None = None,
        rslora: bool | None = None,
        format: str | None = None,
        component: str | None = None,
        slot: str | None = None,
        allow_unmatched: bool = False,
        any_base: bool = False,
        replace: bool = False,
    ) -> tuple[str, ...]:
        """Load an adapter under a name.

        Args:
            name: What `run` calls it.
            source: Any file or folder that `lora_export.load_adapter` reads, one that was converted for this
                graph, or an `Adapter`.
            alpha: See `lora_export.load_adapter`.
            rslora: See there.
            format: See there.
            component: See there.
            slot: In a bank, the slot by its name in the graph; by default the one named like the adapter, or
                a free one.
            allow_unmatched: Go on without modules that have no place in the graph.
            any_base: Load a file that was converted for another base, unless it holds for that one only.
            replace: Take the place of the adapter of this name (or in this slot), which is refused otherwise.

        Returns:
            What to know about it: values that were converted, padded or left out.

        Raises:
            AdapterError: The name is taken, the file can't be read or used, or exceeds the byte budget.
            SiteError: Something of the adapter has no place in the graph.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is {name!r}", "give a text that is not empty")
        stated = {"alpha": alpha, "rslora": rslora, "format": format, "component": component}
        options = {key: value for key, value in stated.items() if value is not None}
        read = partial(_read, source, name, options)
        return self._adapters.load(
            name, read, slot, allow_unmatched=allow_unmatched, any_base=any_base, replace=replace
        )

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; runs that use it finish with it.

        Raises:
            AdapterError: There is none of this name, or the bank's adapters are constants.
        """
        self._adapters.unload(name)

    def run(
        self,
        feeds: Mapping[str, Array | OrtValue],
        adapter: str | None = None,
        *,
        adapters: Rows | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: Input name → numpy array or `onnxruntime.OrtValue`, without LoRA's inputs.
            adapter: Of a swap graph: which adapter; None is the base.
            adapters: Of a bank: for each row of the batch a name, None for the base, or a dict of names and
                weights; or an array ``[batch, n_slots]`` of weights. None is the base for all rows.
            outputs: Names of the outputs to compute; by default all.

        Returns:
            Output name → values; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            AdapterError: Unknown adapters, or entries that don't fit the batch.
            BackendError: Feeds that don't fit the graph, or ONNX Runtime failed.
        """
        return self._run(self._model.run, feeds, adapter, adapters, outputs)

    def run_ortvalues(
        self,
        feeds: Mapping[str, Array | OrtValue],
        adapter: str | None = None,
        *,
        adapters: Rows | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, OrtValue]:
        """Run the graph as `run` does and leave the outputs on the device, as `onnxruntime.OrtValue`."""
        return self._run(self._model.run_on_device, feeds, adapter, adapters, outputs)

    def _run(
        self,
        run: Callable[[Resident, Feeds, Sequence[str]], list[Any]],
        feeds: Mapping[str, Array | OrtValue],
        adapter: str | None,
        adapters: Rows | None,
        outputs: Sequence[str] | None,
    ) -> dict[str, Any]:
        names = self._model.choose_outputs(outputs)
        checked = self._model.check_feeds(feeds)
        with self._adapters.use(checked, adapter, adapters) as (resident, fed):
            values = run(resident, fed, names)
        return dict(zip(names, values, strict=True))


def _check_options(
    provider: str,
    max_adapters: int,
    max_bytes: int | None,
    threads: int | None,
    cuda_graph: bool,
    max_cuda_graphs: int,
) -> None:
    problems = []
    if provider not in ("cpu", "cuda"):
        problems.append(f"provider is {provider!r}, wanted 'cpu' or 'cuda'")
    if cuda_graph and provider != "cuda":
        problems.append(f"cuda_graph=True with provider {provider!r}, wanted 'cuda'")
    limits = {
        "max_adapters": max_adapters,
        "max_bytes": max_bytes,
        "threads": threads,
        "max_cuda_graphs": max_cuda_graphs,
    }
    problems += [
        f"{name} is {value}, wanted at least 1"
        for name, value in limits.items()
        if value is not None and value < 1
    ]
    if problems:
        raise BackendError("the session's options can't be used", "mend these", problems)


def _read(source: PathLike | Adapter, name: str, options: Mapping[str, Any]) -> Adapter:
    if not isinstance(source, Adapter):
        return load_adapter(Path(source), **options)
    if options:
        raise AdapterError(
            f"adapter '{name}' is an Adapter, which says its own {', '.join(options)}",
            "leave these away, or give the file",
        )
    return source
