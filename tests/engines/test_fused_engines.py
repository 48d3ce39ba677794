"""Graphs with one Attention node a layer become engines, with LoRA beside q, k, v and o as well."""

from __future__ import annotations

import pytest
import tiny

from lora_export import build_engine, capture_onnx, swap_onnx


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_is_built(dtype, tmp_path):
    """No kernel of TensorRT-RTX has heads of 16 in float32: it may write the operator out."""
    base = tiny.checkpoint("llama")
    graph, _ = capture_onnx(base, tmp_path / "base.onnx", dtype=dtype, kv_cache=True, fused=True)
    report = build_engine(graph, "sm89", tmp_path / "base")
    assert report.engines[0].path.stat().st_size > 0
    swap_onnx(graph, tmp_path / "swap.onnx", adapter=tiny.adapter("llama"))
    report = build_engine(tmp_path / "swap.onnx", "sm89", tmp_path / "swap")
    record = report.engines[0].record
    assert record.exposed is not None
    assert set(record.exposed.tensor_names()) <= {port.name for port in record.inputs}
