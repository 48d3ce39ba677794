"""Prepare a transformers model for its trace: example inputs, names of outputs, cache, attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.base.capture.attention import use_node
from lora_export.base.capture.cache import switch_cache, with_cache
from lora_export.base.capture.export import named_tensors, quiet, run_module, tensor_names
from lora_export.base.capture.halves import describe_half, halve
from lora_export.base.capture.loading import EXPORT_YOURSELF
from lora_export.base.capture.traced import Traced
from lora_export.base.capture.vision_language import describe_part, take_part
from lora_export.base.capture.work import refuse_much_work
from lora_export.base.kinds import kind_of
from lora_export.base.kinds.vision_language import whole_only
from lora_export.base.parts import HALVES, VISION_LANGUAGE, Part
from lora_export.errors import CheckpointError, GraphError
from lora_export.graph.captured import PAST_SEQUENCE, SEQUENCE, TOTAL_SEQUENCE, Captured

if TYPE_CHECKING:
    import torch

    from lora_export.base.kinds.model_kind import ModelKind


def prepare(
    model: Any, path: Path, dtype: str, kv_cache: bool, *, fused: bool = False, part: Part = ""
) -> tuple[Traced, Captured]:
    """Run a model on example inputs; have it attend in one node, and read and return its cache, if wanted.

    Args:
        model: A transformers model; its ``forward`` may be replaced.
        path: Its folder.
        dtype: Dtype of its graph.
        kv_cache: True to make the cache inputs and outputs.
        fused: True to make attention one node.
        part: Use of the model, if its graph differs for it.

    Returns:
        How it is traced, and the graph's record of it.

    Raises:
        CheckpointError: The model has no cache, or attends in another way.
        GraphError: The model fails on the example.
    """
    import torch

    _batch_experts(model)
    with torch.device(model.device):
        kind = known_kind(model, path, part)
        inputs = example_inputs(model, path, part)
        if fused:
            switch_cache(model, False)
            use_node(model, inputs, path)
        if part in HALVES:
            captured = describe_half(model, kind, part, dtype)
            return halve(model, kind, inputs, part=part, where=str(path)), captured
        if part in VISION_LANGUAGE:
            captured = describe_part(model, kind, part, dtype)
            return take_part(model, inputs, part=part, where=str(path)), captured
        outputs = _outputs(model, inputs)
        captured = _describe(model, kind, outputs, dtype=dtype, kv_cache=kv_cache)
        if not kv_cache:
            shapes = {name: _dynamic(kind, name, captured.smallest) for name in inputs}
            return Traced(inputs=inputs, shapes=shapes, output_names=_only_tensors(model, outputs)), captured
        return with_cache(model, inputs, outputs, str(path)), captured


def _only_tensors(model: Any, outputs: Any) -> list[str] | None:
    """Return the names of the outputs that are tensors, and have the model return only these.

    The exporter would take others apart (an output of each of CLIP's towers) or fail on them (a cache).
    """
    names = tensor_names(outputs)
    if names is None or all(
        value is None or hasattr(value, "shape") or isinstance(value, tuple | list)
        for value in outputs.values()
    ):
        return names
    forward = model.forward

    # With the parameters of the model's own, by which the exporter calls it.
    @functools.wraps(forward)
    def tensors(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
        return named_tensors(forward(*given, **named))

    model.forward = tensors
    return names


def _describe(
    model: Any, kind: ModelKind, outputs: Mapping[str, Any], dtype: str, kv_cache: bool
) -> Captured:
    largest = kind.largest(model)
    if kv_cache and SEQUENCE in largest:
        largest |= dict.fromkeys((PAST_SEQUENCE, TOTAL_SEQUENCE), largest[SEQUENCE])
    return Captured(
        kind=kind.word(outputs),
        kv_cache=kv_cache,
        dtype=dtype,
        vocab_size=kind.vocab_size(model),
        largest=largest,
        smallest=kind.smallest(model),
    )


def _batch_experts(model: Any) -> None:
    """Make a mixture of experts multiply with each token's own experts, for which ONNX has operators.

    transformers 5's default groups the tokens by expert (``torch._grouped_mm``), and its loop over the
    experts depends on the values; neither can be exported. The sums are the same.
    """
    if hasattr(model, "set_experts_implementation"):
        with quiet():
            model.set_experts_implementation("batched_mm")


def _outputs(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Return what a model gives with a cache, which tells a decoder; T5's encoder refuses to have one."""
    switch_cache(model, True)
    try:
        return run_module(model, inputs)
    except GraphError:
        switch_cache(model, False)
        return run_module(model, inputs)
    finally:
        switch_cache(model, False)


def example_inputs(model: Any, path: Path, part: Part = "") -> dict[str, Any]:
    """Return inputs that a model runs with.

    Args:
        model: A transformers model.
        path: Its folder.
        part: Use of the model; of a part of a vision–language model, the inputs are the whole model's.

    Raises:
        CheckpointError: The model's kind of input is unknown, the folder does not say what it is like, or the
            model would compute too much on it.
    """
    kind = known_kind(model, path, part)
    inputs = kind.example_inputs(model, path)
    refuse_much_work(model, kind, inputs, path)
    return inputs


def known_kind(model: Any, path: Path, part: Part = "") -> ModelKind:
    """Return a model's kind.

    Raises:
        CheckpointError: The model is of none.
    """
    if kind := kind_of(model, part):
        return kind
    if part in VISION_LANGUAGE:
        name = type(model).__name__
        raise whole_only(path, name, "it does not read images and generate text in one way for all images")
    raise CheckpointError(
        f"{path}: no example inputs are known for a model that reads {model.main_input_name!r}",
        EXPORT_YOURSELF,
    )


def _dynamic(kind: ModelKind, name: str, smallest: Mapping[str, int]) -> dict[int, Any]:
    import torch

    return {
        axis: torch.export.Dim(dim, min=smallest.get(dim, 0) or None) for axis, dim in kind.axes(name).items()
    }
