"""What quantize-onnx writes becomes engines that keep 4 or 8 bits; what TensorRT lacks is refused by name."""

from __future__ import annotations

import pytest
import tiny

from lora_export import build_engine, capture_onnx, quantize_onnx, swap_onnx
from lora_export.errors import EngineBuildError


@pytest.mark.parametrize(("to", "bits"), [("int4", 4), ("int8", 8)])
def test_a_quantised_capture_is_built(to, bits, tmp_path):
    base = tiny.checkpoint("llama")
    graph, _ = capture_onnx(base, tmp_path / "q.onnx", dtype="float16", kv_cache=True, quantize=to)
    report = build_engine(graph, "sm89", tmp_path / "engine")
    assert report.engines[0].path.stat().st_size > 0
    assert f"14 MatMulNBits of {bits} bits are DequantizeLinear (int{bits}) and MatMul now" in report.notes


def test_lora_over_quantised_weights_is_built(tmp_path):
    adapter, out = tiny.adapter("llama"), tmp_path / "swap.onnx"
    swap_onnx(
        tiny.checkpoint("llama"), out, adapter=adapter, flavour="tensorrt", dtype="float16", quantize="int4"
    )
    record = build_engine(out, "sm89", tmp_path / "engine").engines[0].record
    assert record.exposed is not None
    assert set(record.exposed.tensor_names()) <= {port.name for port in record.inputs}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"symmetric": False}, "asymmetric"),
        ({"method": "k-quant"}, "asymmetric"),
        ({"embeddings": True}, "GatherBlockQuantized"),
    ],
)
def test_what_tensorrt_lacks_is_refused_by_name(options, said, tmp_path):
    out = tmp_path / "q.onnx"
    quantize_onnx(tiny.base_onnx("llama", "dynamo"), out, **options)
    with pytest.raises(EngineBuildError, match="can't be built by TensorRT-RTX as it is") as caught:
        build_engine(out, "sm89", tmp_path / "engine")
    assert any(said in problem for problem in caught.value.problems)
