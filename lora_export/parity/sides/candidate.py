"""Open and run the candidate: a graph in ONNX Runtime or an engine in its TensorRT, in any of its states.

A *plain* file has one state: it is the base, or adapters are merged into it. A *swap* graph has one state for
each run, a *bank* one for each row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.engines.record import EngineRecord
from lora_export.errors import AdapterError, BackendError
from lora_export.graph.captured import Captured
from lora_export.graph.exposed import UNHASHED, LoraRecord
from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.roles import is_batch
from lora_export.graph.stored_types import StoredTypes, stored_types
from lora_export.graph.told_sizes import told_sizes
from lora_export.parity.feeds.made import InputPort, Padding, ports_of_graph
from lora_export.parity.judge.limits import STEP, CodesLoss
from lora_export.parity.result import BASE, State, state_of
from lora_export.parity.sides.codes import codes_loss
from lora_export.runtimes.model_file import ModelFile
from lora_export.runtimes.ort.device import DeviceMemory, Provider, host_value
from lora_export.runtimes.ort.open import open_session
from lora_export.runtimes.session import AdapterSession
from lora_export.runtimes.tensorrt.session import EngineSession
from lora_export.storage.hashes import hash_file, identity_of

# Operator that gets the number of tokens of a row instead of their places.
_COUNTS_MASK = "GroupQueryAttention"


@dataclass(frozen=True, kw_only=True)
class About:
    """Facts on a candidate that are known without running it.

    Attributes:
        path: Path of the file.
        mode: ``plain``, ``swap`` or ``bank``.
        runtime: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        provider: ``cpu`` or ``cuda``.
        ports: Inputs that a request feeds: all except LoRA's.
        outputs: Names of the outputs.
        types: Types of its weights and outputs.
        captured: The graph's metadata on its model; None if we did not capture it.
        record: The LoRA record; None without exposed LoRA.
        sha256: Identity of the file.
        crossed: Names of outputs that compare each row of one batch with each of another.
        codes: Loss by quantising; None for float weights, and where nothing tells it.
        padding: How its rows may be padded: by `make_feeds`.
    """

    path: Path
    mode: str
    runtime: str
    provider: Provider
    ports: tuple[InputPort, ...]
    outputs: tuple[str, ...]
    types: StoredTypes
    captured: Captured | None = None
    record: LoraRecord | None = None
    sha256: str = ""
    crossed: frozenset[str] = frozenset()
    codes: CodesLoss | None = None
    padding: Padding = "any"

    @property
    def dtype(self) -> str:
        """Type that it computes in: the capture's if outputs or weights are as coarse, else the outputs'."""
        outputs, mostly = self.types.outputs, self.types.mostly or self.types.outputs
        shown = max(STEP[outputs], STEP[mostly])
        return self.captured.dtype if self.captured and STEP[self.captured.dtype] <= shown else outputs

    @property
    def is_engine(self) -> bool:
        """True for an engine, into which nothing can be looked."""
        return self.runtime != "onnxruntime"

    @property
    def caches(self) -> bool:
        """True if it takes and returns a key-value cache."""
        return any(port.name.startswith("past_key_values.") for port in self.ports)


@dataclass
class Candidate(ABC):
    """An opened candidate.

    Attributes:
        about: Facts on the candidate.
        adapters: Name → adapter, as given.
        notes: Notes for the user.
    """

    about: About
    adapters: Mapping[str, Adapter]
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def states(self, blend: State) -> list[State]:
        """Return the states to compare; ``blend`` is the state of adapters that were merged together."""

    @abstractmethod
    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Run the candidate.

        Args:
            values: The feeds.
            rows: State of each row of the batch; only in a bank they can differ.

        Returns:
            Output name → values.
        """

    def lora_inputs(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Return the further inputs of a run that bring a graph into the rows' states."""
        return {}

    @property
    def switches(self) -> bool:
        """True if adapters can be changed or left out at run time."""
        return self.about.mode != "plain"


class PlainCandidate(Candidate):
    """A graph or an engine without exposed LoRA."""

    def __init__(self, about: About, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(about, adapters)
        if not about.is_engine:
            self._memory = DeviceMemory(about.provider)
            self._session = open_session(about.path, self._memory)
        else:
            self._session = EngineSession(about.path)

    def states(self, blend: State) -> list[State]:
        """Return its only state."""
        return [blend]

    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Run the candidate, which is always in the state that it was exported in."""
        if isinstance(self._session, EngineSession):
            return self._session.run(values)
        bound = {name: host_value(array) for name, array in values.items()}
        try:
            found = self._session.run_with_ort_values(list(self.about.outputs), bound)
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise BackendError(
                f"ONNX Runtime could not run {self.about.path.name}: {error}",
                "compare the feeds' shapes with the graph's inputs",
                [f"{port.name}: {port.dtype} {list(port.dims)}" for port in self.about.ports],
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
            self.notes.append("no adapter was given: only the graph without an adapter is checked")

    def states(self, blend: State) -> list[State]:
        """Return the base, and each adapter alone."""
        return [BASE, *(state_of(name) for name in self.adapters)]

    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Run the candidate with the rows' adapter."""
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
        """Run the candidate with each row's adapters."""
        return self.session.run(values, adapters=self._weights(rows))

    def lora_inputs(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        """Return the rows' weights, and the slots' tensors if they are inputs."""
        return self.session.lora_inputs(values, adapters=self._weights(rows))

    def _weights(self, rows: Sequence[State]) -> list[dict[str, float]]:
        return [{self.slots[name]: weight for name, weight in state} for state in rows]

    def _find_slots(self, record: LoraRecord) -> dict[str, str]:
        """Return adapter name → name of its slot, found by name, or else by the file's hash.

        The hash covers the weights alone: slots that differ only in their scaling share it, so it identifies
        a slot only if no other has it.

        Raises:
            AdapterError: Adapters are in no slot and none can be loaded, or the slot is not clear.
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
                problems.append(f"{name}: no slot has this name or the file {adapter.source}")
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
    provider = None if about.is_engine else about.provider
    return AdapterSession(about.path, provider=provider, max_adapters=adapters)


_OPENED: Mapping[str, type[PlainCandidate] | type[SwapCandidate] | type[BankCandidate]] = {
    "plain": PlainCandidate,
    "swap": SwapCandidate,
    "bank": BankCandidate,
}


def open_candidate(about: About, adapters: Mapping[str, Adapter]) -> Candidate:
    """Open a candidate and load the adapters into it, if it takes any.

    Raises:
        AdapterError: An adapter can't be loaded.
        BackendError: The file can't be opened or can't run here.
        BackendUnavailable: The runtime is not installed.
        SiteError: A part of an adapter has no site in it.
    """
    return _OPENED[about.mode](about, adapters)


def describe(
    path: Path, provider: Provider | None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> About:
    """Read the facts on a graph or an engine without running it.

    Args:
        path: Path of the file.
        provider: ``cpu`` or ``cuda``; by default ``cpu`` for a graph, ``cuda`` for an engine.
        shapes: Sizes that a graph leaves open, by the user, see `graph.told_sizes`.

    Raises:
        BackendError: The sizes don't fit the graph, the engine's record is missing or damaged, or the
            provider can't run it.
        GraphError: The graph is missing or damaged.
    """
    file = ModelFile.read(path)
    if isinstance(file.content, EngineRecord):
        if provider == "cpu":
            raise BackendError(f"{path.name} is an engine, which runs on a GPU", "give --provider cuda")
        return _describe_engine(file, file.content)
    graph = file.content
    types = stored_types(graph)
    ports = ports_of_graph(graph, file.lora_inputs)
    told = told_sizes(path, [(port.name, port.dims) for port in ports], shapes)
    told.refuse_unknown((port.name, port.dims) for port in ports)
    return About(
        path=path,
        mode=_mode(file),
        runtime="onnxruntime",
        provider=provider or "cpu",
        ports=tuple(replace(port, dims=told.dims(port.name, port.dims)) for port in ports),
        outputs=tuple(output.name or "" for output in graph.graph.outputs),
        types=types,
        codes=codes_loss(graph, types.quantised),
        padding=_padding(file, graph),
        captured=file.captured,
        record=file.lora_record,
        sha256=_identity(graph),
        crossed=frozenset(
            output.name or ""
            for output in graph.graph.outputs
            if _is_crossed([dim if isinstance(dim, int) else dim.value for dim in output.shape or ()])
        ),
    )


def _mode(file: ModelFile) -> str:
    return file.lora_record.mode if file.lora_record else "plain"


def _is_crossed(dims: Sequence[int | str | None]) -> bool:
    return len(dims) > 1 and all(is_batch(dim) for dim in dims[:2])


def _identity(graph: GraphFile) -> str:
    """Return the identity of a graph with its weights, which may be in files beside it."""
    hashes = [hash_file(graph.path), *map(hash_file, sorted(graph.data_files()))]
    return identity_of(hashes) if len(hashes) > 1 else hashes[0].sha256


def _padding(file: ModelFile, graph: GraphFile) -> Padding:
    """Return how rows may be padded: what the operators take, of which the metadata may claim less."""
    stated = file.captured.padding if file.captured else "none"
    if any(node.op_type == _COUNTS_MASK for node in graph.graph.all_nodes()):
        return "right" if stated == "right" else "none"
    return "any"


def _describe_engine(file: ModelFile, engine: EngineRecord) -> About:
    ports = tuple(
        InputPort(port.name, port.dtype, port.dims)
        for port in engine.inputs
        if port.name not in file.lora_inputs
    )
    floats = [port.dtype for port in engine.outputs if port.dtype in STEP]
    types = StoredTypes(floats[0] if floats else "float32", {}, ())
    return About(
        path=file.path,
        mode=_mode(file),
        runtime=engine.backend,
        provider="cuda",
        ports=ports,
        outputs=tuple(port.name for port in engine.outputs),
        types=types,
        captured=file.captured,
        record=file.lora_record,
        sha256=engine.sha256,
        crossed=frozenset(port.name for port in engine.outputs if _is_crossed(port.dims)),
    )
