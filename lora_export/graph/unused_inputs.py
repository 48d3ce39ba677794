"""Tell which exposed modules no output of a graph depends on: a tool may have changed it since."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.graph.exposed import LoraRecord
from lora_export.graph.reach import Reach


def unused_modules(graph: ir.Graph, exposed: LoraRecord, *, genai: bool = False) -> frozenset[str]:
    """Return `ExposedModule.name` of modules of whose tensors one changes no output, whatever its values.

    One of a module that is called on zeros does so in PyTorch as well (`doubts.unused`), and is left out.

    Args:
        graph: The main graph. Constants of the record that a tool has renamed are left out.
        exposed: The graph's LoRA record.
        genai: True if the inputs have onnxruntime-genai's own names.
    """
    end = ".MatMul.weight" if genai else ".weight"
    tensors = {
        name: module.name
        for module in exposed.modules
        for name in (module.lora_a, *(name for name, _, _ in module.b_parts))
    }
    values = {str(value.name): value for value in (*graph.inputs, *graph.initializers.values())}
    named = {name: values.get(name.removesuffix(".weight") + end) for name in tensors}
    found = {name: value for name, value in named.items() if value is not None}
    # Those of a bank may be constants: of adapters that were not trained yet they are zero.
    reach = Reach(graph, {id(value) for value in found.values()})
    return frozenset(
        tensors[name]
        for name, value in found.items()
        if not reach.depends_on(value) and not reach.multiplies_zeros(value)
    )
