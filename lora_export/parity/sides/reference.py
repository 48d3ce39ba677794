"""Open the reference of a candidate: a checkpoint in PyTorch, another graph, or saved outputs.

Saved outputs are one ``.npz`` or ``.safetensors`` file for one feed: ``logits``, or with the state in front
``<adapter>/logits`` and ``base/logits``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_export.adapter import Adapter, Array
from lora_export.base.checkpoint.checkpoint import no_folder
from lora_export.errors import BackendError
from lora_export.parity.feeds.array_files import SUFFIXES, read_arrays
from lora_export.parity.feeds.feed import Feed, shared_inputs
from lora_export.parity.result import BASE, State, state_name
from lora_export.parity.sides.candidate import Candidate, describe, open_candidate
from lora_export.runtimes.ort.device import Provider
from lora_export.runtimes.torch.reference import TorchReference
from lora_export.storage.hashes import hash_file, identity_of
from lora_export.untrusted.places import exists, is_file, is_folder, listed


class Reference(Protocol):
    """The side that is right by definition."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Facts for the report: ``kind``, ``path`` and ``dtype``."""

    def has(self, state: State) -> bool:
        """Return True if it can be run in a state."""

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return all outputs by name."""


@dataclass
class CheckpointReference:
    """A Hugging Face checkpoint in PyTorch, with adapters not merged."""

    model: TorchReference
    path: Path
    dtype: str

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """Facts for the report; hashing the weights takes a while."""
        facts = {"kind": "checkpoint", "path": str(self.path), "dtype": self.dtype}
        hashes = [hash_file(file) for file in listed(self.path, "*.safetensors")]
        return facts | ({"sha256": identity_of(hashes)} if hashes else {})

    def has(self, state: State) -> bool:
        """Return True for every state, but for the base only if the checkpoint is complete."""
        return state != BASE or not self.model.made_up

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return all outputs by name."""
        return self.model.run(values, state)


@dataclass
class GraphReference:
    """A graph with the states that it can be in; the base of a merged graph is another graph."""

    graph: Candidate
    base: Candidate | None
    blend: State

    @property
    def about(self) -> Mapping[str, Any]:
        """Facts for the report."""
        known = self.graph.about
        return {"kind": "onnx", "path": str(known.path), "dtype": known.dtype, "sha256": known.sha256}

    def has(self, state: State) -> bool:
        """Return True if the graph, or its base, can be in this state."""
        if state == BASE and self.base is not None:
            return True
        return state in self.graph.states(self.blend)

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return all outputs by name."""
        chosen = self.base if state == BASE and self.base is not None else self.graph
        rows = Feed("", values, shared_inputs(chosen.about.ports)).batch
        return chosen.run(values, (state,) * rows)


@dataclass
class SavedReference:
    """Saved outputs of one feed."""

    path: Path
    outputs: Mapping[State, Mapping[str, Array]]

    @property
    def about(self) -> Mapping[str, Any]:
        """Facts for the report."""
        found = [values.dtype for states in self.outputs.values() for values in states.values()]
        return {"kind": "saved", "path": str(self.path), "dtype": str(found[0])}

    def has(self, state: State) -> bool:
        """Return True if outputs of the state were saved."""
        return state in self.outputs

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return the saved outputs by name."""
        return dict(self.outputs[state])


def open_reference(
    path: Path,
    adapters: Mapping[str, Adapter],
    dtype: str,
    blend: State,
    base: Path | None,
    provider: Provider,
) -> Reference:
    """Open the reference.

    Args:
        path: A checkpoint folder, an ``.onnx`` file, or saved outputs.
        adapters: Name → adapter.
        dtype: Type that a checkpoint computes in.
        blend: State of adapters that were merged together.
        base: For a merged graph: the graph without the adapter, to know the adapter's effect.
        provider: Provider that graphs run on.

    Raises:
        BackendError: The path can't be a reference, or can't be read.
        LoraExportError: As for opening a checkpoint or a graph.
    """
    if base is not None and path.suffix != ".onnx":
        raise BackendError(
            f"--base is for a reference that is a graph, not for {path.name}",
            "omit it: a checkpoint folder is the base, and saved outputs without an adapter are base/logits",
        )
    if is_folder(path):
        return CheckpointReference(TorchReference(path, dtype, adapters), path, dtype)
    if path.suffix in SUFFIXES:
        return SavedReference(path, _read_saved(path, blend))
    if path.suffix != ".onnx":
        raise _no_reference(path)
    about = describe(path, provider)
    without = open_candidate(describe(base, provider), {}) if base is not None else None
    return GraphReference(open_candidate(about, {} if about.mode == "plain" else adapters), without, blend)


def _no_reference(path: Path) -> BackendError:
    """Return the error for a path that can't be a reference, naming what it is."""
    if not exists(path):
        return BackendError(f"there is nothing at {path}", no_folder(path).hint)
    kinds = {
        ".engine": ": an engine can only be the candidate",
        ".ort": ": it is in ONNX Runtime's own format (.ort)",
    }
    return BackendError(
        f"{path} can't be a reference{kinds.get(path.suffix, '')}",
        "give a checkpoint folder, an .onnx file, or saved outputs (.npz, .safetensors)",
    )


def _read_saved(path: Path, blend: State) -> dict[State, dict[str, Array]]:
    if not is_file(path):
        raise BackendError(f"no file at {path}", "check the path")
    found: dict[State, dict[str, Array]] = {}
    for name, values in read_tensors(path).items():
        adapter, _, output = name.rpartition("/")
        state = blend if not adapter else BASE if adapter == "base" else ((adapter, 1.0),)
        if output in found.setdefault(state, {}):
            raise BackendError(
                f"{path} has '{output}' of {state_name(state)} twice: with a name in front and without",
                "remove the wrong one",
            )
        found[state][output] = values
    if not found:
        raise BackendError(f"{path} holds no outputs", "save the outputs by name: logits, or adapter/logits")
    every = {output for outputs in found.values() for output in outputs}
    lacking = [
        f"{state_name(state)}: no {output}"
        for state, outputs in found.items()
        for output in sorted(every - set(outputs))
    ]
    if lacking:
        raise BackendError(
            f"{path} doesn't have the same outputs with every adapter",
            "save all outputs in each state",
            lacking,
        )
    return found


def read_tensors(path: Path) -> dict[str, Array]:
    """Read an ``.npz`` or ``.safetensors`` file; pickled objects are refused.

    Returns:
        Name → numbers; bfloat16 as `ml_dtypes.bfloat16`, which an ``.npz`` holds as two bytes without a type.

    Raises:
        BackendError: The file is damaged, or holds something else than arrays of numbers.
    """
    import ml_dtypes

    found = read_arrays(path)
    found = {
        name: values.view(ml_dtypes.bfloat16) if values.dtype == np.dtype("V2") else values
        for name, values in found.items()
    }
    strange = [
        f"{name}: {values.dtype}"
        for name, values in found.items()
        if values.dtype.kind not in "fiub" and values.dtype != ml_dtypes.bfloat16
    ]
    if strange:
        raise BackendError(f"{path} holds arrays that are not numbers", "save the outputs again", strange)
    return found


def pair_outputs(
    candidate: Sequence[str], reference: Sequence[str], where: Path, ordered: bool = True
) -> dict[str, str]:
    """Return a mapping from the candidate's outputs to the reference's.

    Args:
        candidate: Names of the candidate's outputs.
        reference: Names of the reference's outputs.
        where: Path of the candidate.
        ordered: True if the reference's first output is the model's first one; in a file the order is
            arbitrary.

    Raises:
        BackendError: The candidate has outputs that the reference lacks.
    """
    strange = [name for name in candidate if name not in reference]
    if not strange:
        return {name: name for name in candidate}
    if (
        len(candidate) == 1
        and (len(reference) == 1 or ordered)
        and not any(name.startswith("present") for name in strange)
    ):
        # An exporter's own name for the model's first output.
        return {candidate[0]: reference[0]}
    raise BackendError(
        f"{where.name} has {len(strange)} outputs that the reference does not have",
        "compare it with a reference that returns the same outputs",
        [*(f"only the candidate: {name}" for name in strange), f"the reference: {', '.join(reference)}"],
    )
