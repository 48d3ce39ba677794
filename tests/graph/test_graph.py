"""Reading damaged files, external data in all its forms, and the size that protobuf can hold."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graphs import Huge, adapter, constants, delta, error, graph, linear, random, run, save

from lora_export import GraphError, merge_onnx
from lora_export.graph.onnx_file import byte_size, load_graph, matrix_shape, save_graph

TEXT = "g (float[B,64] x) => (float[B,N] y) { h = MatMul (x, a_weight) y = MatMul (h, b_weight) }"
WEIGHTS = {"a.weight": random(64, 32), "b.weight": random(32, 16, seed=1)}
X = random(3, 64, seed=9)


@pytest.fixture
def base(tmp_path):
    """A graph whose two weights lie in `base.data`."""
    folder = tmp_path / "base"
    folder.mkdir()
    path = folder / "base.onnx"
    ir.save(graph(TEXT, WEIGHTS), path, external_data="base.data")
    assert run(path, x=X)
    return path


def relocate(path, **entries):
    """Change where every constant of a file says its data is; None takes an entry away."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        kept = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in kept.items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))
    onnx.save(model, path)


def problems(path):
    with pytest.raises(GraphError) as refused:
        load_graph(path)
    return refused.value.problems


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(GraphError, match="no ONNX file"):
        load_graph(tmp_path / "nothing.onnx")
    with pytest.raises(GraphError, match="is a folder, not an ONNX file"):
        load_graph(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not onnx at all, just words", b"\x00" * 64, b'{"a": 1}', b"\x08"])
def test_not_an_onnx_file(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"not a readable ONNX file|holds no nodes"):
        load_graph(path)


def test_truncated_protobuf(tmp_path):
    """Wherever it is cut: an error, or a graph that has everything that its nodes read."""
    whole = save(graph(TEXT, WEIGHTS), tmp_path).read_bytes()
    refused = 0
    for length in range(0, len(whole), len(whole) // 40):
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[:length])
        try:
            load_graph(path)
        except GraphError:
            refused += 1
            continue
        raise AssertionError(f"read from {length} of {len(whole)} bytes")
    assert refused > 40


def test_missing_data_file_lists_every_tensor(base):
    (base.parent / "base.data").unlink()
    found = problems(base)
    assert [line.split(":")[0] for line in found] == ["a.weight", "b.weight"]
    assert all("'base.data' does not exist" in line for line in found)


def test_short_data_file(base):
    data = base.parent / "base.data"
    data.write_bytes(data.read_bytes()[:-1])
    (line,) = problems(base)
    assert line.startswith("b.weight")
    assert f"which has {data.stat().st_size}" in line


@pytest.mark.parametrize("location", ["../base.data", "sub/../../base.data"])
def test_data_outside_the_folder(base, location):
    (base.parent.parent / "base.data").write_bytes((base.parent / "base.data").read_bytes())
    relocate(base, location=location)
    assert len(problems(base)) == 2
    assert "outside the model's folder" in problems(base)[0]


def test_absolute_location(base):
    relocate(base, location=base.parent / "base.data")
    assert len(problems(base)) == 2
    assert "outside the model's folder" in problems(base)[0]


def test_offset_beyond_the_file(base):
    relocate(base, offset=1 << 40)
    assert len(problems(base)) == 2
    assert "which has" in problems(base)[0]


def test_negative_offset(base):
    relocate(base, offset=-4096)
    with pytest.raises(GraphError, match="negative"):
        load_graph(base)


def test_length_unlike_the_shape(base):
    relocate(base, length=100)
    found = problems(base)
    assert len(found) == 2
    assert "states 100 bytes" in found[0]
    assert str(64 * 32 * 4) in found[0]


def test_external_data_in_a_subfolder_without_length(base, tmp_path):
    (base.parent / "sub").mkdir()
    (base.parent / "base.data").rename(base.parent / "sub" / "w.bin")
    relocate(base, location="sub/w.bin", length=None)
    module = linear("a", 32, 64)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (WEIGHTS["a.weight"] + delta(module).T) @ WEIGHTS["b.weight"]
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_loading_reads_no_weights(base):
    loaded = load_graph(base)
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in loaded.initializers())
    assert all(v.const_value.raw is None for v in loaded.initializers())


def constant_node_model(folder):
    """A Constant node whose value lies in another file, which ONNX allows as well."""
    folder.mkdir()
    weight = random(64, 32, seed=3)
    (folder / "c.data").write_bytes(weight.tobytes())
    text = "g (float[B,64] x) => (float[B,N] y) { [n] y = MatMul (x, fc_weight) }"
    proto = ir.to_proto(graph(text, {"fc.weight": weight}))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="c.data")
    node = onnx.helper.make_node("Constant", [], ["fc.weight"], name="const")
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    proto.graph.node.insert(0, node)
    del proto.graph.initializer[:]
    proto.graph.node[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'fc', 'op']")
    onnx.save(proto, folder / "base.onnx")
    return folder / "base.onnx", weight


def test_external_data_of_a_constant_node(tmp_path):
    """Merged into another folder, the graph must not go on to refer to the base's file."""
    path, weight = constant_node_model(tmp_path / "base")
    module = linear("fc", 32, 64)
    merge_onnx(path, adapter(module), tmp_path / "out" / "m.onnx")
    wanted = X.astype(np.float64) @ (weight + delta(module).T)
    assert error(run(tmp_path / "out" / "m.onnx", x=X)[0], wanted) < 2e-6
    (tmp_path / "base" / "c.data").unlink()
    assert len(problems(path)) == 1
    assert run(tmp_path / "out" / "m.onnx", x=X)


def test_constants_of_a_branch_without_nodes(tmp_path):
    """A branch may hold nothing but a constant, here in the base's data file."""
    text = """g (float[B,64] x, bool c) => (float[B,32] y) {
        w = If (c) < then_branch = t () => (float[64,32] p) { p = Constant <value = float {0}> () },
                     else_branch = e () => (float[64,32] q) { q = Constant <value = float {0}> () } >
        h = MatMul (x, w) y = MatMul (h, fc_weight) }"""
    model = graph(text, {"fc.weight": random(32, 32)})
    values = {}
    for name, at in (("then_branch", 4), ("else_branch", 5)):
        branch = next(n for n in model.graph if n.op_type == "If").attributes[name].as_graph()
        (node,) = list(branch)
        values[name] = random(64, 32, seed=at)
        new = ir.Value(
            name=branch.outputs[0].name,
            shape=ir.Shape([64, 32]),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(values[name]),
        )
        branch.outputs[0] = new
        branch.remove(node)
        branch.register_initializer(new)
    (tmp_path / "base").mkdir()
    base = tmp_path / "base" / "base.onnx"
    ir.save(model, base, external_data="base.data")
    assert len(list(load_graph(base).initializers())) == 3
    module = linear("fc", 32, 32)
    merge_onnx(base, adapter(module), tmp_path / "out" / "m.onnx")
    fc = constants(base)["fc.weight"] + delta(module).T
    for flag, name in ((True, "then_branch"), (False, "else_branch")):
        (got,) = run(tmp_path / "out" / "m.onnx", x=X, c=np.array(flag))
        assert error(got, X.astype(np.float64) @ values[name] @ fc) < 2e-6


def test_a_graph_that_protobuf_cannot_hold(tmp_path, monkeypatch):
    model = graph(TEXT, WEIGHTS)
    monkeypatch.setattr(ir, "to_proto", lambda model: Huge())
    with pytest.raises(GraphError, match="2 GB"):
        save_graph(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_the_same_bytes_twice(tmp_path):
    model = graph(TEXT, WEIGHTS)
    model.metadata_props.update({f"key{n}": "v" for n in range(20)})
    save_graph(model, tmp_path / "one.onnx")
    again = graph(TEXT, WEIGHTS)
    again.metadata_props.update({f"key{n}": "v" for n in reversed(range(20))})
    save_graph(again, tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    got = run(tmp_path / "one.onnx", x=X)[0]
    assert error(got, X.astype(np.float64) @ WEIGHTS["a.weight"] @ WEIGHTS["b.weight"]) < 2e-6


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "INT4", "UINT4", "BOOL"])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), ()])
def test_byte_size_is_what_onnx_stores(kind, shape):
    dtype = ir.DataType[kind]
    tensor = ir.Tensor(np.zeros(shape, dtype.numpy()), dtype=dtype)
    assert byte_size(tensor) == len(ir.to_proto(tensor).raw_data)


def test_matrix_shape():
    assert matrix_shape((3, 4, 5)) == (3, 20)
    assert matrix_shape((3, 4, 5), stacked=True) == (12, 5)
    assert matrix_shape((7,)) == (7, 1)
    assert matrix_shape(()) == (1, 1)
