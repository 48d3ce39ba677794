"""Turn inputs with a default into what they mean: LoRA tensors into plain inputs, weights into constants.

A TensorRT parser takes an input with an initializer of the same name for a constant. A graph of the flavour
``ort``, whose LoRA tensors have empty defaults, would be built without an error: as the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_export.engines.prepare.problem import BuildProblem, of_places
from lora_export.graph.exposed import KEY, WEIGHTS_INPUT, ExposedModule, LoraRecord, lora_record_of
from lora_export.graph.exposed_inputs import size_problems
from lora_export.graph.onnx_file import GraphFile, shape_of
from lora_export.graph.unused_inputs import unused_modules

# From this version on an input with an initializer is a choice; before, weights had to be inputs as well.
_FREE_INITIALIZERS = 4


@dataclass(frozen=True, eq=False)
class PlainInputs:
    """The result of `make_plain`.

    Attributes:
        exposed: LoRA record, of the flavour ``tensorrt``.
        notes: Changes that were made.
        problems: Inputs that only the user can decide about, and LoRA tensors that don't fit the LoRA record.
    """

    exposed: LoraRecord | None
    notes: tuple[str, ...]
    problems: tuple[BuildProblem, ...]


def make_plain(graph: GraphFile) -> PlainInputs:
    """Drop the defaults of LoRA tensors, and drop weights from the inputs of a graph in an old file format.

    Raises:
        GraphError: The LoRA record is damaged.
    """
    metadata = graph.model.metadata_props
    record = lora_record_of(metadata, graph.path.name) if KEY in metadata else None
    notes: list[str] = []
    problems: list[BuildProblem] = []
    ours: frozenset[str] = frozenset()
    if record is not None:
        ours = frozenset(_exposed_inputs(record))
        problems += _record_problems(graph, record)
        notes += [] if problems else _drop_defaults(graph, record)
        record = _for_tensorrt(record)
        metadata[KEY] = record.to_json()
    legacy, more = _other_defaults(graph, ours)
    return PlainInputs(record, (*notes, *legacy), (*problems, *more))


def _for_tensorrt(record: LoraRecord) -> LoraRecord:
    """Return the LoRA record of the engine: plain inputs, and float32 for float64, which TensorRT lacks."""
    modules = tuple(
        replace(module, dtype="float32") if module.dtype == "float64" else module for module in record.modules
    )
    return replace(record, flavour="tensorrt", modules=modules)


def _exposed_inputs(record: LoraRecord) -> list[str]:
    """Return the names of the inputs that the LoRA record lists."""
    return [*[WEIGHTS_INPUT] * (record.mode == "bank"), *record.input_names()]


def _record_problems(graph: GraphFile, record: LoraRecord) -> Iterator[BuildProblem]:
    inputs = {str(value.name): value for value in graph.graph.inputs}
    missing = [f"input {name!r}" for name in _exposed_inputs(record) if name not in inputs]
    yield from of_places(
        missing,
        "the graph's LoRA record names it, but the graph does not have it",
        "make the graph again with swap-onnx or bank-onnx; a tool has changed it since",
    )
    shapes = {name: None if value.shape is None else value.shape.dims for name, value in inputs.items()}
    sizes = size_problems(record, shapes)
    yield from of_places(
        sizes,
        "the graph's LoRA record has other sizes",
        "make the graph again with swap-onnx or bank-onnx; a tool has changed it since",
    )
    if missing or sizes:
        return
    yield from of_places(
        [f"module {name}" for name in sorted(unused_modules(graph.graph, record))],
        "no output depends on its LoRA tensors",
        "make the graph again with swap-onnx or bank-onnx; a tool has changed it since",
    )
    if not record.input_names():
        return
    dynamic = [
        f"module {module.name}"
        for module in record.modules
        if module.kind == "conv" and not _has_sizes(inputs, module)
    ]
    yield from of_places(
        dynamic,
        "TensorRT can't build a convolution with an open number of channels (the rank)",
        "make the graph with swap-onnx --flavour tensorrt --adapter ADAPTER, which fixes the rank",
    )


def _has_sizes(inputs: dict[str, ir.Value], module: ExposedModule) -> bool:
    shape = inputs[module.lora_a].shape
    return shape is not None and all(isinstance(size, int) for size in shape)


def _drop_defaults(graph: GraphFile, record: LoraRecord) -> list[str]:
    """Make the LoRA tensors plain inputs; return notes."""
    defaults = [name for name in _exposed_inputs(record) if name in graph.graph.initializers]
    for name in defaults:
        value = graph.graph.initializers.pop(name)
        value.const_value = None
    notes = []
    if defaults:
        notes.append(
            f"{len(defaults)} LoRA tensors are plain inputs now: TensorRT builds defaults in as constants"
        )
    if defaults and record.mode == "bank":
        slots = ", ".join(slot.name for slot in record.slots if slot.adapter)
        notes.append(
            f"the adapters that were the bank's defaults are not in the engine: load {slots} into it"
        )
    if record.mode == "bank" and _share_batch(graph, record):
        notes.append(f"{WEIGHTS_INPUT} has the batch's own dimension now, which replaces a check of its rows")
    return notes


def _share_batch(graph: GraphFile, record: LoraRecord) -> bool:
    """Replace the node that compares a bank's rows with the batch by a shared symbol, which TensorRT checks.

    Returns:
        True if there was such a node.
    """
    inputs = {str(value.name): value for value in graph.graph.inputs}
    weights, batch = inputs[WEIGHTS_INPUT], inputs.get(record.batch_input)
    checks = [use.node for use in weights.uses() if use.node.op_type == "Split"]
    if batch is None or batch.shape is None or weights.shape is None or not checks:
        return False
    weights.shape = ir.Shape([batch.shape[0], *weights.shape[1:]])
    for check in checks:
        ir.convenience.replace_all_uses_with(check.outputs[0], weights)
        owner = check.graph
        assert owner is not None
        owner.remove(check, safe=True)
    return True


def _other_defaults(graph: GraphFile, ours: frozenset[str]) -> tuple[list[str], list[BuildProblem]]:
    """Make inputs with an initializer constants, or refuse them if they may be meant to be fed.

    Our own LoRA tensors are left out.
    """
    both = [value for value in graph.graph.inputs if value.is_initializer() and value.name not in ours]
    if graph.model.ir_version >= _FREE_INITIALIZERS:
        return [], list(_refused(both, "TensorRT would build its default in as a constant"))
    suspects = [value for value in both if _looks_fed(value)]
    if suspects or not both:
        return [], list(
            _refused(suspects, "it looks like an adapter's, TensorRT would build it in as a constant")
        )
    for value in both:
        graph.graph.inputs.remove(value)
    graph.model.ir_version = _FREE_INITIALIZERS
    return [f"{len(both)} weights that an old file format lists as inputs are constants"], []


def _looks_fed(value: ir.Value) -> bool:
    assert value.const_value is not None
    return 0 in shape_of(value.const_value) or "lora" in str(value.name).lower()


def _refused(values: Sequence[ir.Value], reason: str) -> Iterator[BuildProblem]:
    return of_places(
        [f"input {value.name!r}" for value in values],
        reason,
        "to feed them, make the graph with swap-onnx --flavour tensorrt, or remove the initializers; "
        "if they are constants, remove them from the graph's inputs",
    )
