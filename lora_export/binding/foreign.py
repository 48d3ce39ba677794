"""Make a LoRA record for a graph that another tool gave LoRA inputs, from their names and shapes.

``<module>.lora_A.weight`` and ``.lora_B.weight`` are TensorRT-Edge-LLM's and Olive's, with ``.MatMul`` before
``.weight`` they are onnxruntime-genai's. Such a graph doesn't say which base it was made from; its own
identity stands for the base's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.errors import GraphError
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member
from lora_export.graph.onnx_file import GraphFile
from lora_export.storage.hashes import hash_file, identity_of

_NAME = re.compile(r"^(?P<path>.+)\.lora_(?P<part>[AB])(?P<genai>\.MatMul)?\.weight$")
_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}
# Largest rank, if no dimension limits it.
_ANY_RANK = 1 << 16
_AGAIN = "make the graph with swap-onnx from the base"


@dataclass(frozen=True)
class ForeignGraph:
    """LoRA record from names; ``genai``: the names are those of onnxruntime-genai's model builder."""

    exposed: LoraRecord
    genai: bool


def foreign_lora(graph: GraphFile) -> ForeignGraph | None:
    """Return the LoRA record of a graph that another tool gave LoRA inputs, or None if it has none.

    Raises:
        GraphError: The graph has LoRA tensors that can't be fed or understood; all are listed.
    """
    inputs = {str(value.name): value for value in graph.graph.inputs}
    constants = {name for name in map(str, graph.graph.initializers) if _NAME.match(name)} - inputs.keys()
    named = {name: match for name in [*inputs, *constants] if (match := _NAME.match(name))}
    if not named:
        return None
    if constants:
        raise GraphError(
            f"{graph.path} has its LoRA tensors as constants, not as inputs: no adapter can be given to it",
            f"{_AGAIN}, or turn them into inputs (with Olive's extract-adapters)",
            sorted(constants)[:4],
        )
    suffix = ".MatMul" if any(match["genai"] for match in named.values()) else ""
    paths = dict.fromkeys(match["path"] for match in named.values())
    problems: list[str] = []
    modules = [module for path in paths if (module := _module(path, suffix, inputs, problems)) is not None]
    if problems:
        raise GraphError(f"{graph.path} has LoRA inputs that we don't understand", _AGAIN, problems)
    record = LoraRecord(
        mode="swap",
        base=graph.path.name,
        base_sha256=identity_of([hash_file(graph.path)]),
        modules=tuple(modules),
        max_rank=_ANY_RANK,
        flavour="tensorrt",
    )
    return ForeignGraph(record, bool(suffix))


def _module(
    path: str, suffix: str, inputs: Mapping[str, ir.Value], problems: list[str]
) -> ExposedModule | None:
    pair = [inputs.get(f"{path}.lora_{part}{suffix}.weight") for part in "AB"]
    a, b = pair
    if a is None or b is None:
        problems.append(f"{path}: {'lora_A' if a is None else 'lora_B'} is missing")
        return None
    shapes = [list(value.shape) if value.shape is not None else [] for value in (a, b)]
    dims = [dim for shape in shapes for dim in shape]
    if [len(shape) for shape in shapes] != [2, 2] or not all(isinstance(dims[at], int) for at in (0, 3)):
        problems.append(f"{path}: shapes {shapes}, wanted (in_dim, rank) and (rank, out_dim)")
        return None
    if a.dtype not in _DTYPES or a.dtype != b.dtype:
        problems.append(f"{path}: types {a.dtype} and {b.dtype}, wanted two of {', '.join(_DTYPES.values())}")
        return None
    in_dim, out_dim = int(str(dims[0])), int(str(dims[3]))
    rank = dims[1] if isinstance(dims[1], int) else 0
    return ExposedModule(
        name=path,
        kind="linear",
        in_dim=in_dim,
        out_dim=out_dim,
        dtype=_DTYPES[a.dtype],
        members=(Member(path=path, start=0, out_dim=out_dim),),
        rank=rank,
    )
