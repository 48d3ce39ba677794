"""Graphs that two readers understand differently, or that are none: refused by name when they are read."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_export import Adapter, LoraModule, save_adapter
from lora_export.cli import _run
from lora_export.errors import GraphError
from lora_export.graph.onnx_file import load_graph

W = np.eye(8, dtype=np.float32)
PRODUCT = helper.make_node("MatMul", ["x", "q.weight"], ["h"], name="/q/MatMul")
END = helper.make_node("Relu", ["h"], ["y"], name="/end")


def constant(name="q.weight", values=W):
    return numpy_helper.from_array(values, name)


def model(nodes=(PRODUCT, END), constants=None, functions=(), opsets=(("", 20), ("own", 1))):
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", ports[:1], ports[1:], constants or [constant()])
    imports = [helper.make_opsetid(*opset) for opset in opsets]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))


def function(name, domain="own", body="Neg", opset=20, more=()):
    nodes = [helper.make_node(body, ["a", *more], ["b"])]
    return helper.make_function(domain, name, ["a"], ["b"], nodes, [helper.make_opsetid("", opset)])


def called(name):
    return [PRODUCT, helper.make_node(name, ["h"], ["y"], domain="own")]


def tensor(dims, **more):
    return TensorProto(name="k", data_type=TensorProto.FLOAT, dims=dims, **more)


def changed(change, *arguments):
    made = model(*arguments)
    change(made)
    return made


def sparse(graph):
    found = graph.sparse_initializer.add(dims=[8, 8])
    found.values.CopyFrom(constant("zz", np.ones(2, np.float32)))
    found.indices.CopyFrom(constant("", np.array([1, 2])))


def in_branch(change):
    """Return a model with a subgraph that is changed."""
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Identity", ["h"], ["b"])], "branch", [], [output])
    change(branch)
    choice = helper.make_node("If", ["c"], ["y"], name="/if", then_branch=branch, else_branch=branch)
    return model([PRODUCT, choice], [constant(), constant("c", np.array(True))])


def with_reference(op_type, name, kind):
    node = helper.make_node(op_type, ["q.weight"], ["t"], name="/q/t")
    node.attribute.add(name=name, ref_attr_name="foo", type=kind)
    return model([node, helper.make_node("MatMul", ["x", "t"], ["h"]), END])


def doubled_entry(proto):
    for value in ("a.bin", "b.bin"):
        proto.graph.initializer[0].external_data.add(key="location", value=value)
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL


def doubled_metadata(owner):
    for value in "12":
        owner.metadata_props.add(key="lora_export.model", value=value)


CASES = {
    "two constants": (
        model(constants=[constant(), constant(values=5 * W)]),
        "two initializers .* 'q.weight'",
    ),
    "two constants of a branch": (
        in_branch(lambda branch: branch.initializer.extend([constant("k"), constant("k")])),
        "two initializers of the subgraph 'branch' are called 'k'",
    ),
    "a constant without a name": (model(constants=[constant(), constant("")]), "has no name"),
    "two attributes": (
        changed(lambda m: m.graph.node[1].attribute.extend([helper.make_attribute("k", n) for n in (1, 2)])),
        "two attributes of the node '/end' are called 'k'",
    ),
    "two functions": (
        model(called("F"), None, [function("F"), function("F", body="Abs")]),
        "two functions .* 'F'",
    ),
    "two locations": (
        changed(doubled_entry),
        "external data of 'q.weight': the entry 'location' occurs twice",
    ),
    "two metadata": (changed(doubled_metadata), "the metadata: the entry 'lora_export.model' occurs twice"),
    "two metadata of a node": (
        changed(lambda m: doubled_metadata(m.graph.node[0])),
        "'/q/MatMul'.*occurs twice",
    ),
    "two versions": (model(opsets=(("", 20), ("ai.onnx", 11))), "versions .* twice"),
    "a value made twice": (model([PRODUCT, END, END]), "'y': computed by two nodes"),
    "a value made and given": (
        model([PRODUCT, helper.make_node("Relu", ["h"], ["x"])]),
        "'x': computed by two",
    ),
    "two outputs": (changed(lambda m: m.graph.output.append(m.graph.output[0])), "two outputs .* 'y'"),
    "two inputs": (changed(lambda m: m.graph.input.append(m.graph.input[0])), "two inputs .* 'x'"),
    "sparse": (changed(lambda m: sparse(m.graph)), "'zz': a sparse tensor"),
    "sparse in a branch": (in_branch(sparse), "'zz': a sparse tensor"),
    "an operator's name": (
        model(functions=[function("Relu", "")]),
        "the function 'Relu' has the name of an operator",
    ),
    "an operator's name, spelt out": (model(functions=[function("Relu", "ai.onnx")]), "'Relu' has the name"),
    "an operator's name of ONNX's other domain": (
        model(functions=[function("Scaler", "ai.onnx.ml")]),
        "'Scaler'",
    ),
    "a standard domain": (model(functions=[function("Affine", "")]), "'Affine' has the name"),
    "an undefined input": (
        model([helper.make_node("MatMul", ["nope", "q.weight"], ["h"]), END]),
        "'nope': read by",
    ),
    "an undefined input of a branch": (
        in_branch(lambda branch: branch.node.append(helper.make_node("Relu", ["nope"], ["k"]))),
        "'nope': read by a node of the subgraph 'branch'",
    ),
    "an undefined output": (model([PRODUCT]), "'y': an output of the graph, but no node computes it"),
    "a cycle": (
        model(
            [
                helper.make_node("Add", ["b", "x"], ["a"]),
                helper.make_node("Add", ["a", "x"], ["b"]),
                PRODUCT,
                END,
            ]
        ),
        "'[ab]': computed from itself",
    ),
    "a function that reads outside": (
        model(called("F"), None, [function("F", body="MatMul", more=["q.weight"])]),
        "'q.weight': read by a node of the function 'F'",
    ),
    "a function of another version": (
        model(called("F"), None, [function("F", body="Softmax", opset=11)]),
        "its functions can't be inlined",
    ),
    "huge sizes": (model(constants=[constant(), tensor([2**62] * 400, raw_data=b"\0" * 4)]), "k: 400 axes"),
    "huge and external": (
        model(constants=[constant(), tensor([2**62] * 40, data_location=TensorProto.EXTERNAL)]),
        "at most 9223372036854775807 elements",
    ),
    "zero and huge sizes": (model(constants=[constant(), tensor([0, 2**62, 2**62])]), "at most .* elements"),
    "a hundred axes": (model(constants=[constant(), tensor([1] * 100, raw_data=b"\0" * 4)]), "k: 100 axes"),
    "a reference to an attribute": (with_reference("Transpose", "perm", 7), "perm refers to a function's"),
    "a reference to a number": (with_reference("Cast", "to", 2), "to refers to a function's"),
    "values in another type's field": (
        model(constants=[constant(), tensor([2], int64_data=[1, 2])]),
        "k: holds 0 bytes, but its shape .* of FLOAT needs 8",
    ),
    "values in two fields": (
        model(constants=[constant(), tensor([2], float_data=[1, 2], int32_data=[1, 2])]),
        "k: holds 0 bytes",
    ),
    "a branch that gives what is around it": (
        in_branch(lambda branch: setattr(branch.output[0], "name", "h")),
        "'h': an output of the subgraph 'branch', but no node computes it",
    ),
    "a cast to no type": (
        model([helper.make_node("Cast", ["x"], ["c"], to=999), PRODUCT, END]),
        "the attribute to is 999, wanted an element type",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_two_readers_understand_differently_is_refused(case, tmp_path):
    proto, says = CASES[case]
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match="not a valid graph") as caught:
        load_graph(path)
    found = "\n".join(caught.value.problems)
    assert any(re.search(says, line) for line in caught.value.problems), found


def same_twice(proto):
    for owner in (proto, proto.graph.node[0]):
        for _ in range(2):
            owner.metadata_props.add(key="k", value="1")


NUMBERS = ["0", "00", "1_0", "0_0", "+0", " 0", "0 ", "0\n", "-0", "٠", "０", "²", "0x0", "0.0", "", "9" * 19]


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("place", ["initializer", "Constant"])
@pytest.mark.parametrize("text", NUMBERS)
def test_places_in_other_files_are_plain_digits(text, place, key, tmp_path):
    """Python reads most of these texts as a number, and C++ a part of some."""
    held = TensorProto(name="q.weight", data_type=1, dims=[8, 8], data_location=TensorProto.EXTERNAL)
    plain = {"location": "w.bin", "offset": "0", "length": str(W.nbytes)}
    value = text if key == "offset" else text.replace("0", plain["length"], 1)
    for name, said in (plain | {key: value}).items():
        held.external_data.add(key=name, value=said)
    node = helper.make_node("Constant", [], ["q.weight"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(held)
    in_node = place == "Constant"
    proto = model([node, PRODUCT, END], [constant("other")]) if in_node else model([PRODUCT, END], [held])
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    W.tofile(tmp_path / "w.bin")
    if value.isascii() and value.isdigit() and int(value) == int(plain[key]):
        assert np.array_equal(load_graph(path).graph.initializers["q.weight"].const_value.numpy(), W)
        return
    with pytest.raises(GraphError) as caught:
        load_graph(path)
    if not re.fullmatch("[0-9]{1,18}", value):
        assert any(f"the {key} is '" in problem for problem in caught.value.problems)


VALID = {
    "nodes in another order": model([END, PRODUCT]),
    "the same entry twice": changed(same_twice),
    "a function": model(called("F"), None, [function("F")]),
    "a function called like another domain's operator": model(called("Relu"), None, [function("Relu")]),
    "a branch": in_branch(lambda branch: None),
}


@pytest.mark.parametrize("case", VALID)
def test_what_has_one_meaning_is_read(case, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(VALID[case].SerializeToString())
    onnx.load(path)
    assert "q.weight" in load_graph(path).graph.initializers


TEXTS = ["q.weight", "MatMul", "/q/MatMul", "Relu", "own", "batch", "some text", "key", "said"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_not_utf8(text, tmp_path):
    """One flipped byte of a name, an operator, a domain, a dimension, a text, a metadata entry."""
    proto = model(called("F"), None, [function("F")])
    proto.graph.node.append(helper.make_node("Relu", ["h"], ["z"]))
    proto.graph.doc_string = "some text"
    proto.graph.node[0].metadata_props.add(key="key", value="said")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    good = proto.SerializeToString()
    assert text.encode() in good
    path = tmp_path / "m.onnx"
    path.write_bytes(good.replace(text.encode(), b"\xff" + text.encode()[1:]))
    with pytest.raises(GraphError, match="not a valid graph") as caught:
        load_graph(path)
    assert all("is not UTF-8" in problem for problem in caught.value.problems)
    path.write_bytes(good)
    load_graph(path)


def test_a_subgraph_that_refers_to_a_functions_attribute(tmp_path):
    """Outside of a function there is none."""
    branch = in_branch(lambda branch: None)
    attribute = branch.graph.node[1].attribute[0]
    attribute.ClearField("g")
    attribute.ref_attr_name = "own"
    path = tmp_path / "m.onnx"
    path.write_bytes(branch.SerializeToString())
    with pytest.raises(GraphError):
        load_graph(path)


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
def test_what_onnx_can_not_infer_is_no_traceback(verb, tmp_path, capfd):
    """It logs one; the shapes that the graph tells are left."""
    nodes = [
        PRODUCT,
        helper.make_node("Reshape", ["h", "sizes"], ["r"]),
        helper.make_node("Add", ["r", "h"], ["y"]),
    ]
    proto = model(nodes, [constant(), constant("sizes", np.array([3, 5, 7]))])
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    module = LoraModule("q", "linear", W[:4], W[:, :4], alpha=4, rank=4, tensor_names=("a", "b"))
    made = Adapter("a", "a", "peft", {module.key: module}, tensor_names=("a", "b"))
    adapter = save_adapter(made, tmp_path / "a")
    named = f"one={adapter}" if verb == "bank-onnx" else str(adapter)
    _run([verb, "--base", str(path), "--adapter", named, "-o", str(tmp_path / "o.onnx")], False)
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
    assert "inference" not in said.err + said.out


def test_the_other_name_of_onnx_own_domain(tmp_path):
    """ONNX Runtime reads it as the same; we read a graph without operators' version, "opset 0"."""
    made = model(opsets=(("ai.onnx", 20),))
    onnx.save(made, tmp_path / "m.onnx")
    assert load_graph(tmp_path / "m.onnx").model.opset_imports == {"": 20}
