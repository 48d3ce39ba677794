"""Arguments and files that once ended as an internal error are refused, or taken, as what they are."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from lora_export import check_parity, load_adapter
from lora_export.binding import cast
from lora_export.cli import root


@pytest.fixture
def graph(tmp_path):
    """Multiplies by the identity."""
    inputs, outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [inputs], [outputs], weights),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("named", [["a"], 3, {"a": "b"}, True, None, ""])
def test_a_base_that_is_not_named_by_a_text(named, tmp_path):
    start = "base_model.model.m.lora_"
    factors = {
        f"{start}A.weight": np.ones((2, 4), np.float32),
        f"{start}B.weight": np.ones((4, 2), np.float32),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": named}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert load_adapter(tmp_path).base_model is None


@pytest.mark.parametrize("factor", [1e150, 1e200, 1e300])
def test_saved_values_whose_squares_are_infinite(factor, graph, tmp_path):
    x = np.random.default_rng(0).random((3, 4), np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "saved.npz", y=x.astype(np.float64) * factor)
    report = check_parity(tmp_path / "saved.npz", graph, feeds=tmp_path / "x.npz")
    assert not report.passed


@pytest.mark.parametrize("output", [".", "/", "..", ""])
def test_a_converted_adapter_that_is_a_folder(output, graph):
    arguments = ["convert-adapter", "missing", "--for", str(graph), "--format", "safetensors", "-o", output]
    result = CliRunner().invoke(root, arguments)
    assert result.exit_code in (1, 2)
    assert "Internal error" not in result.output
    assert not isinstance(result.exception, ValueError)


@pytest.mark.parametrize("option", ["--report", "--plot"])
def test_a_report_that_is_the_root_folder(option, graph):
    result = CliRunner().invoke(root, ["bench", str(graph), option, "/"])
    assert result.exit_code in (1, 2)
    assert not isinstance(result.exception, StopIteration)


def test_losses_are_measured_in_blocks_as_in_one(monkeypatch):
    values = np.random.default_rng(0).standard_normal((40, 50)) * np.float64(10.0) ** np.linspace(-12, 2, 50)
    found = []
    for block in (7, 1 << 18):
        monkeypatch.setattr(cast, "_BLOCK", block)
        caster = cast.Caster()
        caster.vector(values.astype(np.float32), np.dtype(np.float16), "v", scaling=2.0**-12)
        found.append(caster.losses)
    (one,), (whole,) = found
    exact = values.astype(np.float32) * np.float32(2.0**-12)
    assert (one.changed, one.lost) == (whole.changed, whole.lost)
    assert one.lost == np.count_nonzero((exact != 0) & (exact.astype(np.float16) == 0))
    np.testing.assert_allclose(
        [one.error_squared, one.delta_squared], [whole.error_squared, whole.delta_squared], rtol=1e-12
    )
