"""Run a graph with inner values as its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.graph.onnx_file import FLOAT_TYPES, GraphFile, save_graph
from lora_export.runtimes.ort.device import DeviceMemory, Provider, host_value
from lora_export.runtimes.ort.open import open_session
from lora_export.storage.commit.leftovers import scratch_folder

# Option for the folder of external data, for a graph that lies elsewhere.
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
# ONNX Runtime's log prints strangers' names unchanged to the terminal; its errors are raised anyway.
_FATAL_ONLY = 4


def run_with_outputs(
    graph: GraphFile, values: Sequence[ir.Value], feeds: Mapping[str, Array], provider: Provider
) -> dict[str, Array]:
    """Run a graph and return inner values; nodes after them are not computed.

    The graph without its weights is written to a temporary folder and opened there; ``graph`` and its folder
    are unchanged afterwards.

    Args:
        graph: The graph, as `load_graph` returns it.
        values: Values of its main graph; constants and inputs are allowed.
        feeds: Input name → values.
        provider: Provider that it runs on.

    Returns:
        Name → values; half precision as float32.

    Raises:
        BackendError: ONNX Runtime can't open or run the graph.
        BackendUnavailable: ONNX Runtime is not installed.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry(_DATA_FOLDER, str(graph.path.parent.absolute()))
    memory = DeviceMemory(provider)
    with scratch_folder() as folder, _exposed(graph, values) as names:
        path = folder / "probes.onnx"
        save_graph(graph.model, path)
        session = open_session(path, memory, session_options=options)
    taken = {port.name for port in session.get_inputs()}
    taken |= {port.name for port in session.get_overridable_initializers()}
    bound = {name: host_value(array) for name, array in feeds.items() if name in taken}
    try:
        found = session.run_with_ort_values(list(names), bound)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise BackendError(
            f"ONNX Runtime could not run {graph.path.name} with probes: {error}",
            "omit the search with --no-localise (localise=False)",
        ) from error
    return {names[name]: memory.read(value) for name, value in zip(names, found, strict=True)}


@contextmanager
def _exposed(graph: GraphFile, values: Sequence[ir.Value]) -> Iterator[dict[str, str]]:
    """Make values the graph's only outputs inside the block; yield output name → value name.

    Each value goes through a Cast, as it may be an input, and numpy has no bfloat16.
    """
    outputs, main = list(graph.graph.outputs), graph.graph
    chosen = {str(value.name): value for value in values}
    names, nodes = {}, []
    for number, (name, value) in enumerate(chosen.items()):
        # An unknown type is a float: indices get their type from the graph's inputs.
        kept = value.dtype is not None and (
            value.dtype not in FLOAT_TYPES or value.dtype == ir.DataType.DOUBLE
        )
        to = value.dtype if kept and value.dtype is not None else ir.DataType.FLOAT
        output = ir.Value(name=f"lora_export.probe.{number}", type=ir.TensorType(to))
        nodes.append(ir.node("Cast", [value], {"to": to}, outputs=[output], name=str(output.name)))
        names[str(output.name)] = name
    try:
        main.outputs.clear()
        main.extend(nodes)
        main.outputs.extend(node.outputs[0] for node in nodes)
        yield names
    finally:
        main.outputs.clear()
        main.remove(nodes, safe=True)
        main.outputs.extend(outputs)
