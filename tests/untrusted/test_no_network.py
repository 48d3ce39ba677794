"""No verb asks the network for anything: in a process whose first attempt would be seen, hubs allowed."""

import json
import os
import subprocess
import sys

import pytest
import tiny

# Runs each command line of a list and prints what was asked of the network, and the exit codes.
SCRIPT = """
import json, socket, sys
asked = []
def refuse(*given, **more):
    asked.append(repr(given)[:200])
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
from lora_export.cli import _run
codes = [_run(line, False) for line in json.loads(sys.argv[1])]
print(json.dumps([codes, asked]))
"""
# What a config says of its base: PEFT and transformers would look it up.
HUB = "some-org/some-model-that-nobody-has"


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_no_verb_asks_the_network(arch, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny.save_checkpoint(arch, base)
    tiny.make_adapter(arch, adapter)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": HUB}))
    graph, swap = tmp_path / "base.onnx", tmp_path / "swap.onnx"
    lines = [
        ["inspect", adapter],
        ["merge", "--base", base, "--adapter", adapter, "-o", tmp_path / "merged"],
        ["capture-onnx", base, "-o", graph],
        ["merge-onnx", "--base", graph, "--adapter", adapter, "-o", tmp_path / "m.onnx"],
        ["swap-onnx", "--base", graph, "--adapter", adapter, "-o", swap],
        ["bank-onnx", "--base", graph, "--adapter", f"a={adapter}", "-o", tmp_path / "bank.onnx"],
        ["convert-adapter", adapter, "--for", swap, "-o", tmp_path / "a.safetensors"],
        ["merge-onnx", "--base", HUB, "--adapter", adapter, "-o", tmp_path / "no.onnx"],
        ["parity", "--reference", base, "--adapter", adapter, "--candidate", tmp_path / "m.onnx"],
        ["doctor"],
    ]
    hub = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    free = {name: value for name, value in os.environ.items() if name not in hub}
    texts = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, texts],
        env=free,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes, asked = json.loads(done.stdout.splitlines()[-1])
    wrong = lines.index(next(line for line in lines if HUB in line))
    assert [code for number, code in enumerate(codes[:-1]) if number != wrong] == [0] * (len(codes) - 2)
    assert codes[wrong] == 1
    assert asked == []
