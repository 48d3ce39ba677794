"""A stranger's nodes that make much out of nothing: no verb that reads graphs computes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import peaks
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

from lora_export.engines.memory import largest
from lora_export.modes.branches.batch import index
from lora_export.modes.branches.batch.follow import BatchRows
from lora_export.modes.branches.batch.rows import Rows
from lora_export.untrusted.computed import (
    MAX_ELEMENTS,
    MAX_WORK,
    Budget,
    UncomputedError,
    computed,
    elements,
)

# As many as would be seen in a peak, and do no harm where a bound is missing.
MANY, SIDE = 10**8, 10**4
HUGE = 10**12
NODES = {
    "Expand": ["v = Expand(one, many)"],
    "Expand, more than there is": ["v = Expand(one, huge)"],
    "Tile": ["v = Tile(one, many)"],
    "ConstantOfShape": ["f = ConstantOfShape(many)", "v = Cast<to = 7>(f)"],
    "Range": ["v = Range(zero, end, step)"],
    "Pad": ["v = Pad(one, pads)"],
    "OneHot": ["v = OneHot(one, end, pair)"],
    "EyeLike": ["e = ConstantOfShape(sides)", "v = EyeLike<dtype = 7>(e)"],
    "Resize": ["r = Resize(image, , , resized)", "v = Cast<to = 7>(r)"],
    "Concat": [
        "v0 = Concat<axis = 0>(one, one)", *(f"v{i + 1} = Concat<axis = 0>(v{i}, v{i})" for i in range(26)),
        "v = Identity(v26)",
    ],
    "broadcast": ["v = Add(column, row)"],
    "MatMul": ["v = MatMul(column, row)"],
    "MatMul of nothing": ["v = MatMul(no_columns, no_rows)"],
    "MatMul of nothing, many times": ["w = MatMul(no_matrices, no_rows)", "v = Flatten(w)"],
    "ReduceSum over nothing": ["v = ReduceSum<keepdims = 0>(nothing, first)"],
    "ReduceProd over nothing": ["v = ReduceProd<axes = [0]>(nothing)"],
    "Gather": ["c = Add(column, zero)", "w = Expand(one, side)", "i = Sub(w, one)", "t = Transpose(column)",
               "v = Gather<axis = 0>(t, i)"],
    "RandomNormal": [f"r = RandomNormal<shape = [{SIDE}, {SIDE}]>()", "v = Cast<to = 7>(r)"],
    "HannWindow": ["r = HannWindow(end)", "v = Cast<to = 7>(r)"],
}  # fmt: skip
CONSTANTS = {
    "one": [1], "zero": 0, "step": 1, "end": MANY, "many": [MANY], "huge": [HUGE], "pads": [0, MANY],
    "pair": [0, 1], "sides": [SIDE, SIDE], "side": [SIDE], "resized": [1, 1, SIDE, SIDE],
    "column": np.ones((SIDE, 1), np.int64), "row": np.ones((1, SIDE), np.int64),
    "no_columns": np.ones((SIDE, 0), np.int64), "no_rows": np.ones((0, SIDE), np.int64), "first": [0],
    "no_matrices": np.ones((100, SIDE // 100, 0), np.int64), "nothing": np.ones((0, MANY), np.int64),
    "image": np.ones((1, 1, 2, 2), np.float32),
}  # fmt: skip
# Rows of the batch by an index that hangs on v: which rows these are is what a bank computes.
REST = """
    s = ReduceMax<keepdims = 0>(v)  m = Mod(s, step)  h = MatMul(x, q_weight)  sizes = Shape(h)
    batch = Gather<axis = 0>(sizes, zero)  rows = Range(m, batch, step)  picked = Gather<axis = 0>(h, rows)
    y = MatMul(picked, k_weight)
"""


def hostile(nodes: list[str]) -> bytes:
    text = f"g (float[n,8] x) => (float[m,8] y) {{ {' '.join(nodes)} {REST} }}"
    graph = onnx.parser.parse_graph(text)
    eye = np.eye(8, dtype=np.float32)
    for name, values in {**CONSTANTS, "q.weight": eye, "k.weight": eye}.items():
        array = np.asarray(values) if isinstance(values, np.ndarray) else np.asarray(values, np.int64)
        graph.initializer.append(numpy_helper.from_array(array, name))
    for node in graph.node:
        node.input[:] = [name.replace("_weight", ".weight") for name in node.input]
        node.name = f"/{node.input[1][0]}/MatMul" if node.input[1:] and ".weight" in node.input[1] else ""
    opsets = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_verb_computes_more_than_it_can_hold(tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "k"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    matrices = {"A": np.ones((4, 8), np.float32), "B": np.ones((8, 4), np.float32)}
    weights = {f"base_model.model.{m}.lora_{x}.weight": matrices[x] for m in "qk" for x in "AB"}
    save_file(weights, adapter / "adapter_model.safetensors")
    out = tmp_path / "o.onnx"

    def runs(path: Path) -> list[list[object]]:
        options = ["--base", path, "-o", out, "--dry-run", "--adapter"]
        build = ["build-engine", path, "--target", "rtx-4090", "-o", tmp_path / "e", "--dry-run"]
        return [
            ["merge-onnx", *options, adapter],
            ["swap-onnx", *options, adapter],
            ["bank-onnx", *options, f"one={adapter}"],
            build,
        ]

    good = tmp_path / "good.onnx"
    good.write_bytes(hostile(["v = Identity(one)"]))
    named = []
    for name, nodes in NODES.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(hostile(nodes))
        named += [(path, run) for run in runs(path)]
    wrong = []
    found = peaks.measured(runs(good), [run for _, run in named])
    for (path, run), (code, _, err, peak, seconds) in zip(named, found, strict=True):
        if code not in (0, 1) or peak > peaks.allowed(path) or seconds > 20:
            wrong.append(
                f"{path.name}: {run[0]}: code {code}, {peak / 1e6:.0f} MB, {seconds:.0f} s {err[:300]}"
            )
    assert not wrong, "\n".join(wrong)


SMALL = {
    "Expand": ["v = Expand(row, four)"], "Tile": ["v = Tile(row, two)"],
    "Range": ["v = Range(zero, five, step)"], "Pad": ["v = Pad(row, pads)"],
    "OneHot": ["v = OneHot(row, five, pair)"], "Add": ["v = Add(row, column)"],
    "MatMul": ["v = MatMul(column, row)"], "Concat": ["v = Concat<axis = 1>(row, row)"],
    "Gather": ["v = Gather<axis = 0>(column, two)"], "NonZero": ["v = NonZero(row)"],
    "Shape": ["v = Shape(row)"], "ConstantOfShape": ["v = ConstantOfShape(four)"],
    "Where": ["c = Equal(row, column)", "v = Where(c, row, zero)"], "Reshape": ["v = Reshape(row, three)"],
    "ReduceSum": ["v = ReduceSum(row)"], "Slice": ["v = Slice(row, zero1, two1)"],
    "Cast": ["v = Cast<to = 1>(row)"], "Transpose": ["v = Transpose(row)"],
    "CumSum": ["v = CumSum(row, step)"],
    "GatherND": ["v = GatherND(column, two)"], "Split": ["v, w = Split<axis = 1>(row4)"],
}  # fmt: skip
SMALL_CONSTANTS = {
    "row": [[0, 1, 2]], "column": [[0], [1], [2], [3], [4]], "row4": [[1, 2, 3, 4]], "zero": 0, "step": 1,
    "five": 5, "four": [4, 1], "two": [2, 0], "three": [3, 1], "pads": [1, 0, 0, 2], "pair": [0, 1],
    "zero1": [0], "two1": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_what_is_small_is_computed_as_onnx_computes_it_and_not_larger_than_told(name: str) -> None:
    nodes = SMALL[name]
    text = f"<opset_import: ['' : 18], ir_version: 10> g () => (int64 v) {{ {' '.join(nodes)} }}"
    model = onnx.parser.parse_model(text.replace("'", '"'))
    for key, values in SMALL_CONSTANTS.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), key))
    wanted = ReferenceEvaluator(model).run(None, {})[0]
    found = computed(model.graph, 18)
    assert np.array_equal(found, wanted)
    assert found.shape == wanted.shape
    values = {key: np.asarray(value) for key, value in SMALL_CONSTANTS.items()}
    last = model.graph.node[-1]
    inputs = [values.get(key, np.zeros((5, 3))) for key in last.input]
    assert wanted.size <= elements(last, inputs)


@pytest.mark.parametrize("name", ["Resize", "RandomNormal", "HannWindow", "Expand", "Concat"])
def test_what_is_large_or_not_known_is_not_computed(name: str) -> None:
    model = onnx.load_model_from_string(hostile(NODES[name]))
    del model.graph.node[len(NODES[name]) :]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("v", TensorProto.INT64, None))
    with pytest.raises(UncomputedError):
        computed(model.graph, 18)


@pytest.mark.parametrize("operator", ["Max", "Sum"])
def test_a_constant_that_is_read_many_times_is_work_each_time(operator: str) -> None:
    size, times = 1 << 12, 1 << 9  # each of them is small, but not all combinations of two
    read = ", ".join(["c"] * times)
    model = onnx.parser.parse_model(
        f'<opset_import: ["" : 18], ir_version: 10> g () => (float v) {{ v = {operator}({read}) }}'
    )
    array = np.ones(size, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(array, "c"))
    assert elements(model.graph.node[0], [array] * times) >= size * times > MAX_ELEMENTS > size + times
    with pytest.raises(UncomputedError):
        computed(model.graph, 18)


PICK = """<opset_import: ["" : 18], ir_version: 10> g (float[n,8] x) => (float[m,8] y) {{
    sizes = Shape(x)  batch = Gather<axis = 0>(sizes, zero)  rows = Range(zero, batch, one)
    {picks}
    y = Concat<axis = 1>({picked})
}}"""


def rows_of(picks: list[str], width: int = 0) -> tuple[BatchRows, list[ir.Value | None]]:
    """Return the rows of a graph with picks, and the values that were picked."""
    text = PICK.format(picks=" ".join(picks), picked=", ".join(f"p{number}" for number in range(len(picks))))
    proto = onnx.parser.parse_model(text)
    constants = {"zero": 0, "one": 1, "wide": np.zeros((width, 1))}
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    shapes = {id(value): value.shape for value in values if value.shape is not None}
    entry = model.graph.inputs[0]
    flow = BatchRows(model.graph, shapes, entry.shape[0], entry)
    return flow, [value for value in values if value.name.startswith("p")]


def test_an_index_is_computed_once_for_each_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(index, "values_of", lambda *given: calls.append(0) or computed(*given))
    rows_of(["p0 = Gather<axis = 0>(x, rows)"])
    wanted = len(calls)
    assert wanted > 0
    many, picked = rows_of([f"p{number} = Gather<axis = 0>(x, rows)" for number in range(30)])
    assert len(calls) == 2 * wanted
    assert [many.of(value) for value in picked] == [Rows(axis=0)] * 30


def test_all_indices_of_a_graph_have_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each index reads a constant of its own width; the oracle counts what was really made."""
    width, made = 1 << 16, []

    def counted(graph: onnx.GraphProto, version: int, budget: Budget) -> np.ndarray:
        found = computed(graph, version, budget)
        made.append(width)
        return found

    monkeypatch.setattr(index, "values_of", counted)
    count = 60
    picks = [
        f"w{n} = Add(rows, wide) s{n} = ReduceMax<keepdims = 0>(w{n}) p{n} = Gather<axis = 0>(x, s{n})"
        for n in range(count)
    ]
    flow, picked = rows_of(picks, width)
    found = [flow.of(value) for value in picked]
    assert 0 < sum(made) <= MAX_WORK < width * count * 8
    assert found[-1] is None


def test_nodes_that_compute_shapes_have_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    count, most = 40, 10
    nodes = [f"v{n} = Add(v{n - 1}, v{n - 1})" for n in range(1, count)]
    text = f"g (float[2,8] x) => (float[a,b] y) {{ v0 = Shape(x) {' '.join(nodes)} y = Expand(x, v1) }}"
    model = ir.from_proto(onnx.helper.make_model(onnx.parser.parse_graph(text), ir_version=10))
    run, runs = largest._run, []
    monkeypatch.setattr(largest, "_run", lambda *given: runs.append(0) or run(*given))

    def folded(budget: Budget) -> int:
        runs.clear()
        copy = model.clone()
        copy.graph.inputs[0].shape = ir.Shape([2, 8])
        largest._fold_indices(copy, {}, budget)
        return len(runs)

    assert folded(Budget()) == count - 1
    assert 0 < folded(Budget(most * largest._RUN_WORK)) <= most
