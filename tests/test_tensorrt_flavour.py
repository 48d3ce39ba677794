"""Graphs of the flavour `tensorrt` are built by the real compiler, TensorRT-RTX, for a GPU that is not here.

Nothing here executes an engine: that needs a GPU that TensorRT-RTX supports.
"""

import subprocess
import sys

import pytest
import tiny
from test_swap_onnx import group

from lora_export import bank_onnx, swap_onnx

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")

# In a process of its own: what a builder does wrong takes its process with it.
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
profile = builder.create_optimization_profile()
for number in range(network.num_inputs):
    tensor = network.get_input(number)
    print(tensor.name)
    ranks, others = (1, 4, 8), (2, 2, 2)
    sizes = [ranks if ".lora_" in tensor.name else others if not axis else (4, 7, 9)
             for axis in range(len(tensor.shape))]
    shapes = [[size[at] if dim < 0 else dim for dim, size in zip(tensor.shape, sizes)] for at in range(3)]
    profile.set_shape(tensor.name, *shapes)
config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
sys.exit(0 if engine is not None and engine.nbytes else "no engine")
"""
GRAPHS = [
    ("swap", "llama", {}),
    ("swap", "bert", {"pack": True}),
    ("swap", "bert", {"fuse_base": True}),
    ("swap", "gpt2", {"dora": True}),
    ("swap", "conv", {}),
    ("bank", "llama", {"pack": True}),
    ("bank", "gpt2", {}),
    ("bank", "conv", {"resident": "inputs"}),
]


@pytest.mark.parametrize(
    ("mode", "arch", "options"),
    [pytest.param(*case, marks=group(case[1]), id="-".join([*case[:2], *case[2]])) for case in GRAPHS],
)
def test_it_is_built(mode, arch, options, tmp_path):
    """The engine has every LoRA tensor as an input: with a default it would be a constant, and the base."""
    base, out = tiny.base_onnx(arch, "dynamo"), tmp_path / "m.onnx"
    options = options | {"flavour": "tensorrt"}
    if arch == "conv":
        options["checkpoint"] = tiny.checkpoint(arch)
    if mode == "swap":
        report = swap_onnx(base, out, adapter=tiny.adapter(arch), **options)
        wanted = set(report.exposed.tensor_names())
    else:
        named = {"a": tiny.adapter(arch), "b": tiny.adapter(arch, "patterns", 1)}
        report = bank_onnx(base, named, out, **options)
        wanted = {"lora.adapter_weights"}
        wanted |= set(report.exposed.tensor_names()) if "resident" in options else set()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert wanted <= set(done.stdout.split())


@group("llama")
def test_the_other_flavour_would_be_the_base(tmp_path):
    """Why there are two: the parser takes an input with an initializer of its name for a constant."""
    report = swap_onnx(tiny.base_onnx("llama", "dynamo"), tmp_path / "m.onnx", adapter=tiny.adapter("llama"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path / "m.onnx")], capture_output=True, text=True, check=False
    )
    assert not set(report.exposed.tensor_names()) & set(done.stdout.split())
