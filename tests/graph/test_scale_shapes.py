"""Scales and zero points that don't fit what they quantise: refused where ONNX Runtime refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_export.errors import GraphError
from lora_export.graph.onnx_file import load_graph

# shape of the codes, of the scale, of the zero point (None: there is none), axis, block size.
CASES = {
    "one": ((8, 6), (), (), 1, 0),
    "one, as a vector": ((8, 6), (1,), (1,), 1, 0),
    "one, without a zero point": ((8, 6), (), None, 1, 0),
    "an axis": ((8, 6), (6,), (6,), 1, 0),
    "the first axis": ((8, 6), (8,), (8,), 0, 0),
    "an axis from behind": ((8, 6), (6,), (6,), -1, 0),
    "of a convolution": ((4, 3, 2, 2), (4,), (4,), 0, 0),
    "blocks": ((8, 6), (2, 6), (2, 6), 0, 4),
    "blocks, the last of them short": ((8, 6), (8, 2), (8, 2), 1, 4),
    "too many axes": ((8, 6), (1, 1, 7, 1, 1), (1, 1, 7, 1, 1), 1, 0),
    "a zero point of many axes": ((8, 6), (), (1, 1, 7, 1, 1), 1, 0),
    "another length": ((8, 6), (8,), (8,), 1, 0),
    "a zero point of another length": ((8, 6), (6,), (3,), 1, 0),
    "no such axis": ((8, 6), (6,), (6,), 5, 0),
    "blocks of another size": ((8, 6), (3, 6), (3, 6), 0, 4),
    "blocks of other columns": ((8, 6), (2, 7), (2, 7), 0, 4),
    "more blocks than values": ((8, 6), (16, 6), (16, 6), 0, 1),
}


def saved(path, codes, scale, zero, axis, block):
    rng = np.random.default_rng(0)
    held = [
        numpy_helper.from_array(rng.integers(-9, 9, codes).astype(np.int8), "codes"),
        numpy_helper.from_array(rng.random(scale).astype(np.float32), "scale"),
    ]
    if zero is not None:
        held.append(numpy_helper.from_array(np.zeros(zero, np.int8), "zero"))
    options = {"axis": axis} | ({"block_size": block} if block else {})
    node = helper.make_node(
        "DequantizeLinear", [tensor.name for tensor in held], ["y"], name="/dq", **options
    )
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [], [output], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def runs(path):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {})
    except Exception:  # it has many kinds
        return False
    return True


@pytest.mark.parametrize("case", CASES)
def test_as_onnxruntime_says(case, tmp_path):
    path = saved(tmp_path / "m.onnx", *CASES[case])
    if runs(path):
        load_graph(path)
        return
    with pytest.raises(GraphError, match="don't fit what they quantise") as caught:
        load_graph(path)
    assert all("DequantizeLinear /dq" in problem for problem in caught.value.problems)
