"""Lists of texts in metadata, and shapes that are computed from themselves: read without being believed."""

import ast
import time
import tracemalloc

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import graph

from lora_export.modes.branches.batch.sizes import BATCH, sizes_of
from lora_export.untrusted.texts import listed_texts

HOSTILE = {
    "minus": "-" * 200_000 + "1",
    "nested": "[" * 150_000,
    "nested, closed": "[" * 90 + "]" * 90,
    "lists": "[" + "[]," * 400_000 + "]",
    "sums": "1" + "+1" * 100_000,
    "joined": "['a' " + "'b' " * 200_000 + "]",
    "joined, short": "['a' 'b']",
    "numbers": "[1, 2]",
    "a set of a list": "{[]: 1}",
    "nul": "[\0]",
    "half": "['a', ",
    "two commas": "['a',, 'b']",
    "an escape that is none": "['\\x']",
    "one that never ends": "['" + "\\" * 60_001 + "]",
    "long": "['" + "a" * 200_000 + "']",
    "a call": "f(['a'])",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_list_of_texts_is_none(case):
    tracemalloc.start()
    start = time.monotonic()
    assert listed_texts(HOSTILE[case], "[({") == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert time.monotonic() - start < 5


@given(st.lists(st.text(max_size=8), max_size=6))
def test_what_python_writes_is_read(texts):
    assert listed_texts(str(texts)) == texts == ast.literal_eval(str(texts))
    assert listed_texts(str(tuple(texts)), "[(") == texts
    assert listed_texts(str(tuple(texts))) == []
    if texts:
        assert sorted(listed_texts(str(set(texts)), "{")) == sorted(set(texts))


def shape_of(nodes: str) -> ir.Value:
    """Return the last value of a graph that computes with the shape of x."""
    made = graph(f"g (float[b, 8] x) => (int64[s] y) {{ s0 = Shape<start=0, end=1>(x) {nodes} }}", {})
    return made.graph.outputs[0]


@pytest.mark.parametrize(
    ("step", "last"),
    [
        ("s{n} = Add(s{o}, s{o})", [None]),
        ("s{n} = Mul(s{o}, s{o})", ["times"]),
        ("s{n} = Concat<axis=0>(s{o}, s{o})", None),
        ("s{n} = Cast<to=7>(s{o})", None),
    ],
)
@pytest.mark.parametrize("count", [60, 3000])
def test_a_size_computed_from_itself_is_read_once(step, last, count):
    """Sixty nodes that double a vector are 2^60 ways through the graph, or as many numbers."""
    nodes = " ".join(step.format(n=number + 1, o=number) for number in range(count))
    value = shape_of(f"{nodes} y = Identity(s{count})")
    start = time.monotonic()
    found = sizes_of(value, lambda _value, _axis: BATCH)
    assert time.monotonic() - start < 5
    if count == 60 and "Cast" not in step:
        assert found == last
    elif count == 60:
        assert found == [BATCH]
    else:
        assert found is None


def test_a_number_that_is_squared_again_and_again_is_unknown():
    nodes = " ".join(f"s{n + 1} = Mul(s{n}, s{n})" for n in range(1, 60))
    value = shape_of(f"s1 = Constant<value_ints=[3]>() {nodes} y = Identity(s60)")
    assert sizes_of(value, lambda _value, _axis: BATCH) == [None]
