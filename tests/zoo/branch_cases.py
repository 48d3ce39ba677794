"""What tests of branches share."""

import numpy as np
import torch
from small_graphs import HEAD, graph, random, save

OUT, IN = 24, 40


W, BIAS = random(OUT, IN, seed=7), random(OUT, seed=8)


X1, X2, X3, X4 = (random(*shape, IN, seed=9) for shape in ((), (5,), (2, 3), (2, 2, 3)))


CONTRIB = "com.microsoft."


RANKS = (1, 5)


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return torch.nn.functional.gelu(torch.tensor(x)).numpy()


def sizes(x):
    return ",".join(map(str, x.shape))


def one(text, x, out="float[a,b,n] y"):
    """A graph of one input and one output."""
    return f"g (float[{','.join('abcd'[: x.ndim - 1] + 'k')}] x) => ({out}) {{ {text} }}"


def gemm(attributes="transB = 1", more="", c=", fc_bias"):
    product = "y" if not more else "z"
    return one(f"{product} = Gemm <{attributes}> (x, fc_weight{c}) {more}", X2, "float[m,n] y")


# id: (graph, how the canonical (out, in) weight is stored, x, what it computes from it in float64)
T = np.transpose


LINEAR = {
    "vector": (
        "g (float[40] x) => (float[24] y) { y = MatMul (x, fc_weight) }",
        T,
        X1,
        lambda x, w, b: x @ w.T,
    ),
    "2-D": (one("y = MatMul (x, fc_weight)", X2, "float[a,n] y"), T, X2, lambda x, w, b: x @ w.T),
    "3-D": (one("y = MatMul (x, fc_weight)", X3), T, X3, lambda x, w, b: x @ w.T),
    "4-D": (one("y = MatMul (x, fc_weight)", X4, "float[a,b,c,n] y"), T, X4, lambda x, w, b: x @ w.T),
    "static": (
        f"g (float[{sizes(X3)}] x) => (float[2,3,24] y) {{ z = MatMul (x, fc_weight) y = Add (z, fc_bias) }}",
        T,
        X3,
        lambda x, w, b: x @ w.T + b,
    ),
    "transpose": (
        one("t = Transpose <perm = [1, 0]> (fc_weight) y = MatMul (x, t)", X3),
        np.asarray,
        X3,
        lambda x, w, b: x @ w.T,
    ),
    "cast": (
        one("t = Cast <to = 1> (fc_weight) y = MatMul (x, t)", X3),
        lambda w: w.T.astype(np.float16),
        X3,
        lambda x, w, b: x @ w.T,
    ),
    "cast-transpose": (
        one("c = Cast <to = 1> (fc_weight) t = Transpose <perm = [1, 0]> (c) y = MatMul (x, t)", X3),
        lambda w: w.astype(np.float16),
        X3,
        lambda x, w, b: x @ w.T,
    ),
    "bias": (
        one("z = MatMul (x, fc_weight) y = Add (z, fc_bias)", X3),
        T,
        X3,
        lambda x, w, b: x @ w.T + b,
    ),
    "bias-first": (
        one("z = MatMul (x, fc_weight) y = Add (fc_bias, z)", X2, "float[a,n] y"),
        T,
        X2,
        lambda x, w, b: x @ w.T + b,
    ),
    "bias-gelu": (
        one("z = MatMul (x, fc_weight) u = Add (z, fc_bias) y = Gelu (u)", X3),
        T,
        X3,
        lambda x, w, b: gelu(x @ w.T + b),
    ),
    "scale-softmax": (
        one(
            "z = MatMul (x, fc_weight) s = Constant <value_float = 0.3> () u = Mul (z, s) "
            "y = Softmax <axis = -1> (u)",
            X3,
        ),
        T,
        X3,
        lambda x, w, b: torch.softmax(torch.tensor(0.3 * (x @ w.T)), -1).numpy(),
    ),
    "fused-matmul": (
        one(f"y = {CONTRIB}FusedMatMul <transB = 1, alpha = 0.5> (x, fc_weight)", X3),
        np.asarray,
        X3,
        lambda x, w, b: 0.5 * (x @ w.T),
    ),
    "fused-matmul-straight": (
        one(f"y = {CONTRIB}FusedMatMul <alpha = -1.75> (x, fc_weight)", X3),
        T,
        X3,
        lambda x, w, b: -1.75 * (x @ w.T),
    ),
    "gemm": (gemm("transB = 0"), T, X2, lambda x, w, b: x @ w.T + b),
    "gemm-transB": (gemm(), np.asarray, X2, lambda x, w, b: x @ w.T + b),
    "gemm-alpha": (gemm("transB = 1, alpha = 0.3"), np.asarray, X2, lambda x, w, b: 0.3 * (x @ w.T) + b),
    "gemm-beta": (gemm("transB = 1, beta = 0.7"), np.asarray, X2, lambda x, w, b: x @ w.T + 0.7 * b),
    "gemm-alpha-beta": (
        gemm("transB = 1, alpha = -1.75, beta = 0.375"),
        np.asarray,
        X2,
        lambda x, w, b: -1.75 * (x @ w.T) + 0.375 * b,
    ),
    "gemm-no-c": (gemm("transB = 1, alpha = 0.3", c=""), np.asarray, X2, lambda x, w, b: 0.3 * (x @ w.T)),
    "gemm-empty-c": (gemm(c=", "), np.asarray, X2, lambda x, w, b: x @ w.T),
    "gemm-row-c": (gemm(c=", row"), np.asarray, X2, lambda x, w, b: x @ w.T + b),
    "gemm-column-c": (gemm(c=", column"), np.asarray, X2, lambda x, w, b: x @ w.T + X2[:, :1]),
    "gemm-scalar-c": (
        gemm("transB = 1, beta = 2.0", c=", scalar"),
        np.asarray,
        X2,
        lambda x, w, b: x @ w.T + 1,
    ),
    "gemm-relu": (gemm(more="y = Relu (z)"), np.asarray, X2, lambda x, w, b: relu(x @ w.T + b)),
    "gemm-tanh": (gemm(more="y = Tanh (z)"), np.asarray, X2, lambda x, w, b: np.tanh(x @ w.T + b)),
    "gemm-gelu": (gemm(more="y = Gelu (z)"), np.asarray, X2, lambda x, w, b: gelu(x @ w.T + b)),
    "fused-gemm": (
        one(
            f'y = {CONTRIB}FusedGemm <transB = 1, alpha = 0.3, beta = 0.7, activation = "Relu"> '
            "(x, fc_weight, fc_bias)",
            X2,
            "float[m,n] y",
        ),
        np.asarray,
        X2,
        lambda x, w, b: relu(0.3 * (x @ w.T) + 0.7 * b),
    ),
    "loop": (
        "g (float[a,40] x, int64 n) => (float[a,40] y) { on = Constant <value = bool {1}> () "
        "y = Loop (n, on, x) <body = b (int64 i, bool k, float[a,40] u) => (bool k2, float[a,40] v) "
        "{ k2 = Identity (k) s = MatMul (u, fc_weight) v = Tanh (s) }> }",
        T,
        X2,
        lambda x, w, b: np.tanh(np.tanh(np.tanh(x @ w.T) @ w.T) @ w.T),
    ),
}


CONSTANTS = {
    "fc_bias": ("fc.bias", BIAS),
    "row": ("row", BIAS[None]),
    "column": ("column", X2[:, :1]),
    "scalar": ("scalar", np.array(0.5, np.float32)),
}


def linear_base(case, folder, dtype=np.float32, head=HEAD):
    """Return the base, its canonical weight and its inputs."""
    text, store, x, _ = LINEAR[case]
    weight = random(IN, IN, seed=7) / 5 if case == "loop" else W
    stored = np.ascontiguousarray(store(weight))
    weight = weight.astype(stored.dtype)
    weights = {"fc.weight": stored} | dict(value for name, value in CONSTANTS.items() if name in text)
    feeds = {"x": x} | ({"n": np.array(3)} if case == "loop" else {})
    return save(graph(text, weights, head=head), folder), weight, feeds


def conv_base(folder, channels, out_dim, kernel, attributes, groups=1, bias=True, behind=None):
    """Return the base, its weight and bias, and x."""
    if groups > 1:
        attributes = f"group = {groups}, {attributes}".rstrip(", ")
    weight = random(out_dim, channels // groups, *kernel, seed=7)
    values = random(out_dim, seed=8) if bias else None
    x = random(2, channels, *(9, 8, 7)[: len(kernel)], seed=9)
    axes = ",".join("nchwd"[: x.ndim])
    call = f"Conv <{attributes}>" if attributes else "Conv"
    text = f"g (float[{sizes(x)}] x) => (float[{axes}] y) {{ " + (
        f"{'z' if behind else 'y'} = {call} (x, c_weight{', c_bias' if bias else ''}) {behind or ''} }}"
    )
    weights = {"c.weight": weight} | ({"c.bias": values} if bias else {})
    return save(graph(text, weights), folder), weight, values, x
