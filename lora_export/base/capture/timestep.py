"""Let a graph take one time step for all rows of a batch, as pipelines give it, or one a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_export.graph.captured import TIMESTEPS

if TYPE_CHECKING:
    import onnx_ir as ir

_NAME = "timestep"


def spread_timestep(model: ir.Model) -> None:
    """Expand the input ``timestep`` of a denoiser to the rows of its first input.

    PyTorch's models expand a single one themselves; a trace knows only one of both. Expand refuses any other
    number.
    """
    import onnx_ir as ir

    graph = model.graph
    step = next((value for value in graph.inputs if value.name == _NAME), None)
    if step is None or step.shape is None or len(step.shape) != 1:
        return
    users = list(step.uses())
    rows = ir.Value(name=f"{_NAME}_rows", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    spread = ir.Value(name=f"{_NAME}_of_rows", shape=step.shape, type=step.type)
    count = ir.Node(
        "",
        "Shape",
        [graph.inputs[0]],
        [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)],
        outputs=[rows],
        name=f"{_NAME}_count_rows",
    )
    expand = ir.Node("", "Expand", [step, rows], outputs=[spread], name=f"{_NAME}_expand")
    for node, index in users:
        node.replace_input_with(index, spread)
    graph.insert_before(graph[0], [count, expand])
    step.shape = ir.Shape([TIMESTEPS])
