"""Adapters in their trainers' names: a graph that was exposed for one takes that one, in every scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from scheme_bases import Family, State, converted, kohya, merged_state, modules_of, run, trained
from scheme_transformers import FAMILIES

from lora_export.runtimes.session import AdapterSession


def graph_of(state: State, path: Path) -> dict[str, np.ndarray]:
    """Write a graph that applies each matrix and kernel to an input of its own, as torch.onnx names it."""
    constants = [
        ir.Value(name=name, const_value=ir.tensor(v.numpy(), name=name)) for name, v in state.items()
    ]
    nodes, inputs, outputs, feeds = [], [], [], {}
    for number, weight in enumerate(value for value in constants if len(value.const_value.shape) > 1):
        scopes = {"pkg.torch.onnx.name_scopes": repr(["", weight.name.removesuffix(".weight"), "op"])}
        shape = (2, *map(int, weight.const_value.shape[1:]))
        x = ir.val(f"x{number}", ir.DataType.FLOAT, ["batch", *shape[1:]])
        if len(shape) > 2:
            made = [ir.node("Conv", [x, weight], metadata_props=scopes)]
        else:
            turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, metadata_props=scopes)
            made = [turned, ir.node("MatMul", [x, turned.outputs[0]], metadata_props=dict(scopes))]
        outputs.append(made[-1].outputs[0])
        outputs[-1].name, outputs[-1].type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
        nodes += made
        inputs.append(x)
        feeds[x.name] = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 20}, name="base"
    )
    ir.save(ir.Model(graph, ir_version=10), path)
    return feeds


def answers(state: State, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the products in float64."""
    weights = [
        values.double().numpy().reshape(len(values), -1) for values in state.values() if values.ndim > 1
    ]
    pairs = zip(feeds.values(), weights, strict=True)
    return [feed.reshape(len(feed), -1).astype(np.float64) @ weight.T for feed, weight in pairs]


@pytest.mark.parametrize("name", FAMILIES)
def test_exposed_converted_and_loaded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family: Family = FAMILIES[name]()
    state = family.random()
    pairs = trained(family, modules_of(family))
    base, swap, adapter, file = (
        tmp_path / leaf for leaf in ("base.onnx", "swap.onnx", "style.safetensors", "a.safetensors")
    )
    before = converted(family, state)
    feeds = graph_of(before, base)
    save_file(kohya(pairs), adapter)
    expected = answers(converted(family, merged_state(state, pairs)), feeds)
    assert any(np.abs(one - two).max() > 1 for one, two in zip(expected, answers(before, feeds), strict=True))
    assert run("swap-onnx", "--base", base, "--adapter", adapter, "-o", swap) == 0
    assert run("convert-adapter", adapter, "--for", swap, "-o", file) == 0
    session = ort.InferenceSession(swap, providers=["CPUExecutionProvider"])
    actual = session.run(None, {**feeds, **load_file(file)})
    with AdapterSession(swap, threads=1) as running:
        running.load_adapter("style", adapter)
        loaded = running.run(feeds, adapter="style")
    for number, right in enumerate(expected):
        np.testing.assert_allclose(actual[number].reshape(right.shape), right, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(loaded[f"y{number}"].reshape(right.shape), right, rtol=1e-4, atol=1e-3)
