"""What is captured with a cache, TensorRT-RTX builds in each dtype, with LoRA inputs and as a bank."""

import subprocess
import sys

import pytest
import tiny

from lora_export import bank_onnx, swap_onnx

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("llama")]

# In a process of its own: what a builder does wrong takes its process with it. The smallest cache is empty.
BUILD = """
import sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    sys.exit("; ".join(parser.get_error(number).desc() for number in range(parser.num_errors)))
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
batch, sequence, past, rank = (1, 1, 2), (1, 8, 64), (0, 16, 64), (0, 4, 8)
total = [s + p for s, p in zip(sequence, past)]
profile = builder.create_optimization_profile()
for number in range(network.num_inputs):
    tensor = network.get_input(number)
    sizes = {
        "attention_mask": (batch, total),
        "lora.adapter_weights": (batch, None),
    }.get(tensor.name, (batch, sequence))
    if tensor.name.startswith("past_key_values."):
        sizes = (batch, None, past, None)
    if ".lora_" in tensor.name:
        sizes = (rank, rank)
    shapes = [[size[at] if dim < 0 else dim for dim, size in zip(tensor.shape, sizes)] for at in range(3)]
    profile.set_shape(tensor.name, *shapes)
config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
kinds = {network.get_output(number).dtype.name for number in range(network.num_outputs)}
print(*kinds)
sys.exit(0 if engine is not None and engine.nbytes else "no engine")
"""


@pytest.mark.parametrize(
    ("mode", "dtype", "kind"),
    [
        ("swap", "float32", "FLOAT"),
        ("swap", "float16", "HALF"),
        ("swap", "bfloat16", "BF16"),
        ("bank", "float16", "HALF"),
    ],
)
def test_it_is_built(mode, dtype, kind, tmp_path):
    base, adapter, out = tiny.checkpoint("llama"), tiny.adapter("llama"), tmp_path / "m.onnx"
    options = {"dtype": dtype, "kv_cache": True, "flavour": "tensorrt"}
    if mode == "swap":
        swap_onnx(base, out, adapter=adapter, **options)
    else:
        bank_onnx(base, {"a": adapter, "b": tiny.adapter("llama", "patterns", 1)}, out, **options)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [kind]
