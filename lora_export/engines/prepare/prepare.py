"""Prepare a graph for TensorRT's parser: change what must be changed, and refuse what can't be built.

The parser decides about everything else. The checks here are for graphs that it would misread (inputs with a
default, operators of the same name, unsigned quantisation), for those where its message does not help
(types), and for operators that others can express (`lower_nbits`). No compiler has to be installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.engines import compiler_of
from lora_export.engines.prepare.dtypes import dtype_notes, dtype_problems
from lora_export.engines.prepare.lower_nbits import lower_nbits, nbits_problems
from lora_export.engines.prepare.nbits_weight import OPERATOR
from lora_export.engines.prepare.operators import operator_problems
from lora_export.engines.prepare.plain_inputs import make_plain
from lora_export.engines.prepare.problem import BuildProblem, of_places, refuse_build
from lora_export.engines.prepare.quantised import quantisation_problems
from lora_export.graph.exposed import LoraRecord
from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.port import MAX_AXES


@dataclass(frozen=True, eq=False)
class Admitted:
    """A graph that is ready for the compiler.

    Attributes:
        graph: Graph as the compiler gets it; ``path`` is still the file, which external data is relative to.
        exposed: LoRA record, of the flavour ``tensorrt``.
        notes: Changes that were made, and those that the compiler will make, one line each.
    """

    graph: GraphFile
    exposed: LoraRecord | None
    notes: tuple[str, ...]


def admit(graph: GraphFile, targets: Mapping[str, Sequence[str]]) -> Admitted:
    """Prepare a graph for one TensorRT parser, or for both.

    Args:
        graph: Fresh from `load_graph`; it is changed.
        targets: Compiler (``tensorrt-rtx``, ``tensorrt``) → compute capabilities to build for: ``8.9`` …

    Raises:
        EngineBuildError: The graph can't be built; lists all problems, by node, and how to fix each.
        GraphError: The graph's LoRA record is damaged.
    """
    name = graph.path.name
    inputs = make_plain(graph)
    for backend, capabilities in targets.items():
        compiler = compiler_of(backend)
        refuse_build(
            name,
            compiler,
            [
                *inputs.problems,
                *_port_problems(graph),
                *operator_problems(graph, compiler, frozenset({OPERATOR})),
                *nbits_problems(graph, capabilities),
                *quantisation_problems(graph, compiler),
                *dtype_problems(graph, capabilities, compiler),
            ],
        )
    seen = tuple(dtype_notes(graph))
    lowered, problems = lower_nbits(graph)
    refuse_build(name, compiler_of(next(iter(targets))), problems)
    return Admitted(graph, inputs.exposed, (*inputs.notes, *lowered, *seen))


def _port_problems(graph: GraphFile) -> Iterator[BuildProblem]:
    """Yield inputs without a shape, and outputs that the engine would not have under their names."""
    silent = [
        f"input {value.name!r}"
        for value in graph.graph.inputs
        if value.shape is None and not value.is_initializer() and isinstance(value.type, ir.TensorType)
    ]
    yield from of_places(
        silent,
        "it has no shape in the graph, TensorRT would take it for a single number",
        "export it with shapes, with names such as 'batch' for sizes that vary",
    )
    yield from of_places(
        list(_odd_shapes(graph)),
        f"TensorRT takes at most {MAX_AXES.most} axes, and no size below 0",
        "export it with fewer axes, and with names for sizes that vary",
    )
    inputs = {id(value) for value in graph.graph.inputs}
    passed = [f"output {value.name!r}" for value in graph.graph.outputs if id(value) in inputs]
    yield from of_places(
        passed,
        "it is an input as well, which TensorRT would give another name",
        "remove it from the graph's outputs",
    )
    counts = Counter(str(value.name) for value in graph.graph.outputs)
    twice = [f"output {name!r}" for name, count in counts.items() if count > 1]
    yield from of_places(twice, "listed more than once", "remove the others from the graph's outputs")


def _odd_shapes(graph: GraphFile) -> Iterator[str]:
    """Yield the inputs and outputs whose shape no engine can have."""
    ends = (("input", graph.graph.inputs), ("output", graph.graph.outputs))
    for word, values in ends:
        for value in values:
            sizes = [dim for dim in value.shape or () if isinstance(dim, int)]
            if len(value.shape or ()) > MAX_AXES.most or min(sizes, default=0) < 0:
                yield f"{word} {value.name!r}"
