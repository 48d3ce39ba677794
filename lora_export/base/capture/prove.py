"""Prove a capture: the graph of a small model by the model itself, that of a large one by a twin's.

The twin goes the whole way: its folder is captured as the model's is, with the same options, before anything
of the model is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.export import first_line, quiet
from lora_export.base.capture.gap import Gap, measure_gap
from lora_export.base.capture.loading import Loading, load_model
from lora_export.base.capture.outline import build_outline, find_stacks
from lora_export.base.capture.prepared import example_inputs, known_kind
from lora_export.base.capture.twin import save_twin, small_config
from lora_export.base.checkpoint.module_counts import few_modules, weights_bytes
from lora_export.base.parts import Part
from lora_export.graph.proof import Proof
from lora_export.progress import tell_stage
from lora_export.storage.commit.leftovers import scratch_folder

if TYPE_CHECKING:
    from lora_export.base.capture.outline import Stack

# Weights of a model that is compared itself: with twice as much for float64 it still fits everywhere.
_OWN_BYTES = 64 << 20
# Values of a twin, of which each takes forty bytes until it is compared.
_MOST_VALUES = 16_000_000
# Captures a folder as a graph, in a dtype.
Capture = Callable[[Path, Path, str], object]


def not_proven(wanted: bool) -> Proof | None:
    """Return why no capture can be proven here; None if one can."""
    if not wanted:
        return Proof(of="nothing", reason="it was not asked for")
    if find_spec("onnxruntime") is None:
        return Proof(of="nothing", reason="onnxruntime is not installed")
    return None


def is_own_twin(folder: Path, dtype: str) -> bool:
    """Return whether a model is small enough to be compared itself, in a dtype that can be run."""
    return dtype != "bfloat16" and weights_bytes(folder) <= _OWN_BYTES


def prove_model(graph: Path, folder: Path, dtype: str, part: Part = "") -> Proof:
    """Compare a model's graph with the model.

    Args:
        graph: The file that was written.
        folder: The model's folder.
        dtype: Dtype of the graph.
        part: Use of the model, if its graph differs for it.

    Raises:
        GraphError: The graph answers otherwise.
    """
    gap = _compare(graph, folder, dtype, part)
    gap.refuse_large(str(folder))
    return Proof(of="model", error=gap.error, limit=gap.limit, runs=gap.runs, dtype=dtype)


def prove_by_twin(
    folder: Path, loading: Loading, dtype: str, part: Part, *, beside: Path, capture: Capture
) -> Proof:
    """Capture a twin of a model and compare it; a proof of nothing where no twin can be made.

    Args:
        folder: The model's folder.
        loading: Its class and config.
        dtype: Dtype of the graph.
        part: Use of the model, if its graph differs for it.
        beside: Folder in which the twin is made and removed again.
        capture: Captures a folder as the model will be.

    Raises:
        GraphError: The twin's graph answers otherwise than the twin.
    """
    tell_stage("capturing a small twin of the model, to compare its graph with PyTorch")
    # ONNX Runtime's CPU provider has no bfloat16.
    dtype = "float32" if dtype == "bfloat16" else dtype
    with scratch_folder(beside) as scratch:
        twin, graph = scratch / "twin", scratch / "twin.onnx"
        try:
            small = small_config(loading.config, _stacks(loading, folder))
            if (count := _values(loading.kind, small, folder)) > _MOST_VALUES:
                return Proof(of="nothing", reason=f"a small model of its config still has {count:,} values")
            save_twin(loading.kind, small, twin, folder)
            model, _ = load_model(twin, dtype)
            example_inputs(model, twin, part)
            capture(twin, graph, dtype)
        except OSError:  # of the disk, not of the model
            raise
        except Exception as error:  # of the model's own code, with sizes that it was not written for
            return Proof(
                of="nothing", reason=f"no small model of its config can be made ({first_line(error)})"
            )
        gap = _compare(graph, twin, dtype, part)
    gap.refuse_large(f"a small twin of {folder}")
    return Proof(of="twin", error=gap.error, limit=gap.limit, runs=gap.runs, dtype=dtype)


def _compare(graph: Path, folder: Path, dtype: str, part: Part = "") -> Gap:
    model, _ = load_model(folder, dtype, part=part)
    with quiet():
        kind = known_kind(model, folder, part)
        return measure_gap(graph, model, kind, example_inputs(model, folder, part), part=part)


def _stacks(loading: Loading, folder: Path) -> Sequence[Stack]:
    return find_stacks(*_outline(loading.kind, loading.config, folder))


def _values(kind: Any, config: Any, folder: Path) -> int:
    model, _ = _outline(kind, config, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _outline(kind: Any, config: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    import torch

    with quiet(), few_modules(folder):
        return build_outline(kind, copy.deepcopy(config), torch.float32)
