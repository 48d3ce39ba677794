"""Norms and rotary embeddings become one node where the nodes are one, and what is near stays as it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_export.base.capture.fuse import fuse_nodes

BATCH, HEADS, LENGTH, HEAD = 2, 3, 5, 8
RANDOM = np.random.default_rng(0)


class Graph:
    """A graph, written node by node; each value has the name of its variable."""

    def __init__(self) -> None:
        self.nodes, self.constants, self.number = [], [], 0

    def add(self, operator, *inputs, **attributes):
        self.number += 1
        self.nodes.append(helper.make_node(operator, inputs, [f"v{self.number}"], **attributes))
        return f"v{self.number}"

    def constant(self, values, dtype=np.int64):
        self.number += 1
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), f"c{self.number}"))
        return f"c{self.number}"

    def proto(self, inputs, output, dtype=TensorProto.FLOAT):
        values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        out = helper.make_tensor_value_info("y", dtype, None)
        graph = helper.make_graph(self.nodes, "g", values, [out], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def fused(proto, feeds):
    """Return the numbers of nodes made, having compared the answers before and after."""
    model = ir.from_proto(proto)
    made = fuse_nodes(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    answers = [
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for one in (proto, after)
    ]
    close = {"rtol": 0, "atol": (2e-3 if answers[0].dtype == np.float16 else 1e-6) * np.abs(answers[0]).max()}
    np.testing.assert_allclose(*(one.astype(np.float64) for one in answers), **close)
    return made["RMSNormalization"], made["RotaryEmbedding"]


def norm(
    *,
    axes=(-1,),
    power=2.0,
    keepdims=1,
    size=HEAD,
    half=False,
    swapped=False,
    other=False,
    outside=False,
    mean="ReduceMean",
):
    """A norm as transformers computes it, with one thing changed."""
    graph, kind = Graph(), TensorProto.FLOAT16 if half else TensorProto.FLOAT
    x = graph.add("Cast", "x", to=TensorProto.FLOAT) if half else "x"
    of = graph.add("Neg", graph.add("Abs", x)) if other else x
    square = graph.add("Pow", of, graph.constant(power, np.float32))
    total = graph.add(mean, square, graph.constant(list(axes)), keepdims=keepdims)
    epsilon = graph.constant(0.3, np.float32)
    root = graph.add("Sqrt", graph.add("Add", *((epsilon, total) if swapped else (total, epsilon))))
    normal = graph.add("Mul", x, graph.add("Reciprocal", root))
    if outside:
        normal = graph.add("Tanh", normal)
    if half:
        normal = graph.add("Cast", normal, to=kind)
    weight = graph.constant(RANDOM.standard_normal(size), np.float16 if half else np.float32)
    out = graph.add("Mul", *((normal, weight) if swapped else (weight, normal)))
    shape = [BATCH, LENGTH, HEAD]
    x = RANDOM.standard_normal(shape).astype(np.float16 if half else np.float32)
    return fused(graph.proto({"x": (kind, shape)}, out, kind), {"x": x})


@pytest.mark.parametrize(
    "changed", [{}, {"half": True}, {"swapped": True}, {"axes": (2,)}, {"half": True, "swapped": True}]
)
def test_norms(changed):
    assert norm(**changed) == (1, 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"axes": (1,)},
        {"axes": (1, 2)},
        {"power": 4.0},
        {"size": 1},
        {"size": (LENGTH, HEAD)},
        {"other": True},
        {"outside": True},
        {"mean": "ReduceSum"},
    ],
)
def test_what_is_no_norm(changed):
    assert norm(**changed) == (0, 0)


def rotary(
    *,
    order=(1, 0),
    negated=0,
    tables=("Cos", "Sin"),
    twice=True,
    batch=BATCH,
    swapped=False,
    half=False,
    mixed=False,
):
    """Rotary embedding as transformers computes it, with one thing changed."""
    graph, kind = Graph(), TensorProto.FLOAT16 if half else TensorProto.FLOAT
    first = graph.add("Mul", "angle", graph.constant(1.5, np.float32))
    joined = graph.add("Concat", first, first if twice else graph.add("Exp", first), axis=-1)

    def table(operator):
        value = graph.add("Mul", graph.add(operator, joined), graph.constant([0.7], np.float32))
        value = graph.add("Cast", value, to=kind) if half else value
        return graph.add("Unsqueeze", value, graph.constant([1]))

    cosine, sine = (table(operator) for operator in tables)
    last, one = graph.constant([3]), graph.constant([1])
    ends = [(0, HEAD // 2), (HEAD // 2, np.iinfo(np.int64).max)]
    parts = [graph.add("Slice", "x", graph.constant([a]), graph.constant([b]), last, one) for a, b in ends]
    pieces = [parts[index] for index in order]
    pieces[negated] = graph.add("Neg", pieces[negated])
    turned = graph.add("Concat", *pieces, axis=-1)
    plain = graph.add("Neg", "x") if mixed else "x"
    sums = [graph.add("Mul", plain, cosine), graph.add("Mul", turned, sine)]
    out = graph.add("Add", *(sums[::-1] if swapped else sums))
    shape, angle = [BATCH, HEADS, LENGTH, HEAD], [batch, LENGTH, HEAD // 2]
    feeds = {
        "x": RANDOM.standard_normal(shape).astype(np.float16 if half else np.float32),
        "angle": RANDOM.standard_normal(angle).astype(np.float32),
    }
    inputs = {"x": (kind, shape), "angle": (TensorProto.FLOAT, angle)}
    return fused(graph.proto(inputs, out, kind), feeds)


@pytest.mark.parametrize("changed", [{}, {"swapped": True}, {"half": True}])
def test_rotary_embeddings(changed):
    assert rotary(**changed) == (0, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"order": (0, 1)},
        {"negated": 1},
        {"twice": False},
        {"batch": 1},
        {"mixed": True},
        {"tables": ("Sin", "Cos")},
        {"tables": ("Cos", "Cos")},
    ],
)
def test_what_is_no_rotary_embedding(changed):
    assert rotary(**changed) == (0, 0)
