"""Sessions of tests have one thread, or as many as their options say; the options stay as they were."""

import onnxruntime as ort
import pytest
from small_graphs import graph, save


@pytest.mark.parametrize(("asked", "used"), [(None, 1), (0, 1), (2, 2)])
def test_threads(asked, used, tmp_path):
    path = save(graph("g (float[2] x) => (float[2] y) { y = Neg(x) }", {}), tmp_path)
    options = None
    if asked is not None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = asked
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert session.get_session_options().intra_op_num_threads == used
    assert options is None or options.intra_op_num_threads == asked
