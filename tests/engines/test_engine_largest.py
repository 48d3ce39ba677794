"""Sizes of a graph's values at the largest shapes: expressions, what onnx infers, what is folded."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import graph, random

from lora_export.engines.memory.largest import Sized, dimensions, input_shapes, largest_values
from lora_export.engines.record import Profile
from lora_export.graph.expressions import evaluate, names_in
from lora_export.graph.onnx_file import GraphFile, load_graph

FLOAT, HALF, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64


def values_of(file: GraphFile, **largest: tuple[int, ...]) -> dict[str, Sized]:
    """Return the sizes of a graph's values for these largest shapes of its inputs."""
    profile = Profile("default", {name: (shape, shape, shape) for name, shape in largest.items()})
    inputs = input_shapes(file, profile)
    return largest_values(file, inputs, dimensions(file, inputs))


def file_of(text: str, **weights: np.ndarray) -> GraphFile:
    return GraphFile(graph(text, weights), Path("m.onnx"))


# --- expressions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("batch", 4),
        ("7", 7),
        ("past_sequence + sequence", 40),
        ("sequence*batch", 128),
        ("((batch*sequence)//batch)", 32),
        ("2*sequence - 1", 63),
        ("-(-sequence)//5", 6),
        ("Min(64, sequence)", 32),
        ("Max(1, past_sequence, batch)", 8),
        ("(sequence/3)*3", 32),
        ("FloorDiv(sequence, 3)", 10),
        ("Mod(sequence, 5)", 2),
        ("floor(sequence/5) + ceiling(sequence/5)", 13),
        ("batch**3", 64),
        ("layer.q.rank", 16),
        ("conv.0.rank/4", 2),
    ],
)
def test_what_exporters_write(text, wanted):
    sizes = {"batch": 4, "sequence": 32, "past_sequence": 8, "layer.q.rank": 16, "conv.0.rank/4": 2}
    assert evaluate(text, sizes) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("nobody", "sequence +", "", "sequence/3", "sequence//0", "sequence % 0", "1.5", "True", "'a'"),
        *("sequence if 1 else 2", "__import__('os')", "sequence.bit_length()", "Max(x=1)", "abs", "[1][0]"),
        *("9**9**9", "2**(-1)", "2**16**16", "sequence**(1/2)", "2**60*2**60", "(" * 500 + ")" * 500),
        *("+".join(["1"] * 20000), "Mod(1)", "Max()"),
        # The smaller number is 32, but on the way there are fractions of hundreds and of 10⁵ digits.
        *(
            "Min(sequence, sequence + ((2/3)**16)**16)",
            "Min(sequence, sequence + ((((2/3)**16)**16)**16)**16)",
        ),
        "Min(sequence, sequence - ((1/2)**16)**16)",
    ],
)
def test_what_is_no_size(text):
    """Not a crash, not an evaluation of whatever a file says, and no hours of arithmetic."""
    assert evaluate(text, {"sequence": 32}) is None


EXPRESSIONS = st.recursive(
    st.integers(0, 40).map(str) | st.sampled_from(["s0", "batch", "past_sequence"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(lambda t: f"({' '.join(t)})")
        | st.tuples(st.sampled_from(["Max", "Min"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
        | inner.map(lambda text: f"-({text})")
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, st.integers(0, 9), st.integers(1, 4096), st.integers(0, 4096))
def test_it_is_what_python_says(text, s0, batch, past_sequence):
    sizes = {"s0": s0, "batch": batch, "past_sequence": past_sequence}
    try:
        wanted = eval(text, {"Max": max, "Min": min, **sizes})
    except ZeroDivisionError:
        wanted = None
    got = evaluate(text, sizes)
    # A step on the way may be larger than any size.
    assert got == wanted or (got is None and text.count("*") >= 3)


@settings(deadline=None)  # the first one imports sympy
@given(
    st.sampled_from(["s*{}/{}", "floor(s/{}) - {}", "Mod(s, {}) + {}"]), st.integers(1, 9), st.integers(1, 9)
)
def test_it_is_what_sympy_says(form, first, second):
    sympy = pytest.importorskip("sympy")
    text = form.format(first, second)
    wanted = sympy.sympify(text).subs(sympy.Symbol("s"), 360)
    assert evaluate(text, {"s": 360}) == (int(wanted) if wanted.is_integer else None)


# --- shapes --------------------------------------------------------------------------------------------


def test_names_in_the_graph_get_the_inputs_sizes():
    model = file_of(
        "g (float[batch, s] x, int64[batch, past] p) => (float[batch, s] y) { z = Unknown(x, p) y = Relu(x) }"
    )
    z = model.graph.node(0).outputs[0]
    z.type, z.shape = ir.TensorType(HALF), ir.Shape(["batch", "past + s", 3])
    found = values_of(model, x=(4, 8), p=(4, 16))
    assert found["z"] == Sized(HALF, (4, 24, 3))
    assert found["y"] == Sized(FLOAT, (4, 8))
    assert found["z"].bytes == 4 * 24 * 3 * 2


def test_two_inputs_that_disagree_count_with_the_larger():
    model = file_of("g (float[b, s] x, float[b, t] z) => (float[b, s] y) { y = Relu(x) }")
    profile = Profile("", {"x": ((1, 1),) * 2 + ((2, 3),), "z": ((1, 1),) * 2 + ((5, 7),)})
    assert dimensions(model, input_shapes(model, profile)) == {"b": 5, "s": 3, "t": 7}


def test_a_constant_is_no_input():
    """An input with a default is a constant for TensorRT."""
    model = file_of("g (float[r, 4] x, float[2, 4] a) => (float[r, 4] y) { y = Relu(x) }", a=random(2, 4))
    assert input_shapes(model, Profile("", {"x": ((1, 4), (1, 4), (3, 4))})) == {"x": (3, 4)}


def test_what_the_graph_does_not_tell_is_inferred():
    text = """g (float[b, s, 8] x) => (float[b, s, 8] y) {
        h = MatMul(x, w) t = Transpose<perm=[0, 2, 1]>(h) y = Relu(x)
    }"""
    found = values_of(file_of(text, w=random(8, 6)), x=(2, 5, 8))
    assert found["h"] == Sized(FLOAT, (2, 5, 6))
    assert found["t"] == Sized(FLOAT, (2, 6, 5))


def test_shapes_computed_in_the_graph_are_followed():
    """As TorchScript's exporter writes them: further than onnx follows by itself."""
    text = """g (int64[b, s] ids) => (float[b, s] y) {
        shape = Shape(ids)
        zero = Constant<value_int=0>() one = Constant<value_int=1>() axes = Constant<value_ints=[0]>()
        length = Gather(shape, one)
        positions = Range(zero, length, one)
        starts = Constant<value_ints=[0]>() ends = Unsqueeze(length, axes)
        rows = Slice(table, starts, ends, axes)
        batch = Gather(shape, zero) row = Unsqueeze(batch, axes)
        target = Concat<axis=0>(row, ends)
        column = Cast<to=1>(positions)
        y = Expand(column, target)
    }"""
    found = values_of(file_of(text, table=random(4000, 3)), ids=(4, 300))
    assert found["positions"] == Sized(INT64, (300,))
    assert found["rows"] == Sized(FLOAT, (300, 3))
    assert found["target"] == Sized(INT64, (2,))
    assert found["y"] == Sized(FLOAT, (4, 300))


@pytest.mark.parametrize(
    ("name", "node", "shape"),
    [
        ("inputs of one name", "z = Range(one, many, one)", (10**9 - 1,)),
        ("together large", "z = Max(a, b, c, d, e)", (60,) * 5),
        ("long", "l = Range(one, many, one) m = Add(l, l) z = Concat<axis=0>(m, m)", (2 * 10**9 - 2,)),
    ],
)
def test_what_a_stranger_computes_takes_no_memory(name, node, shape):
    """Nodes of a few bytes whose results would be gigabytes."""
    text = f"""g (float[b, 4] x) => (float[b, 4] y) {{
        one = Constant<value_int=1>() many = Constant<value_int={10**9}>()
        {node} s = Shape(x) y = Reshape(x, s) n = NonZero(y)
    }}"""
    weights = {
        name: np.arange(60).reshape([60 if axis == own else 1 for axis in range(5)])
        for own, name in enumerate("abcde")
    }
    file = file_of(text, **weights)
    tracemalloc.start()
    found = values_of(file, x=(2, 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert found["z"].shape == shape


def test_an_expression_of_a_megabyte_is_no_size():
    tracemalloc.start()
    assert evaluate("Max(" + "n," * 500_000 + "n)", {"n": 3}) is None
    assert names_in("Max(" + "n," * 500_000 + "n)") == set()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_what_nobody_can_tell_is_missing():
    model = file_of("g (float[b, s] x) => (float[b, s] y) { z = NonZero(x) w = Cast<to=1>(z) y = Relu(x) }")
    found = values_of(model, x=(2, 3))
    assert "w" not in found
    assert "y" in found


def test_a_wrong_shape_in_the_graph_does_no_harm():
    """Exporters' shapes are sometimes wrong in rank: onnx then infers nothing at all."""
    model = file_of("g (float[b, s] x) => (float[b, s] y) { z = Relu(x) u = Neg(z) y = Relu(u) }")
    z = model.graph.node(0).outputs[0]
    z.type, z.shape = ir.TensorType(FLOAT), ir.Shape(["b"])
    found = values_of(model, x=(2, 3))
    assert found["y"] == Sized(FLOAT, (2, 3))


@pytest.mark.parametrize(
    ("arch", "exporter"),
    [("llama", "torchscript"), ("bert", "torchscript"), ("bert", "dynamo"), ("gpt2", "dynamo")],
)
def test_every_value_of_the_zoo_has_a_size(arch, exporter):
    """And it is what onnxruntime computes."""
    path = tiny.base_onnx(arch, exporter)
    file, feeds = load_graph(path), tiny.feeds(arch, path)
    found = values_of(file, **{name: array.shape for name, array in feeds.items()})
    made = [value for node in file.graph for value in node.outputs if value.const_value is None]
    assert not [value.name for value in made if value.name not in found]
    assert found[str(file.graph.outputs[0].name)].shape == tiny.run(path, feeds).shape


def test_the_graph_stays_as_it_is():
    file = load_graph(tiny.base_onnx("bert", "dynamo"))
    before = ir.to_proto(file.model).SerializeToString(deterministic=True)
    values_of(file, input_ids=(4, 32), attention_mask=(4, 32), token_type_ids=(4, 32))
    assert ir.to_proto(file.model).SerializeToString(deterministic=True) == before
