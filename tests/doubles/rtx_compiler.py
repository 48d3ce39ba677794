"""TensorRT-RTX as an oracle: does it build a graph, for a GPU that is not here?

Each build is a process of its own: what a builder does wrong takes its process with it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

INSTALLED = importlib.util.find_spec("tensorrt_rtx") is not None
BUILD = """
import sys
import tensorrt_rtx as trt
path, *capabilities = sys.argv[1:]
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
if not parser.parse(open(path, "rb").read(), path):
    sys.exit("; ".join(parser.get_error(number).desc() for number in range(parser.num_errors)))
config = builder.create_builder_config()
config.num_compute_capabilities = len(capabilities)
for number, capability in enumerate(capabilities):
    config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), number)
profile = builder.create_optimization_profile()
for number in range(network.num_inputs):
    tensor = network.get_input(number)
    print(tensor.name)
    shapes = [[size if dim < 0 else dim for dim in tensor.shape] for size in (1, 2, 4)]
    profile.set_shape(tensor.name, *shapes)
config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
sys.exit(0 if engine is not None and engine.nbytes else "no engine")
"""


def refusal(path: Path, *capabilities: str) -> str:
    """Return why the compiler builds no engine of a file; "" if it does."""
    return _build(path, capabilities).stderr


def engine_inputs(path: Path, *capabilities: str) -> set[str]:
    """Build an engine and return the names of its inputs."""
    done = _build(path, capabilities)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def _build(path: Path, capabilities: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILD, str(path), *(capabilities or ("8.9",))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # A warning is no refusal.
    done.stderr = (done.stderr or "no message") if done.returncode else ""
    return done


def ask(script: str) -> str:
    """Return what a script prints that imports the compiler."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout
