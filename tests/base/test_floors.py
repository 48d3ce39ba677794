"""Sizes are divided as Python divides them: ``//`` rounds down."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from lora_export.base.capture.capture import capture_module

MOST = 24


class Crop(torch.nn.Module):
    """The middle of a table, as SD 3 crops its positions: from ``(MOST - length) // 2`` on."""

    def forward(self, x):
        length = x.shape[1]
        table = torch.arange(float(MOST))
        top = (MOST - length) // 2
        return x + table[top : top + length]


class Mirror(torch.nn.Module):
    """A size from a negative one."""

    def forward(self, x):
        return x.sum() - ((-x.shape[1]) // 4)


@pytest.mark.parametrize("module", [Crop(), Mirror()])
def test_negative_sizes_are_rounded_down(module, tmp_path):
    dims = {"x": {1: torch.export.Dim("length", max=MOST)}}
    graph = capture_module(module, {"x": torch.randn(1, 6)}, tmp_path / "m.onnx", dynamic_shapes=dims)
    session = ort.InferenceSession(str(graph))
    for length in (*range(2, 12), MOST):
        x = torch.randn(1, length)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-6, atol=1e-6)
