"""Adapters in their trainers' names: a graph that was exposed for one takes that one, in every scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProtocol, helper, numpy_helper
from safetensors.numpy import load_file
from safetensors.torch import save_file
from scheme_bases import Family, State, converted, kohya, merged_state, modules_of, run, trained
from scheme_transformers import FAMILIES

from lora_export.runtimes.session import AdapterSession


def graph_of(state: State, path: Path) -> dict[str, np.ndarray]:
    """Write a graph that multiplies an input of its own with each matrix, as torch.onnx names it."""
    nodes, inputs, outputs, feeds = [], [], [], {}
    matrices = {name: values for name, values in state.items() if values.ndim == 2}
    for number, (name, values) in enumerate(matrices.items()):
        rows, cols = values.shape
        nodes.append(helper.make_node("Transpose", [name], [f"t{number}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"t{number}"], [f"y{number}"]))
        for node in nodes[-2:]:
            scopes = repr(["", name.removesuffix(".weight"), "op"])
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        inputs.append(helper.make_tensor_value_info(f"x{number}", TensorProtocol.FLOAT, ["batch", cols]))
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProtocol.FLOAT, ["batch", rows]))
        feeds[f"x{number}"] = np.random.default_rng(number).standard_normal((2, cols)).astype(np.float32)
    constants = [numpy_helper.from_array(values.numpy(), name) for name, values in state.items()]
    graph = helper.make_graph(nodes, "base", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return feeds


def answers(state: State, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the products in float64."""
    matrices = [values.double().numpy() for values in state.values() if values.ndim == 2]
    return [feed @ matrix.T for feed, matrix in zip(feeds.values(), matrices, strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_exposed_converted_and_loaded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family: Family = FAMILIES[name]()
    state = family.random()
    pairs = trained(family, [p for p in modules_of(family) if len(family.shapes[f"{p}.weight"]) == 2])
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
        np.testing.assert_allclose(actual[number], right, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(loaded[f"y{number}"], right, rtol=1e-4, atol=1e-4)
