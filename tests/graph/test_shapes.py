"""Shapes that onnx infers: values are propagated only where all vectors together are short."""

import onnx
import onnx_ir as ir
import pytest
from onnx import helper, shape_inference

from lora_export.engines.memory import largest
from lora_export.graph import shapes


def chain(count):
    """Return a graph of ``count`` Concats, each of which lengthens the shape that it reads by two."""
    ports = [
        helper.make_tensor_value_info("x", 1, ["N", 4]),
        helper.make_tensor_value_info("y", 7, None),
        helper.make_tensor_value_info("z", 1, None),
    ]
    nodes = [helper.make_node("Shape", ["x"], ["s0"])]
    nodes += [helper.make_node("Concat", [f"s{i}", "one"], [f"s{i + 1}"], axis=0) for i in range(count)]
    nodes += [helper.make_node("Identity", [f"s{count}"], ["y"])]
    # Only who knows the values of a shape knows this one.
    nodes += [helper.make_node("Slice", ["s1", "two", "four", "zero"], ["end"])]
    nodes += [helper.make_node("Expand", ["nothing", "end"], ["z"])]
    held = {"one": [1, 1], "zero": [0], "two": [2], "four": [4]}
    constants = [helper.make_tensor(name, 7, [len(said)], said) for name, said in held.items()]
    constants.append(helper.make_tensor("nothing", 1, [], [0.0]))
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def total(proto):
    """Return the elements of all vectors that the nodes make, as onnx infers their lengths."""
    found = shape_inference.infer_shapes(proto).graph
    dims = [value.type.tensor_type.shape.dim for value in (*found.value_info, *found.output)]
    return sum(dim[0].dim_value for dim in dims if len(dim) == 1)


@pytest.fixture
def propagated(monkeypatch):
    """What each call of onnx was told of propagating values."""
    seen, own = [], shape_inference.infer_shapes

    def infer(*arguments, **options):
        seen.append(options.get("data_prop", arguments[3] if len(arguments) > 3 else False))
        return own(*arguments, **options)

    monkeypatch.setattr(shape_inference, "infer_shapes", infer)
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", infer)
    return seen


@pytest.mark.parametrize("count", [2, 500, 1500])
@pytest.mark.parametrize("of", ["shapes_of", "largest"])
def test_values_are_propagated_where_all_vectors_together_are_short(of, count, propagated):
    """Of 20,000 such nodes, which take 2 MB, onnx would make vectors of 30 GB."""
    proto = chain(count)
    is_long = total(proto) > shapes._LONGEST == largest._MAX_PROPAGATED
    propagated.clear()
    model = ir.from_proto(proto)
    if of == "largest":
        known = largest._infer(model).get("z")
        shape = None if known is None else known.shape
    else:
        by_id = shapes.shapes_of(model)
        z = next(value for value in model.graph.outputs if value.name == "z")
        shape = by_id.get(id(z))
    assert is_long == (count == 1500)
    assert propagated == ([False] if is_long else [False, True])
    if not is_long:
        assert tuple(shape) == (1, 1)
