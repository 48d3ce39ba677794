"""Run one model with many adapters that change at run time, in ONNX Runtime or TensorRT: `AdapterSession`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_export.adapter import Adapter, Array
from lora_export.base.pipeline import refuse_other_components
from lora_export.engines.record import is_engine
from lora_export.errors import AdapterError, BackendError
from lora_export.formats import load_adapter
from lora_export.formats.reading.weights_files import files_of
from lora_export.graph.exposed import LoraRecord
from lora_export.runtimes.bank_slots import BankSlots, Rows
from lora_export.runtimes.feeds import DeviceValue, Feeds
from lora_export.runtimes.held_adapter import HeldAdapter
from lora_export.runtimes.model import Model
from lora_export.runtimes.ort.device import OrtValue, Provider
from lora_export.runtimes.ort.model import OrtModel
from lora_export.runtimes.session_options import PathLike, SessionOptions
from lora_export.runtimes.swap_adapters import SwapAdapters
from lora_export.runtimes.tensorrt.model import TensorRTModel
from lora_export.storage.outputs import refuse_inputs


class AdapterSession:
    """Run a graph that ``swap-onnx`` or ``bank-onnx`` made, each request with its own adapter.

    It takes the graph (ONNX Runtime) or an engine that ``build-engine`` built from it (TensorRT-RTX or
    TensorRT, on an NVIDIA GPU).

    Many threads may call all methods at once; runs of an engine take turns. A run keeps the tensors that it
    started with: if its adapter is unloaded, replaced or evicted during the run, it finishes with that
    adapter.

    *Swap graph.* `load_adapter` puts an adapter on the device, ``run(adapter=name)`` uses it, ``run()`` runs
    the base. Above ``max_adapters`` or ``max_bytes``, the least recently used adapter that no run is using
    leaves the device; its name stays known, and the next run that asks for it reads its source again (and
    refuses a source that has changed since). `unload_adapter` forgets it.

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
        provider: Provider | None = None,
        max_adapters: int = 16,
        max_bytes: int | None = None,
        threads: int | None = None,
        cuda_graph: bool = False,
        max_cuda_graphs: int = 64,
        session_options: Any = None,
        device_id: int = 0,
        profile: str | None = None,
        runtime_cache: PathLike | None = None,
        weight_streaming_budget_bytes: int | None = None,
        source: PathLike | None = None,
    ) -> None:
        """Open a graph or an engine.

        Args:
            model: The ``.onnx`` file, or the ``.engine`` file with its record beside it.
            provider: ``cpu`` or ``cuda``; by default ``cpu`` for a graph, ``cuda`` for an engine.
            max_adapters: Largest number of adapters of a swap graph on the device at once.
            max_bytes: Largest number of their bytes; None: no limit.
            threads: ONNX Runtime's threads within one operator; by default one for each core.
            cuda_graph: Replay runs as CUDA graphs. With ONNX Runtime one graph for each (adapter, input
                shapes, outputs), on a thread of the session's own; with an engine one for each (ranks, input
                shapes), for all adapters.
            max_cuda_graphs: Largest number of graphs captured by the session; further combinations run
                without.
            session_options: An `onnxruntime.SessionOptions`, if the defaults don't suit.
            device_id: Number of the GPU.
            profile: For an engine: name of the optimisation profile; by default the first that takes a
                request's shapes.
            runtime_cache: For a TensorRT-RTX engine: file of the kernels that it compiles for this GPU; read
                now, written by `close` and `save_runtime_cache`.
            weight_streaming_budget_bytes: For an engine built with weight streaming: largest device memory
                for its weights; other weights are streamed from host memory.
            source: For an engine: the ONNX graph that it was built from. Needed for adapters whose tensors
                are computed from W0 (DoRA, replaced heads and biases) and were not converted before.

        Raises:
            BackendUnavailable: ONNX Runtime or its CUDA provider, TensorRT or cuda-bindings is not installed.
            BackendError: The model can't be opened or can't run here, or options are wrong.
            GraphError: The graph is missing, or its metadata (the engine record) contain no LoRA record.
        """
        options = SessionOptions(
            provider=provider,
            max_adapters=max_adapters,
            max_bytes=max_bytes,
            threads=threads,
            cuda_graph=cuda_graph,
            max_cuda_graphs=max_cuda_graphs,
            session_options=session_options,
            device_id=device_id,
            profile=profile,
            runtime_cache=runtime_cache,
            weight_streaming_budget_bytes=weight_streaming_budget_bytes,
            source=source,
        )
        self._model = _open(Path(model), options)
        self._writes = [] if runtime_cache is None else [Path(runtime_cache)]
        self._adapters = (
            BankSlots(self._model)
            if self._model.record.mode == "bank"
            else SwapAdapters(self._model, max_adapters, max_bytes)
        )

    def __enter__(self) -> AdapterSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write the runtime cache, if there is one, and release the engine; a graph needs no closing.

        The adapters leave the GPU when the session object is deleted.
        """
        self._model.close()

    def save_runtime_cache(self) -> None:
        """Write the kernels that TensorRT-RTX has compiled so far to the file ``runtime_cache``.

        Raises:
            BackendError: The session has no runtime cache.
            OutputError: The file can't be written.
        """
        self._model.save_runtime_cache()

    @property
    def record(self) -> LoraRecord:
        """The graph's LoRA record."""
        return self._model.record

    @property
    def adapters(self) -> list[str]:
        """Names that `run` takes: in the order of loading, evicted ones included; in a bank by slot."""
        return self._adapters.names()

    @property
    def on_device(self) -> list[str]:
        """Names of the adapters on the device, the least recently used first; in a bank all of them."""
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
            name: The adapter's name in `run`.
            source: Any file or folder that `lora_export.load_adapter` reads, a file that was converted for
                this graph, or an `Adapter`, whose arrays must not be written to while the name is known:
                after an eviction they are read again, and refused if they were.
            alpha: As for `lora_export.load_adapter`.
            rslora: As for `lora_export.load_adapter`.
            format: As for `lora_export.load_adapter`.
            component: As for `lora_export.load_adapter`.
            slot: For a bank: name of the slot in the graph; by default the slot of the adapter's name, or a
                free one.
            allow_unmatched: Leave out modules that have no site in the graph.
            any_base: Load an adapter whose own base, on this machine, has other values, or that was converted
                for another base, unless it is valid for that base only.
            replace: Replace the adapter of this name (or in this slot), which is refused otherwise.

        Returns:
            Notes on values that were converted, padded or left out.

        Raises:
            AdapterError: The name is taken, or the file can't be read or used, is for another component of a
                pipeline than the graph's folder, or exceeds the byte budget.
            SiteError: A module of the adapter has no site in the graph.
            OutputError: The runtime cache would be written over the adapter.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is {name!r}", "give a text that is not empty")
        stated = {"alpha": alpha, "rslora": rslora, "format": format, "component": component}
        options = {key: value for key, value in stated.items() if value is not None}
        held = HeldAdapter(source, name) if isinstance(source, Adapter) else Path(source)
        read = partial(
            _read, held, name, options=options, folder=self._model.path.parent, writes=self._writes
        )
        return self._adapters.load(
            name, read, slot, allow_unmatched=allow_unmatched, any_base=any_base, replace=replace
        )

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; runs that use it finish with it.

        Raises:
            AdapterError: No adapter has this name, or the bank's adapters are constants.
        """
        self._adapters.unload(name)

    def run(
        self,
        feeds: Mapping[str, Array | DeviceValue],
        adapter: str | None = None,
        *,
        adapters: Rows | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Run the model.

        Args:
            feeds: Input name → numpy array, or a tensor that `run_on_device` returned (for a graph: any
                `onnxruntime.OrtValue`), without LoRA's inputs.
            adapter: For a swap graph: name of the adapter; None runs the base.
            adapters: For a bank: for each row of the batch a name, None for the base, or a dict of names and
                weights; or an array ``[batch, n_slots]`` of weights. None runs the base for all rows.
            outputs: Names of the outputs to compute; by default all.

        Returns:
            Output name → values; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            AdapterError: Unknown adapters, or entries that don't fit the batch.
            BackendError: Feeds that don't fit the model, or the runtime failed.
            InputChangedError: A graph's data file was written to in place since it was opened (looked at once
                a second: ONNX Runtime maps it). One that was replaced by renaming changes nothing.
        """
        return self._run(self._model.run, feeds, adapter=adapter, adapters=adapters, outputs=outputs)

    def run_on_device(
        self,
        feeds: Mapping[str, Array | DeviceValue],
        adapter: str | None = None,
        *,
        adapters: Rows | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceValue]:
        """Run the model as `run` does and leave the outputs on the device, to be fed again or read later.

        They are of type `onnxruntime.OrtValue`, for an engine `runtimes.tensorrt.cuda.DeviceTensor`; both
        have ``numpy()``.
        """
        return self._run(
            self._model.run_on_device, feeds, adapter=adapter, adapters=adapters, outputs=outputs
        )

    def run_ortvalues(
        self,
        feeds: Mapping[str, Array | OrtValue],
        adapter: str | None = None,
        *,
        adapters: Rows | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, OrtValue]:
        """Run a graph as `run_on_device` does: its outputs are `onnxruntime.OrtValue`.

        Raises:
            BackendError: As for `run`, or the model is an engine.
        """
        if not isinstance(self._model, OrtModel):
            raise BackendError(
                f"{self._model.path.name} is an engine, which has no OrtValue", "use run_on_device"
            )
        return self.run_on_device(feeds, adapter, adapters=adapters, outputs=outputs)

    def lora_inputs(
        self,
        feeds: Mapping[str, Array | DeviceValue],
        adapter: str | None = None,
        *,
        adapters: Rows | None = None,
    ) -> dict[str, Array]:
        """Return the further inputs of a run of a graph: LoRA's inputs, a bank's weights.

        Inputs for which the graph's defaults are used are left out. The arrays are the caller's own.

        Args:
            feeds: As for `run`.
            adapter: As for `run`.
            adapters: As for `run`.

        Raises:
            AdapterError: As for `run`.
            BackendError: As for `run`, or the model is an engine.
        """
        if not isinstance(self._model, OrtModel):
            raise BackendError(
                f"{self._model.path.name} is an engine, whose inputs stay on the GPU", "use run"
            )
        checked = self._model.check_feeds(feeds)
        with self._adapters.use(checked, adapter, adapters) as (resident, fed):
            # Copies: later runs read the tensors themselves, and on the CPU `read` gives their memory.
            bound = {name: self._model.memory.read(value).copy() for name, value in resident.tensors.items()}
        return bound | {name: value for name, value in fed if name not in feeds}

    def _run(
        self,
        run: Callable[[Any, Feeds, Sequence[str]], list[Any]],
        feeds: Mapping[str, Array | DeviceValue],
        adapter: str | None,
        adapters: Rows | None,
        outputs: Sequence[str] | None,
    ) -> dict[str, Any]:
        names = self._model.choose_outputs(outputs)
        checked = self._model.check_feeds(feeds)
        with self._adapters.use(checked, adapter, adapters) as (resident, fed):
            values = run(resident, fed, names)
        return dict(zip(names, values, strict=True))


def _read(
    source: Path | HeldAdapter, name: str, options: Mapping[str, Any], folder: Path, writes: Sequence[Path]
) -> Adapter:
    if isinstance(source, Path):
        loaded = load_adapter(source, **options)
        refuse_other_components([loaded], [folder])
    else:
        if options:
            raise AdapterError(
                f"adapter '{name}' is an Adapter, which states its own {', '.join(options)}",
                "omit these, or give the file",
            )
        loaded = source.read()
    if writes:
        refuse_inputs(writes, files_of(loaded.source))
    return loaded


def _open(path: Path, options: SessionOptions) -> Model[Any]:
    """Open a graph or an engine with exposed LoRA.

    Raises:
        BackendUnavailable: The runtime is not installed.
        BackendError: The file can't be opened or can't run here, or options are wrong.
        GraphError: The graph is missing, or has no exposed LoRA.
    """
    if is_engine(path):
        return TensorRTModel(path, options.for_engine(path))
    return OrtModel(
        path,
        options.for_graph(path),
        threads=options.threads,
        cuda_graphs=options.cuda_graphs,
        session_options=options.session_options,
        device_id=options.device_id,
    )
