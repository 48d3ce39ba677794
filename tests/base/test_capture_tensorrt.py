"""What is captured with a cache, TensorRT-RTX builds: with LoRA inputs, as a bank, in two phases."""

import pytest
import tiny

from lora_export import ProfileRequest, bank_onnx, build_engine, swap_onnx

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("llama")]


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("swap", "float32"), ("swap", "float16"), ("swap", "bfloat16"), ("bank", "float16")],
)
def test_it_is_built(mode, dtype, tmp_path):
    base, adapter, out = tiny.checkpoint("llama"), tiny.adapter("llama"), tmp_path / "m.onnx"
    options = {"dtype": dtype, "kv_cache": True, "flavour": "tensorrt"}
    if mode == "swap":
        swap_onnx(base, out, adapter=adapter, **options)
    else:
        bank_onnx(base, {"a": adapter, "b": tiny.adapter("llama", "patterns", 1)}, out, **options)
    phases = [ProfileRequest("prefill"), ProfileRequest("decode")]
    # The smallest cache is empty, and so is the smallest adapter.
    shapes = {"batch": "1:1:2"} | ({"rank": "0:4:8"} if mode == "swap" else {})
    record = build_engine(out, "sm89", tmp_path / "out", profiles=phases, shapes=shapes).engines[0].record
    assert {port.dtype for port in record.outputs} == {dtype}
    prefill, decode = record.profiles
    key = "past_key_values.0.key"
    assert (prefill.shapes[key][2][2], decode.shapes[key][0][2]) == (0, 1)
    assert decode.shapes["input_ids"][2] == (2, 1)
    if mode == "swap":
        assert decode.shapes[record.exposed.modules[0].lora_a][0][1] == 0
