"""Same inputs, same bytes: whatever the seed of hashes, threads, locale, time zone and folder."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

# What may differ between two runs, and has nothing to do with the inputs.
FIRST = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "LC_ALL": "C", "TZ": "UTC", "HOME": "/nonexistent"}
SECOND = {
    "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "2", "LC_ALL": "C.utf8", "TZ": "Asia/Tokyo", "HOME": "/tmp",
    "COLUMNS": "40", "NO_COLOR": "1",
}  # fmt: skip
SCRIPT = "import json, sys; from lora_export.cli import _run; "
SCRIPT += "sys.exit(max(_run(line, False) for line in json.loads(sys.argv[1])))"


def written(folder: Path, arch: str, adapters: list[Path], settings: dict[str, str]) -> dict[str, str]:
    """Run every verb that writes in a folder of its own; return the hash of each file that it wrote."""
    folder.mkdir(parents=True)
    one, two = adapters
    base, graph, swap = tiny.checkpoint(arch), folder / "base.onnx", folder / "swap.onnx"
    both = ["--adapter", one, "--weight", "0.5", "--adapter", two, "--weight", "0.25"]
    lines = [
        ["capture-onnx", base, "-o", graph],
        ["merge", "--base", base, *both, "-o", folder / "merged"],
        ["merge-onnx", "--base", graph, *both, "-o", folder / "merged.onnx"],
        ["swap-onnx", "--base", graph, "--adapter", one, "--adapter", two, "--pack", "-o", swap],
        [
            "bank-onnx",
            "--base",
            graph,
            "--adapter",
            f"a={one}",
            "--adapter",
            f"b={two}",
            "-o",
            folder / "b.onnx",
        ],
        ["convert-adapter", one, "--for", swap, "-o", folder / "one.safetensors"],
        ["convert-adapter", two, "--for", swap, "-o", folder / "two.onnx_adapter"],
    ]
    texts = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, texts], env=os.environ | settings, cwd=folder, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("arch", ["llama"])
def test_same_inputs_same_bytes(arch, tmp_path):
    adapters = [tiny.adapter(arch, seed=seed) for seed in (0, 1)]
    first = written(tmp_path / "a", arch, adapters, FIRST)
    second = written(tmp_path / "another" / "place", arch, adapters, SECOND)
    assert len(first) >= 12
    assert first == second
