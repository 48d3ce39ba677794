"""Bits of bases whose products are long, and who reads a branch's result."""

import numpy as np
import pytest
from branch_cases import IN, OUT, X3, W, one, relu
from branch_graphs import (
    check_bits,
    check_swap,
    effective,
    lora,
    swapped,
    unoptimised,
)
from small_graphs import adapter, error, graph, random, run, save

R = random(2, 3, OUT, seed=10)


LONG = 600


LONG_W = random(48, LONG, seed=7) / LONG**0.5


LONG_X = random(5, LONG, seed=9)


FUSES_ADD = (
    "ONNX Runtime makes a Gemm of MatMul + Add for static shapes too, but not where the bias has rows of its "
    "own, as with a branch in it. Past K = 128 the sums' order shows: 6e-8 relative"
)


FUSES_SCALE = "ONNX Runtime folds a Mul behind MatMul into alpha, which the branch between them prevents"


# id: (rows of x, graph behind x, why the bits differ)
LONG_PRODUCTS = {
    "symbolic-3-D": ("a,b", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", ""),
    "symbolic-3-D-gelu": ("a,b", "z = MatMul (x, fc_weight) u = Add (z, fc_bias) y = Gelu (u)", ""),
    "symbolic-batch": ("a,5", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", ""),
    "no-bias": ("5", "y = MatMul (x, fc_weight)", ""),
    "gemm": ("a", "y = Gemm (x, fc_weight, fc_bias)", ""),
    "gemm-beta": ("a", "y = Gemm <alpha = 0.3, beta = 0.7> (x, fc_weight, fc_bias)", ""),
    "gemm-no-c-relu": ("a", "z = Gemm (x, fc_weight) y = Relu (z)", ""),
    "2-D": ("a", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", ""),
    "2-D-relu": ("a", "z = MatMul (x, fc_weight) u = Add (fc_bias, z) y = Relu (u)", ""),
    "static-3-D": ("1,5", "z = MatMul (x, fc_weight) y = Add (z, fc_bias)", FUSES_ADD),
    "scaled": (
        "a,b",
        "s = Constant <value_float = 0.3> () z = MatMul (x, fc_weight) y = Mul (z, s)",
        FUSES_SCALE,
    ),
}


def long_base(case, folder):
    rows, text, _ = LONG_PRODUCTS[case]
    x = LONG_X if "," not in rows else LONG_X[None]
    weights = {"fc.weight": LONG_W.T.copy()} | ({"fc.bias": random(48, seed=8)} if "fc_bias" in text else {})
    text = f"g (float[{rows},{LONG}] x) => (float[{'a,b,c'[: 2 * x.ndim - 1]}] y) {{ {text} }}"
    return save(graph(text, weights), folder), {"x": x}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.xfail(strict=True, reason=why) if why else ())
        for case, (_, _, why) in LONG_PRODUCTS.items()
    ],
)
def test_bits_of_long_products(case, tmp_path):
    base, feeds = long_base(case, tmp_path)
    out, _ = swapped(base, adapter(lora("fc", 48, LONG)))
    check_bits(run(base, **feeds), run(out, **feeds))


@pytest.mark.parametrize("case", LONG_PRODUCTS)
def test_bits_of_long_products_without_fusions(case, tmp_path):
    """What the graph says is the same to the bit; with fusions it is the same to rounding."""
    base, feeds = long_base(case, tmp_path)
    out, _ = swapped(base, adapter(lora("fc", 48, LONG)))
    check_bits(unoptimised(base, **feeds), unoptimised(out, **feeds))
    assert error(run(out, **feeds)[0], run(base, **feeds)[0]) < 2e-7


def test_several_readers_and_an_output(tmp_path):
    """The product is an output and has readers: all of them see the sum, under the names that they had."""
    text = one(
        "y = MatMul (x, fc_weight) u = Tanh (y) v = Relu (y) s = Add (u, y)",
        X3,
        "float[a,b,n] y, float[a,b,n] v, float[a,b,n] s",
    )
    base = save(graph(text, {"fc.weight": W.T.copy()}), tmp_path)

    def answer(modules):
        y = X3.astype(np.float64) @ effective(W, modules.get("fc")).T
        return [y, relu(y), np.tanh(y) + y]

    for dora in (False, True):
        check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": X3}, dora=dora)


def test_a_residual_behind_the_product(tmp_path):
    line = "z = MatMul (x, fc_weight) y = Add (r, z)"
    text = f"g (float[a,b,40] x, float[a,b,24] r) => (float[a,b,24] y) {{ {line} }}"
    base = save(graph(text, {"fc.weight": W.T.copy()}), tmp_path)
    check_swap(
        base,
        adapter(lora("fc", OUT, IN)),
        lambda modules: [X3.astype(np.float64) @ effective(W, modules.get("fc")).T + R],
        {"x": X3, "r": R},
    )
