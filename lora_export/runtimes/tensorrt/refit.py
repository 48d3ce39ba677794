"""Change the adapter that is merged into a TensorRT engine, without building again: `MergedEngine`.

Each switch writes every weight that the engine's first adapter or any later one has changed: W0 + ΔW if the
new adapter changes it, otherwise W0. Writing only the new adapter's weights would leave parts of the last
one: A, then B, then A must be A again.

We have never run it: a refittable engine must be built on a machine with a GPU. Tests check the used part of
TensorRT's API against both packages' bindings.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Adapter, Array
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.weights import CheckpointWeights
from lora_export.base.history.in_graph import MERGED_BASE_KEY, MERGED_KEY, merged_parts
from lora_export.engines.backend import DTYPES
from lora_export.engines.record import EngineRecord, read_engine, record_path
from lora_export.engines.source import graph_hashes
from lora_export.errors import BackendError, GraphError
from lora_export.formats.provenance import refuse_other_bases
from lora_export.formats.reading.weights_files import files_of
from lora_export.graph.external_data import merged_values
from lora_export.graph.onnx_file import GraphFile, load_graph
from lora_export.modes.merging.blend import check_blend
from lora_export.modes.merging.into_graph import plan_changes
from lora_export.runtimes.session_options import PathLike
from lora_export.runtimes.tensorrt.engine import LoadedEngine, same_files
from lora_export.runtimes.tensorrt.session import EngineSession
from lora_export.storage.hashes import FileHash, identity_of
from lora_export.storage.inputs import FileState, refuse_changed, same_inputs
from lora_export.storage.outputs import refuse_inputs

# numpy's and ml_dtypes' names of types → TensorRT's.
_KINDS = ("FLOAT", "HALF", "BF16", "FP8", "INT8", "UINT8", "INT32", "INT64", "BOOL")
_TYPES = {DTYPES.get(kind, kind.lower()): kind for kind in _KINDS}


class MergedEngine(EngineSession):
    """Run an engine whose merged adapter is changed by refitting its weights.

    The engine is built with ``--refit`` from the base graph, or from a graph that `merge_onnx` made from it.
    The latter is needed if modules share a weight: only the merged graph has a copy for each of them. Weights
    are found by the graph's names, as `merge_onnx` finds them.

    NVIDIA says of the cost: an engine that can be refitted may run slower than one that can't, a switch takes
    time in proportion to the written weights, and TensorRT 11.3 may lose a Gemm's bias in engines built with
    ``kREFIT``: compare its answers before you rely on one.

    Example::

        engine = MergedEngine("base.rtx-4090.engine", "base.onnx")
        engine.switch("adapter-a")
        logits = engine.run({"input_ids": ids})["logits"]
        engine.switch(None)  # the base
    """

    _WRITES_WEIGHTS = True

    def __init__(
        self,
        engine: PathLike,
        source: PathLike,
        *,
        checkpoint: PathLike | None = None,
        merged: PathLike | Adapter | Sequence[PathLike | Adapter] | None = None,
        allow_unmatched: bool = False,
        **options: Any,
    ) -> None:
        """Open an engine.

        Args:
            engine: The engine's file, with its record beside it.
            source: The base's ONNX graph.
            checkpoint: Folder of the checkpoint that it was exported from, see `merge_onnx`.
            merged: Adapters that are merged into the engine's graph, if that is not the base itself.
            allow_unmatched: Leave out an adapter's tensors that have no site.
            options: As for `EngineSession`.

        Raises:
            BackendUnavailable: TensorRT or cuda-bindings is not installed.
            BackendError: The engine can't be refitted, was built from another graph, or can't run here.
            GraphError: The graph can't be read.
            OutputError: The runtime cache would be written over what is read.
        """
        opened = [FileState.of(path) for path in (Path(engine), record_path(Path(engine)))]
        record = read_engine(Path(engine))
        _refuse_unfit(Path(engine), record)
        self._source, self._allow_unmatched = Path(source), allow_unmatched
        with same_inputs(at_end=True) as inputs:
            base = None if checkpoint is None else Checkpoint.open(Path(checkpoint))
            self._weight_of = None if base is None else CheckpointWeights(base)
            self._hashes = graph_hashes(load_graph(self._source))
            self._files = tuple(inputs.states.values())
        own = [] if merged is None else check_blend(merged, None)[0]
        cache = options.get("runtime_cache")
        self._writes = [] if cache is None else [Path(cache)]
        refuse_inputs(self._writes, [state.path for state in self._files])
        for given in own:
            refuse_inputs(self._writes, files_of(given.source))
        _check_origin(record, self._hashes, own)
        self._switching = threading.Lock()
        self._adapter: str | None = ", ".join(given.name for given in own) or None
        # Name → W0 of each weight that every switch writes.
        self._touched: dict[str, ir.TensorProtocol] = {}
        for given in own:
            self._touched |= self._plan(given)[0]
        super().__init__(engine, **options)
        refuse_changed(opened, "while it was opened", "open it again")
        if record.options.strip_weights:
            self.switch(None)

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in the engine now; None for the base."""
        return self._adapter

    def switch(self, adapter: PathLike | Adapter | None) -> tuple[str, ...]:
        """Replace the adapter in the engine's weights by another one.

        The adapter is first merged on the CPU, as `merge_onnx` does it. Runs wait only while the weights are
        written.

        Args:
            adapter: File or folder that `load_adapter` reads, an `Adapter`, or None for the base.

        Returns:
            Notes, for instance on shared weights.

        Raises:
            AdapterError: The adapter can't be read or used.
            SiteError: A tensor of the adapter has no site in the graph.
            GraphError: The graph has changed since the engine was opened.
            InputChangedError: The files of the graph's weights have changed since then.
            BackendError: The engine lacks these weights, or TensorRT failed; if it failed while writing, the
                engine refuses runs until a switch succeeds.
        """
        with self._switching:
            loaded = None if adapter is None else check_blend(adapter, None)[0][0]
            if loaded is not None:
                refuse_inputs(self._writes, files_of(loaded.source))
            base, values, notes = ({}, {}, ()) if loaded is None else self._plan(loaded)
            touched = self._touched | base
            self._model.alone(lambda engine: self._write(engine, touched, values))
            self._adapter = None if loaded is None else loaded.name
        return notes

    def _plan(
        self, adapter: Adapter
    ) -> tuple[dict[str, ir.TensorProtocol], dict[str, Array], tuple[str, ...]]:
        """Return W0 of the weights that an adapter changes, their new values, and notes."""
        graph = self._graph()
        refuse_other_bases([adapter], identity_of(self._hashes))
        plan, changes = plan_changes(
            graph, [adapter], factors=[1.0], weight_of=self._weight_of, allow_unmatched=self._allow_unmatched
        )
        base = {str(value.name): _tensor(value) for value in changes}
        merged = {str(value.name): merged_values(value, change) for value, change in changes.items()}
        return base, merged, plan.notes

    def _graph(self) -> GraphFile:
        graph = load_graph(self._source)
        if graph_hashes(graph) != self._hashes:
            raise GraphError(
                f"{self._source} has changed since the engine was opened", "open the engine again"
            )
        return graph

    def _write(
        self, loaded: LoadedEngine, touched: dict[str, ir.TensorProtocol], values: Mapping[str, Array]
    ) -> None:
        writer = _WeightWriter(loaded)
        if not touched and not writer.missing():
            return  # the engine holds the base already
        writer.give({name: _array(values.get(name), tensor) for name, tensor in touched.items()})
        if writer.missing():
            # The compiler joined weights with these: write them too, now and at each later switch.
            constants = {str(value.name): _tensor(value) for value in self._graph().initializers()}
            while joined := [name for name in writer.missing() if name in constants]:
                writer.give({name: _array(None, constants[name]) for name in joined})
                touched |= {name: constants[name] for name in joined}
        writer.refuse_missing()
        # Each switch reads W0 again from its files.
        refuse_changed(self._files, "since the engine was opened", "open the engine again")
        self._touched = touched
        self._model.set_unusable("a switch failed while writing, and its weights are a mix of two adapters")
        writer.write()
        self._model.set_unusable("")


class _WeightWriter:
    """TensorRT's ``Refitter`` for one switch; it keeps the arrays alive."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded, self._trt = loaded, loaded.trt
        self._refitter = loaded.trt.Refitter(loaded.engine, loaded.log.logger)
        self._held: list[Array] = []

    def give(self, weights: Mapping[str, Array]) -> None:
        """Pass weights to TensorRT, after checking that the engine has all of them in this size and type."""
        known = set(self._refitter.get_all_weights())
        problems = [
            problem for name, values in weights.items() if (problem := self._problem(name, values, known))
        ]
        if problems:
            raise BackendError(
                f"{self._loaded.path.name} can't be refitted with this adapter: it lacks {len(problems)} of "
                f"the {len(weights)} weights",
                "a graph that merge-onnx made has a copy of a shared weight for each module: build the "
                "engine from that graph, and open it with merged=",
                problems,
            )
        for name, values in weights.items():
            kind = getattr(self._trt.DataType, _TYPES[values.dtype.name])
            given = self._trt.Weights(kind, values.ctypes.data, values.size)
            if not self._refitter.set_named_weights(name, given):
                raise self._loaded.log.refused(self._loaded.path, f"take new values of {name}")
            self._held.append(values)

    def missing(self) -> list[str]:
        """Return weights that TensorRT also needs, given those passed so far."""
        return list(self._refitter.get_missing_weights())

    def refuse_missing(self) -> None:
        """Raise `BackendError` if weights are still missing."""
        if missing := self.missing():
            raise BackendError(
                f"{self._loaded.path.name}: the compiler joined weights with others that the graph lacks",
                "build the engine from the merged graph instead, one for each adapter",
                missing,
            )

    def write(self) -> None:
        """Write the weights into the engine."""
        if not self._refitter.refit_cuda_engine():
            raise self._loaded.log.refused(self._loaded.path, "write the new weights", "call switch again")

    def _problem(self, name: str, values: Array, known: set[str]) -> str:
        if name not in known:
            return f"{name}: not a weight of the engine"
        kind = _TYPES.get(values.dtype.name)
        expected = self._refitter.get_weights_prototype(name)
        fits = kind is not None and expected.dtype == getattr(self._trt.DataType, kind)
        if fits and expected.size == values.size:
            return ""
        given, taken = f"{values.dtype} × {values.size}", f"{expected.dtype.name} × {expected.size}"
        return f"{name}: {given}, the engine has {taken}"


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _array(values: Array | None, tensor: ir.TensorProtocol) -> Array:
    """Return a weight's new values, or if there are none the base's, memory-mapped if they are in a file."""
    return np.ascontiguousarray(tensor.numpy()) if values is None else values


def _refuse_unfit(path: Path, record: EngineRecord) -> None:
    if not record.options.refit:
        raise BackendError(
            f"{path.name} was built without refit: its weights can't be changed",
            "build it with --refit, on a machine with a GPU: no compiler builds such an engine without one",
        )


def _check_origin(record: EngineRecord, hashes: Sequence[FileHash], merged: Sequence[Adapter]) -> None:
    """Refuse a base that the engine doesn't come from, and adapters other than those in its graph.

    Args:
        record: The engine record.
        hashes: Hashes of the base's files.
        merged: Adapters that the user says are in the engine's graph.
    """
    inside = record.metadata.get(MERGED_KEY, "")
    known = all(given.part in merged_parts(inside, given.sha256) for given in merged)
    if len(merged) != inside.count("sha256=") or not known:
        raise BackendError(
            f"{record.name} was built from a graph with other adapters in it than merged= names",
            "give exactly the adapters of that graph as merged=; none if it is the base itself",
            inside.split("; ") if inside else ["none"],
        )
    if inside:
        is_base = record.metadata.get(MERGED_BASE_KEY) == identity_of(hashes)
    else:
        is_base = same_files(hashes, record.source.files)
    if not is_base:
        raise BackendError(
            f"the base of {record.name} is not this source as it is now",
            "give the graph that it was built from; for a merged graph, the graph that was merged into",
        )
