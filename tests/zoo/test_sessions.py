"""Sessions that tests share: one for a graph that stays as it is, another for one that is written anew."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from sessions import session_of

X = np.arange(2, dtype=np.float32)


def write(path, by, external=False):
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "by"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.full(2, by, np.float32), "by")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    location = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=0)


@pytest.mark.parametrize("external", [False, True])
def test_each_content_has_its_own_session(external, tmp_path):
    path, seen = tmp_path / "m.onnx", []
    for by in (2.0, 3.0, 2.0):
        write(path, by, external)
        for _ in range(2):
            (got,) = session_of(path).run(None, {"x": X})
            np.testing.assert_array_equal(got, by * X)
            seen.append(session_of(path))
    assert seen[0] is seen[1] is seen[4]
    assert seen[2] is seen[3] is not seen[0]
    assert session_of(path, unoptimised=True) is not seen[0]


def test_another_file_beside_it_is_another_state(tmp_path):
    write(tmp_path / "m.onnx", 2.0)
    before = session_of(tmp_path / "m.onnx")
    (tmp_path / "weights.safetensors").write_bytes(b"1")
    assert session_of(tmp_path / "m.onnx") is not before
