"""Find the dtypes of a graph's weights and outputs, and its operators that quantise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lora_export.graph.onnx_file import FLOAT_TYPES, GraphFile, byte_size

_NAMES = {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
_DEFAULT = "float32"
# Operators whose weights are integers: their loss does not follow from a dtype.
_QUANTISED = ("MatMulNBits", "GatherBlockQuantized", "QuantizeLinear", "DequantizeLinear", "DynamicQuantize")
# In many half precision graphs, scalars and norms stay in float32.
_SHARE = 0.5


@dataclass(frozen=True)
class StoredTypes:
    """The stored types of a graph.

    Attributes:
        outputs: Dtype of its first float output.
        weights: Dtype → bytes of float weights of that dtype that a node reads.
        quantised: Operators that quantise.
    """

    outputs: str
    weights: Mapping[str, int]
    quantised: tuple[str, ...]

    @property
    def mostly(self) -> str | None:
        """The dtype of more than half of the weights, by bytes; None without one."""
        total = sum(self.weights.values())
        return next((name for name, size in self.weights.items() if size > _SHARE * total), None)


def stored_types(graph: GraphFile) -> StoredTypes:
    """Return the stored types of a graph."""
    weights: Counter[str] = Counter()
    for value in graph.initializers():
        tensor = value.const_value
        if tensor is not None and value.uses() and tensor.dtype in FLOAT_TYPES and len(tensor.shape) > 1:
            weights[_NAMES[tensor.dtype.name]] += byte_size(tensor)
    floats = [
        _NAMES[output.dtype.name]
        for output in graph.graph.outputs
        if output.dtype is not None and output.dtype in FLOAT_TYPES
    ]
    operators = {node.op_type for nodes in graph.graphs() for node in nodes}
    quantised = sorted(name for name in operators if name.startswith(_QUANTISED) or "Integer" in name)
    return StoredTypes(floats[0] if floats else _DEFAULT, dict(weights), tuple(quantised))
