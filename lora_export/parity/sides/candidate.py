"""What is checked: a graph in ONNX Runtime or an engine in its TensorRT, run in any state that it can be in.

A *plain* file has one state: it is the base, or adapters are merged into it. A *swap* graph has one state a
run, a *bank* one a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.engines.record import EngineRecord, is_engine, read_engine
from lora_export.errors import AdapterError, BackendError
from lora_export.graph.captured import Captured
from lora_export.graph.exposed import KEY, UNHASHED, WEIGHTS_INPUT, ExposedGraph, exposed_of
from lora_export.graph.onnx_file import GraphFile, load_graph
from lora_export.graph.stored_types import StoredTypes, stored_types
from lora_export.parity.feeds.made import InputPort, ports_of_graph
from lora_export.parity.judge.limits import STEP
from lora_export.parity.result import BASE, State, state_of
from lora_export.runtimes.ort.device import DeviceMemory, Provider, host_value
from lora_export.runtimes.ort.open import open_session
from lora_export.runtimes.session import AdapterSession
from lora_export.runtimes.tensorrt.session import EngineSession
from lora_export.storage.hashes import hash_file, identity_of


@dataclass(frozen=True)
class About:
    """What is known of a candidate without running it.

    Attributes:
        path: The file.
        mode: ``plain``, ``swap`` or ``bank``.
        runtime: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        provider: ``cpu`` or ``cuda``.
        ports: What a request feeds: all inputs but LoRA's.
        outputs: Names of the outputs.
        types: Which dtypes its weights and outputs have.
        captured: What the graph says of its model; None where we did not capture it.
        record: Of its exposed LoRA.
        sha256: Identity of the file.
    """

    path: Path
    mode: str
    runtime: str
    provider: Provider
    ports: tuple[InputPort, ...]
    outputs: tuple[str, ...]
    types: StoredTypes
    captured: Captured | None = None
    record: ExposedGraph | None = None
    sha256: str = ""

    @property
    def dtype(self) -> str:
        """The dtype that it computes in: the capture's, where outputs or weights are as coarse as that."""
        outputs, mostly = self.types.outputs, self.types.mostly or self.types.outputs
        shown = max(STEP[outputs], STEP[mostly])
        return self.captured.dtype if self.captured and STEP[self.captured.dtype] <= shown else outputs

    @property
    def caches(self) -> bool:
        """It takes and gives a key-value cache."""
        return any(port.name.startswith("past_key_values.") for port in self.ports)


@dataclass
class Candidate(ABC):
    """An opened candidate.

    Attributes:
        about: What is known of it.
        adapters: Name → adapter, those that were given.
        notes: What a user should know.
    """

    about: About
    adapters: Mapping[str, Adapter]
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def states(self, blend: State) -> list[State]:
        """Return the states to compare; ``blend`` is that of adapters that were merged together."""

    @abstractmethod
    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Run it.

        Args:
            values: The feeds.
            rows: The state of each row of the batch; only a bank's differ.

        Returns:
            Output name → values.
        """

    def lora_inputs(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Return what a run feeds beside the feeds to bring a graph into the rows' states."""
        return {}

    @property
    def switches(self) -> bool:
        """Adapters can be changed, or left out, while it runs."""
        return self.about.mode != "plain"


class PlainCandidate(Candidate):
    """A graph or an engine without exposed LoRA."""

    def __init__(self, about: About, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(about, adapters)
        if about.runtime == "onnxruntime":
            self._memory = DeviceMemory(about.provider)
            self._session = open_session(about.path, self._memory)
        else:
            self._session = EngineSession(about.path)

    def states(self, blend: State) -> list[State]:
        """Return its only state."""
        return [blend]

    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Run it; it is always in the state that it was exported in."""
        if isinstance(self._session, EngineSession):
            return self._session.run(values)
        bound = {name: host_value(array) for name, array in values.items()}
        try:
            found = self._session.run_with_ort_values(list(self.about.outputs), bound)
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise BackendError(
                f"ONNX Runtime could not run {self.about.path.name}: {error}",
                "compare the feeds' shapes with the graph's inputs",
                [f"{port.name}: {port.dtype} {list(port.shape)}" for port in self.about.ports],
            ) from error
        return {name: self._memory.read(value) for name, value in zip(self.about.outputs, found, strict=True)}


class SwapCandidate(Candidate):
    """A graph or an engine whose adapters are inputs."""

    def __init__(self, about: About, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(about, adapters)
        self.session = _adapter_session(about, max(len(adapters), 1))
        for name, adapter in adapters.items():
            self.notes += self.session.load_adapter(name, adapter)
        if not adapters:
            self.notes.append("no adapter was given: only the graph without adapter is checked")

    def states(self, blend: State) -> list[State]:
        """Return the base, and each adapter alone."""
        return [BASE, *(state_of(name) for name in self.adapters)]

    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Run it with the rows' adapter."""
        return self.session.run(values, adapter=self._adapter(rows))

    def lora_inputs(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Return the adapter's tensors."""
        return self.session.lora_inputs(values, adapter=self._adapter(rows))

    @staticmethod
    def _adapter(rows: Sequence[State]) -> str | None:
        (state,) = set(rows)
        return state[0][0] if state else None


class BankCandidate(Candidate):
    """A graph or an engine with several adapters at once."""

    def __init__(self, about: About, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(about, adapters)
        self.session = _adapter_session(about, max(len(adapters), 1))
        assert about.record is not None
        self.slots = self._find_slots(about.record)

    def states(self, blend: State) -> list[State]:
        """Return the base, and each adapter alone."""
        return [BASE, *(state_of(name) for name in self.adapters)]

    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Run it with each row's adapters."""
        return self.session.run(values, adapters=self._wanted(rows))

    def lora_inputs(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Return the rows' weights, and the slots' tensors where they are inputs."""
        return self.session.lora_inputs(values, adapters=self._wanted(rows))

    def _wanted(self, rows: Sequence[State]) -> list[dict[str, float]]:
        return [{self.slots[name]: weight for name, weight in state} for state in rows]

    def _find_slots(self, record: ExposedGraph) -> dict[str, str]:
        """Return adapter name → what the session calls it: by name, else by the file's hash.

        The hash is of the weights alone: slots that differ in their scaling only share it, so that it tells
        a slot only where no other has it.

        Raises:
            AdapterError: Adapters are in no slot and none can be loaded, or it is not clear in which.
        """
        resident = self.session.adapters
        files = {slot.name: slot.adapter for slot in record.slots if slot.name in resident}
        found, problems = {}, []
        for name, adapter in self.adapters.items():
            same = [slot for slot, file in files.items() if file == adapter.sha256 != ""]
            if name in resident:
                found[name] = name
                if files.get(name) not in (adapter.sha256 or UNHASHED, None):
                    self.notes.append(
                        f"the bank's slot '{name}' was filled from another file than {adapter.source}"
                    )
            elif len(same) == 1:
                found[name] = same[0]
                self.notes.append(
                    f"the bank has no slot '{name}': its slot '{same[0]}' has the file of {adapter.source}"
                )
            elif same:
                problems.append(f"{name}: {adapter.source} is the file of slots {', '.join(same)}")
            elif record.resident == "inputs" and len(self.session.adapters) < len(record.slots):
                self.notes += self.session.load_adapter(name, adapter)
                found[name] = name
            elif record.resident == "inputs":
                problems.append(f"{name}: all {len(record.slots)} slots are taken, by other adapters")
            else:
                problems.append(f"{name}: no slot of that name, nor of {adapter.source}")
        problems += [
            f"{name}: slot '{slot}' as well as {first}"
            for name, slot in found.items()
            if (first := next(other for other in found if found[other] == slot)) != name
        ]
        if problems:
            raise AdapterError(
                f"{len(problems)} adapters have no slot of their own in {self.about.path.name}",
                f"give --adapter SLOT=PATH; its slots: {', '.join(slot.name for slot in record.slots)}",
                problems,
            )
        if left := [slot for slot in resident if slot not in found.values()]:
            self.notes.append(f"no adapter was given for {', '.join(left)} of the bank: not checked")
        return found


def _adapter_session(about: About, adapters: int) -> AdapterSession:
    provider = about.provider if about.runtime == "onnxruntime" else None
    return AdapterSession(about.path, provider=provider, max_adapters=adapters)


_OPENED: Mapping[str, type[PlainCandidate] | type[SwapCandidate] | type[BankCandidate]] = {
    "plain": PlainCandidate,
    "swap": SwapCandidate,
    "bank": BankCandidate,
}


def open_candidate(about: About, adapters: Mapping[str, Adapter]) -> Candidate:
    """Open a candidate and load the adapters into it, where it takes any.

    Raises:
        AdapterError: An adapter can't be loaded.
        BackendError: The file can't be opened or can't run here.
        BackendUnavailable: The runtime is not installed.
        SiteError: Something of an adapter has no place in it.
    """
    return _OPENED[about.mode](about, adapters)


def describe(path: Path, provider: Provider | None) -> About:
    """Read what is known of a graph or an engine without running it.

    Args:
        path: The file.
        provider: ``cpu`` or ``cuda``; by default ``cpu`` for a graph, ``cuda`` for an engine.

    Raises:
        BackendError: The engine's record is missing or damaged, or the provider can't run it.
        GraphError: There is no such graph, or it is damaged.
    """
    if is_engine(path):
        if provider == "cpu":
            raise BackendError(f"{path.name} is an engine, which runs on a GPU", "give --provider cuda")
        return _describe_engine(path, read_engine(path))
    graph = load_graph(path)
    metadata = graph.model.metadata_props
    record = exposed_of(metadata, str(path)) if KEY in metadata else None
    lora = {*record.input_names(), WEIGHTS_INPUT} if record else set()
    return About(
        path,
        record.mode if record else "plain",
        "onnxruntime",
        provider or "cpu",
        tuple(ports_of_graph(path, lora)),
        tuple(output.name or "" for output in graph.graph.outputs),
        stored_types(graph),
        Captured.from_metadata(metadata),
        record,
        _identity(graph),
    )


def _identity(graph: GraphFile) -> str:
    """Return the identity of a graph with its weights: they may be in files beside it."""
    hashes = [hash_file(graph.path), *map(hash_file, sorted(graph.data_files()))]
    return identity_of(hashes) if len(hashes) > 1 else hashes[0].sha256


def _describe_engine(path: Path, engine: EngineRecord) -> About:
    import ml_dtypes
    import numpy as np

    record = engine.exposed
    lora: set[str] = {*record.input_names(), WEIGHTS_INPUT} if record else set()
    ports = tuple(
        InputPort(
            port.name,
            np.dtype(getattr(ml_dtypes, port.dtype, port.dtype)),
            tuple(port.dims or port.shape),
        )
        for port in engine.inputs
        if port.name not in lora
    )
    floats = [port.dtype for port in engine.outputs if port.dtype in STEP]
    types = StoredTypes(floats[0] if floats else "float32", {}, ())
    return About(
        path,
        record.mode if record else "plain",
        engine.backend,
        "cuda",
        ports,
        tuple(port.name for port in engine.outputs),
        types,
        Captured.from_metadata(engine.metadata),
        record,
        engine.sha256,
    )
