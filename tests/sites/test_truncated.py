"""A weight of floats that the graph makes whole numbers is no weight that an adapter is added to."""

import numpy as np
import pytest
from small_graphs import adapter, error, graph, linear, random, refusals, run, save

from lora_export import SiteError, bank_onnx, merge_onnx, swap_onnx

SIZE = 8
W = random(SIZE, SIZE, seed=4)
# Cast's numbers: FLOAT16 10, BFLOAT16 16, DOUBLE 11; INT8 3, INT32 6, INT64 7, BOOL 9.
WHOLE = {"INT8": 3, "INT32": 6, "INT64": 7, "BOOL": 9}


def model_of(to, tmp_path):
    text = f"a = Cast <to = {to}> (q_weight) b = Cast <to = 1> (a) y = MatMul (x, b)"
    return save(graph(f"g (float[B,8] x) => (float[B,8] y) {{ {text} }}", {"q.weight": W.T.copy()}), tmp_path)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name, tmp_path):
    base, given = model_of(WHOLE[name], tmp_path), adapter(linear("q", SIZE, SIZE))
    (reason,) = refusals(base, given, tmp_path).values()
    assert f"whole numbers (Cast to {name})" in reason
    for make in (
        lambda out: swap_onnx(base, out, adapter=given),
        lambda out: bank_onnx(base, {"one": given}, out),
    ):
        with pytest.raises(SiteError) as caught:
            make(tmp_path / "out.onnx")
        assert "whole numbers" in str(caught.value.problems)


@pytest.mark.parametrize("to", [10, 11, 16])
def test_floats_of_other_widths_are_the_weight(to, tmp_path):
    base, module = model_of(to, tmp_path), linear("q", SIZE, SIZE)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    x = random(SIZE, SIZE, seed=9)
    wanted = x.astype(np.float64) @ (W + module.scaling * module.lora_b @ module.lora_a).T
    assert error(run(tmp_path / "m.onnx", x=x)[0], wanted) < 1e-2
