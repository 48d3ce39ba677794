"""Rewrite exported graphs as quantisers do: float weights rounded in the graph, and ONNX Runtime's tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
READERS = {"MatMul": 1, "Gemm": 1, "Conv": 1}
FLOAT8_MAX = 448.0


def fake_quantised(
    path: Path,
    out: Path,
    *,
    channel: bool = False,
    code: str = "int8",
    room: float = 4.0,
    stored: bool = True,
) -> Path:
    """Put QuantizeLinear and DequantizeLinear behind each weight of a float graph.

    Args:
        path: The float graph.
        out: The file to write.
        channel: A scale for each output channel instead of one for all.
        code: ``int8``, or ``float8``: e4m3, as ModelOpt writes it.
        room: How much further than the largest weight the range goes.
        stored: Right behind the stored weight; else right before the operator, behind its Transpose.
    """
    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) > 1}
    maker = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    done: dict[str, str] = {}
    for node in graph.node:
        index = READERS.get(node.op_type, -1)
        name = node.input[index] if 0 < index < len(node.input) else ""
        root, swap = name, False
        while root in maker and maker[root].op_type in ("Transpose", "Identity"):
            swap, root = swap ^ (maker[root].op_type == "Transpose"), maker[root].input[0]
        if root in weights:
            value = numpy_helper.to_array(weights[root])
            rows = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if rows else value.ndim - 1
            if stored and swap:
                axis = value.ndim - 1 - axis
            begin = root if stored else name
            if begin not in done:
                seen = value.T if swap and not stored else value
                done[begin] = f"{begin}.rounded"
                pair = _pair(graph, begin, seen, axis, channel, code, room)
                at = next((i for i, other in enumerate(nodes) if begin in other.input), len(nodes))
                nodes[at:at] = pair
            if stored and root != name:
                for other in nodes:
                    if other.op_type in ("Transpose", "Identity") and root in other.input:
                        other.input[0] = done[root]
            else:
                node.input[index] = done[begin]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and code == "float8":
            entry.version = max(entry.version, 19)
    model.ir_version = max(model.ir_version, 9)
    onnx.save(model, out)
    onnx.checker.check_model(str(out))
    return out


def _pair(
    graph: onnx.GraphProto, name: str, value: Array, axis: int, channel: bool, code: str, room: float
) -> list[onnx.NodeProto]:
    others = tuple(other for other in range(value.ndim) if other != axis)
    largest = np.abs(value).max(axis=others) if channel else np.abs(value).max()
    top = 127.0 if code == "int8" else FLOAT8_MAX
    scale = (np.maximum(largest, 1e-3) * room / top).astype(np.float32)
    if code == "int8":
        zero = numpy_helper.from_array(np.zeros(scale.shape, np.int8), f"{name}.zero")
    else:
        float8 = onnx.TensorProto.FLOAT8E4M3FN
        zero = helper.make_tensor(f"{name}.zero", float8, scale.shape, np.zeros(scale.size))
    graph.initializer.extend([numpy_helper.from_array(np.asarray(scale), f"{name}.scale"), zero])
    inputs = [f"{name}.scale", f"{name}.zero"]
    given = {"axis": axis} if channel else {}
    return [
        helper.make_node("QuantizeLinear", [name, *inputs], [f"{name}.codes"], f"{name}.Q", **given),
        helper.make_node("DequantizeLinear", [f"{name}.codes", *inputs], [f"{name}.rounded"], **given),
    ]


def replaced(path: Path, out: Path, base: dict[str, Array], merged: dict[str, Array]) -> tuple[Path, int]:
    """Replace by hand every constant that holds a base weight; return the file and how many there were."""
    model, count = onnx.load(path), 0
    changed = [name for name in base if base[name].ndim > 1 and not np.array_equal(base[name], merged[name])]
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor) if tensor.data_type == onnx.TensorProto.FLOAT else None
        if value is None or value.ndim < 2:
            continue
        for name in changed:
            for turn in (False, True):
                known, new = (array[name].T if turn else array[name] for array in (base, merged))
                if value.shape == known.shape and np.array_equal(value, known):
                    copy = np.ascontiguousarray(new.astype(np.float32))
                    tensor.CopyFrom(numpy_helper.from_array(copy, tensor.name))
                    count += 1
                    break
            else:
                continue
            break
    onnx.save(model, out)
    return out, count


def static(path: Path, out: Path, feeds: Sequence[dict[str, Array]], **options: Any) -> Path:
    """Quantise a graph with ``onnxruntime.quantization.quantize_static``."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = iter(feeds)

        def get_next(self) -> Any:
            return next(self._rest, None)

    quantize_static(str(path), str(out), Reader(), **options)
    return out
