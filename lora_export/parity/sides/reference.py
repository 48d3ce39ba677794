"""What a candidate is compared with: a checkpoint in PyTorch, another graph, or outputs that were saved.

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
from lora_export.parity.result import BASE, State, state_name
from lora_export.parity.sides.candidate import Candidate, describe, open_candidate
from lora_export.runtimes.ort.device import Provider
from lora_export.runtimes.torch.reference import TorchReference
from lora_export.storage.hashes import hash_file, identity_of


class Reference(Protocol):
    """The side that is right by definition."""

    @property
    def about(self) -> Mapping[str, Any]:
        """``kind``, ``path`` and ``dtype``, for the report."""

    def has(self, state: State) -> bool:
        """Whether it can be run in a state."""

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return all outputs by name."""


@dataclass
class CheckpointReference:
    """A Hugging Face checkpoint in PyTorch, adapters unmerged."""

    model: TorchReference
    path: Path
    dtype: str

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What it is; hashing the weights takes a while."""
        said = {"kind": "checkpoint", "path": str(self.path), "dtype": self.dtype}
        hashes = [hash_file(file) for file in sorted(self.path.glob("*.safetensors"))]
        return said | ({"sha256": identity_of(hashes)} if hashes else {})

    def has(self, state: State) -> bool:
        """Every state; without adapter only where the checkpoint is all there."""
        return state != BASE or not self.model.made_up

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return all outputs by name."""
        return self.model.run(values, state)


@dataclass
class GraphReference:
    """A graph, in the state it was exported in or in those it can be in; its base in another graph."""

    graph: Candidate
    base: Candidate | None
    blend: State

    @property
    def about(self) -> Mapping[str, Any]:
        """What it is."""
        known = self.graph.about
        return {"kind": "onnx", "path": str(known.path), "dtype": known.dtype, "sha256": known.sha256}

    def has(self, state: State) -> bool:
        """Whether the graph, or its base, is in this state."""
        if state == BASE and self.base is not None:
            return True
        return state in self.graph.states(self.blend)

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return all outputs by name."""
        chosen = self.base if state == BASE and self.base is not None else self.graph
        batch = len(next(iter(values.values())))
        return chosen.run(values, (state,) * batch)


@dataclass
class SavedReference:
    """Outputs that were saved, of one feed."""

    path: Path
    outputs: Mapping[State, Mapping[str, Array]]

    @property
    def about(self) -> Mapping[str, Any]:
        """What it is."""
        found = [values.dtype for states in self.outputs.values() for values in states.values()]
        return {"kind": "saved", "path": str(self.path), "dtype": str(found[0])}

    def has(self, state: State) -> bool:
        """Whether the state was saved."""
        return state in self.outputs

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Return what was saved."""
        return dict(self.outputs[state])


def open_reference(
    path: Path,
    adapters: Mapping[str, Adapter],
    dtype: str,
    blend: State,
    base: Path | None,
    provider: Provider,
) -> Reference:
    """Open what is to be compared with.

    Args:
        path: A checkpoint folder, an ``.onnx`` file, or saved outputs.
        adapters: Name → adapter.
        dtype: What a checkpoint computes in.
        blend: The state of adapters that were merged together.
        base: Of a merged graph: the graph without the adapter, to know the adapter's effect.
        provider: Where graphs run.

    Raises:
        BackendError: There is no such thing, or it can't be read.
        LoraExportError: As opening a checkpoint or a graph.
    """
    if base is not None and path.suffix != ".onnx":
        raise BackendError(
            f"--base is for a reference that is a graph, not for {path.name}",
            "leave it out: a checkpoint folder is the base, saved outputs without adapter are base/logits",
        )
    if path.is_dir():
        return CheckpointReference(TorchReference(path, dtype, adapters), path, dtype)
    if path.suffix in SUFFIXES:
        return SavedReference(path, _read_saved(path, blend))
    if path.suffix != ".onnx":
        raise _no_reference(path)
    about = describe(path, provider)
    without = open_candidate(describe(base, provider), {}) if base is not None else None
    return GraphReference(open_candidate(about, {} if about.mode == "plain" else adapters), without, blend)


def _no_reference(path: Path) -> BackendError:
    """Return why nothing can be compared with a path; what can't be one is called by its name."""
    if not path.exists():
        return BackendError(f"there is nothing at {path}", no_folder(path).hint)
    kinds = {
        ".engine": ": an engine can only be the candidate",
        ".ort": ": it is in ONNX Runtime's own format (.ort)",
    }
    return BackendError(
        f"{path} is no reference{kinds.get(path.suffix, '')}",
        "give a checkpoint folder, an .onnx file, or saved outputs (.npz, .safetensors)",
    )


def _read_saved(path: Path, blend: State) -> dict[State, dict[str, Array]]:
    if not path.is_file():
        raise BackendError(f"no file at {path}", "check the path")
    found: dict[State, dict[str, Array]] = {}
    for name, values in read_tensors(path).items():
        whose, _, output = name.rpartition("/")
        state = blend if not whose else BASE if whose == "base" else ((whose, 1.0),)
        if output in found.setdefault(state, {}):
            raise BackendError(
                f"{path} has '{output}' of {state_name(state)} twice: with a name in front and without",
                "keep the right one",
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
            f"{path} has not the same outputs with every adapter", "save all outputs in each state", lacking
        )
    return found


def read_tensors(path: Path) -> dict[str, Array]:
    """Read an ``.npz`` or ``.safetensors`` file; pickled objects are refused.

    Returns:
        Name → numbers; bfloat16 as `ml_dtypes.bfloat16`, which an ``.npz`` holds as two bytes without a type.

    Raises:
        BackendError: It is damaged, or holds something else than arrays of numbers.
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
        raise BackendError(f"{path} holds arrays that are no numbers", "save the outputs again", strange)
    return found


def pair_outputs(
    candidate: Sequence[str], reference: Sequence[str], where: Path, ordered: bool = True
) -> dict[str, str]:
    """Return the candidate's output → the reference's.

    Args:
        candidate: Its outputs.
        reference: Its outputs.
        where: The candidate.
        ordered: The reference's first output is what a model returns first: in a file any may be first.

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
        # An exporter's own name for the only thing that the model returns first.
        return {candidate[0]: reference[0]}
    raise BackendError(
        f"{where.name} has {len(strange)} outputs that the reference does not have",
        "compare a model with a reference that returns the same",
        [*(f"only the candidate: {name}" for name in strange), f"the reference: {', '.join(reference)}"],
    )
