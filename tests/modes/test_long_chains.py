"""Thousands of sums behind a product: no recursion, and no work that doubles with each."""

import time

import numpy as np
import onnx_ir as ir
import pytest
from branch_graphs import check_swap, lora
from small_graphs import adapter, delta, graph, random, save

from lora_export.modes.branches.ends import ends_of

X, W, BIAS = random(3, 8, seed=5), random(8, 8, seed=6), random(8, seed=7) / 100


def summed(count, ending="y = Identity(k{last})"):
    """Return a product with so many sums of a vector behind it, and what comes last."""
    sums = [f"k{number} = Add({f'k{number - 1}' if number else 'h'}, bias)" for number in range(count)]
    text = "\n".join(["h = MatMul(x, m_weight)", *sums, ending.format(last=count - 1)])
    weights = {"m.weight": W, "bias": BIAS, "scale": np.float32(1e-4), "zero": np.int16(0)}
    return graph(f"g (float[N,8] x) => (float[N,8] y) {{ {text} }}", weights)


@pytest.mark.parametrize("count", [1, 3, 3000])
def test_sums_of_vectors_behind_a_product(count, tmp_path):
    module = lora("m", 8, 8)

    def answer(modules):
        change = delta(modules["m"]).T if modules else 0
        return [X.astype(np.float64) @ (W + change) + count * BIAS.astype(np.float64)]

    check_swap(save(summed(count), tmp_path), adapter(module), answer, {"x": X}, tolerance=1e-4)


@pytest.mark.parametrize("count", [2, 30, 3000])
def test_the_value_behind_the_last_quantiser_is_the_end(count):
    """Found twice for each sum on the way, thirty sums took an hour."""
    rounded = "q = QuantizeLinear(k{last}, scale, zero)\n y = DequantizeLinear(q, scale, zero)"
    model = summed(count, rounded)
    product = next(node for node in model.graph if node.op_type == "MatMul").outputs[0]
    started = time.process_time()
    (end,) = ends_of(product, ir.DataType.FLOAT, past_bias=True)
    assert (end.value.name, end.is_output) == ("y", True)
    assert time.process_time() - started < 2
    (before,) = ends_of(product, ir.DataType.FLOAT, past_bias=False)
    assert before.value is product
