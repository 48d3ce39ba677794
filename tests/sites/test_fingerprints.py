"""Where values may lie by fingerprints: at least where comparing all rows finds them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file
from small_graphs import adapter, delta, error, graph, linear, random, refusals, run, save

from lora_export import merge_onnx
from lora_export.graph.onnx_file import load_graph
from lora_export.sites.target import Target
from lora_export.sites.uses import find_uses
from lora_export.sites.values import content
from lora_export.sites.values.fingerprints import find_places

WIDTH = 96


def target(name, rows):
    return Target(key=f"{name}.weight", kind="linear", shape=(rows, WIDTH), action="merge", tensor_names=())


def dead_columns(*shape, seed):
    """Only a few columns hold anything: fingerprints of other columns are zero."""
    values = np.zeros(shape, np.float32)
    values[:, :3] = random(shape[0], 3, seed=seed)
    return values


def one_hot(*shape, seed):
    return np.eye(shape[1], dtype=np.float32)[np.random.default_rng(seed).permutation(shape[1])[: shape[0]]]


def outliers(*shape, seed):
    """As trained weights: a few columns are fifty times the others."""
    values = random(*shape, seed=seed)
    values[:, ::17] *= 50
    return values


def tiny(*shape, seed):
    return random(*shape, seed=seed) * np.float32(1e-30)


KINDS = {"random": random, "dead": dead_columns, "one hot": one_hot, "outliers": outliers, "tiny": tiny}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
def test_places_are_those_of_a_full_comparison(kind, transposed, tmp_path):
    """Whole, inside of a fused weight, and split over two constants; rows scaled, one of them by zero."""
    make = KINDS[kind]
    parts = {
        name: make(rows, WIDTH, seed=at)
        for at, (name, rows) in enumerate(zip("abcde", (40, 8, 8, 24, 40), strict=True))
    }
    scale = np.linspace(-2, 2, 40, dtype=np.float32)[:, None] + np.float32(0.01)
    scale[0] = 0
    stored = {
        "whole": parts["a"],
        "fused": np.vstack([parts["b"], parts["c"], parts["b"]]),
        "first": parts["d"][:16],
        "second": parts["d"][16:],
        "scaled": parts["e"] * scale,
    }
    lines = " ".join(
        f"y{at} = MatMul (x, {name}{'' if transposed else '_t'})" for at, name in enumerate(stored)
    )
    if not transposed:
        lines = " ".join(f"{name}_t = Transpose ({name})" for name in stored) + " " + lines
    outputs = ", ".join(f"float[B,N{at}] y{at}" for at in range(len(stored)))
    model = graph(
        f"g (float[B,{WIDTH}] x) => ({outputs}) {{ {lines} }}",
        {name: np.ascontiguousarray(values.T if transposed else values) for name, values in stored.items()},
    )
    uses = find_uses(load_graph(save(model, tmp_path)))
    targets = [target(name, len(values)) for name, values in parts.items()]
    found = find_places(uses, targets, lambda item: [parts[item.path]])
    for item in targets:
        wanted = parts[item.path]
        for use in uses:
            matrix = stored[str(use.root.name)]
            fused = len(matrix) >= len(wanted)
            expected = content.find_rows(matrix, wanted) if fused else content.find_rows(wanted, matrix)
            places = found[id(item)].get((id(use.root), use.transposed), [])
            assert set(expected) <= set(places), (item.path, use.root.name)
            if kind == "random":
                assert sorted(expected) == places
    by_name = {str(use.root.name): found for use in uses for found in [(id(use.root), use.transposed)]}
    assert found[id(targets[0])][by_name["whole"]] == [0]
    assert found[id(targets[1])][by_name["fused"]][-1] == 16
    assert 16 in found[id(targets[3])][by_name["second"]] or kind == "one hot"
    assert 0 in found[id(targets[4])][by_name["scaled"]]


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("saved", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_float_types_of_graph_and_checkpoint(stored, saved, tmp_path):
    """Values of 1e-6 lose bits in float16, and still it is the same weight."""
    weight = random(40, WIDTH, seed=1) * np.float32(1e-4)
    weight[:, ::3] *= np.float32(1e-2)
    other = random(40, WIDTH, seed=2) * np.float32(1e-4)
    kind = ir.tensor(weight.astype(stored)).dtype
    text = f"g (float[B,{WIDTH}] x) => (float[B,N] y) {{ v = Cast <to = 1> (c0) w = Cast <to = 1> (c1) "
    text += "t = Transpose (v) s = Transpose (w) a = MatMul (x, t) b = MatMul (x, s) y = Add (a, b) }"
    model = graph(text, {"c0": ir.tensor(other.astype(stored)), "c1": ir.tensor(weight.astype(stored))})
    base = save(model, tmp_path)
    (tmp_path / "c").mkdir()
    # A constant that no parameter explains may be a computed call (`sites.answers`).
    tensors = {"fc.weight": weight.astype(saved), "other.weight": other.astype(saved)}
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    report = merge_onnx(
        base, adapter(linear("fc", 40, WIDTH)), tmp_path / "m.onnx", checkpoint=tmp_path / "c", dry_run=True
    )
    assert [row.place for row in report.plan.rows] == ["c1"], kind


def test_equal_halves_that_are_stored_once_are_ambiguous(tmp_path):
    """The graph computes half of it and repeats the result: a change of one half would change both."""
    half = random(8, 8, seed=1)
    text = "g (float[B,8] x) => (float[B,N] y) { h = MatMul (x, c0) y = Concat <axis = 1> (h, h) }"
    base = save(graph(text, {"c0": np.ascontiguousarray(half.T)}), tmp_path)
    (tmp_path / "c").mkdir()
    save_file({"fc.weight": np.vstack([half, half])}, tmp_path / "c" / "model.safetensors")
    found = refusals(base, adapter(linear("fc", 16, 8)), tmp_path, checkpoint=tmp_path / "c")
    assert "ambiguous" in found["fc.weight"]


def test_many_modules_of_the_same_shape(tmp_path):
    """Each of 40 weights is found among 40 that differ from each other by a twentieth."""
    common = random(WIDTH, WIDTH, seed=99)
    weights = {f"m{at}": common + random(WIDTH, WIDTH, seed=at) * np.float32(0.05) for at in range(40)}
    order = np.random.default_rng(5).permutation(40)
    lines, x = [], "x"
    for place, at in enumerate(order):
        lines.append(f"h{place} = MatMul ({x}, c{at})")
        lines.append(f"n{place} = LpNormalization (h{place})")
        x = f"n{place}"
    text = f"g (float[B,{WIDTH}] x) => (float[B,N] y) {{ {' '.join(lines)} y = Identity ({x}) }}"
    base = save(
        graph(text, {f"c{at}": np.ascontiguousarray(weights[f"m{at}"].T) for at in range(40)}), tmp_path
    )
    (tmp_path / "c").mkdir()
    save_file({f"{name}.weight": w for name, w in weights.items()}, tmp_path / "c" / "model.safetensors")
    modules = [linear(f"m{at}", WIDTH, WIDTH, seed=at) for at in range(40)]
    report = merge_onnx(base, adapter(*modules), tmp_path / "m.onnx", checkpoint=tmp_path / "c")
    assert [row.place for row in report.plan.rows] == [f"c{at}" for at in range(40)]
    x64 = random(3, WIDTH, seed=7).astype(np.float64)
    given = x64.astype(np.float32)
    for at in order:
        x64 = x64 @ (weights[f"m{at}"] + delta(modules[at])).T
        x64 /= np.linalg.norm(x64, axis=-1, keepdims=True)
    assert error(run(tmp_path / "m.onnx", x=given)[0], x64) < 1e-5
