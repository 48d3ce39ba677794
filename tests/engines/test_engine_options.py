"""What the user asks for is what the builder's configuration says."""

import json
import subprocess
import sys
from unittest.mock import MagicMock

import pytest

from lora_export.engines.record import BuildOptions
from lora_export.engines.tensorrt import TensorRTClassic

FLAGS = {
    "TF32": "tf32",
    "WEIGHT_STREAMING": "weight_streaming",
    "REFIT": "refit",
    "STRIP_PLAN": "strip_weights",
}
# In a process of its own: the package is not to be loaded into the tests'.
SCRIPT = """
import json, sys
import tensorrt_rtx as trt
from lora_export.engines.record import BuildOptions
from lora_export.engines.tensorrt_rtx import TensorRTRTX

class Quiet(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        pass

logger = Quiet()
builder = trt.Builder(logger)
config = builder.create_builder_config()
config.set_flag(trt.BuilderFlag.TF32)
options = BuildOptions(**json.loads(sys.argv[1]))
TensorRTRTX().configure(trt, config, options, ("8.9", "12.0"))
print(json.dumps({
    "flags": [name for name in sys.argv[2:] if config.get_flag(getattr(trt.BuilderFlag, name))],
    "level": config.builder_optimization_level,
    "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
    "gpus": [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)],
}))
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tf32": True, "optimization_level": 1, "workspace_bytes": 1 << 28},
        {"weight_streaming": True, "refit": True},
        {"strip_weights": True},
    ],
)
def test_tensorrt_rtx(options):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options), *FLAGS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["flags"] == [flag for flag, name in FLAGS.items() if options.get(name)]
    assert found["gpus"] == ["SM89", "SM120"]
    if "optimization_level" in options:
        assert found["level"] == options["optimization_level"]
        assert found["workspace"] == options["workspace_bytes"]


@pytest.mark.parametrize("on", [False, True])
def test_classic_tensorrt(on):
    trt, config = MagicMock(), MagicMock()
    names = {**FLAGS, "VERSION_COMPATIBLE": "version_compatible"}
    options = BuildOptions(**dict.fromkeys(names.values(), on), hardware_compatible=on)
    TensorRTClassic().configure(trt, config, options, ("8.7",))
    set_flags = [call.args[0] for call in config.set_flag.call_args_list]
    assert set_flags == ([getattr(trt.BuilderFlag, name) for name in names] if on else [])
    level = config.hardware_compatibility_level
    assert (level == trt.HardwareCompatibilityLevel.AMPERE_PLUS) is on
