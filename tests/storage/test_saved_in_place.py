"""Files that somebody saves in place while they are read: always a message, never a process that dies.

``open(path, "wb")``, ``cp`` and ``torch.save`` cut a file to nothing and write it anew. A process that maps
it is killed by SIGBUS when it looks at a page that is not there any more.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from lora_export import AdapterError, CheckpointError, GraphError, InputChangedError, load_adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.formats.reading import tensors as reading
from lora_export.formats.reading.ort_file import read_ort_file, write_ort_file
from lora_export.graph.onnx_file import load_graph
from lora_export.parity.feeds.array_files import read_arrays
from lora_export.storage.inputs import same_inputs

# Several pages, so that each value has one that can go.
A = np.arange(4 * 3000, dtype=np.float32).reshape(4, 3000)
B = np.ones((2000, 4), np.float32)
FACTORS = {"fc.lora_A.weight": A, "fc.lora_B.weight": B}
SUFFIXES = (".safetensors", ".pt", ".onnx_adapter")


def write(path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(FACTORS, path)
    elif path.suffix == ".npz":
        np.savez(path, **FACTORS)
    elif path.suffix == ".pt":
        torch.save({name: torch.from_numpy(values) for name, values in FACTORS.items()}, path)
    else:
        write_ort_file(path, FACTORS, 1, only_this_base=False)
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the values of a file that is given as an adapter, or as feeds."""
    if path.suffix == ".npz" or "feeds" in path.name:
        return read_arrays(path)
    if path.suffix == ".onnx_adapter":
        return read_ort_file(path)[0]
    (module,) = load_adapter(path, alpha=4).modules.values()
    return {"fc.lora_A.weight": module.lora_a, "fc.lora_B.weight": module.lora_b}


def is_mapped(path: Path) -> bool:
    maps = Path("/proc/self/maps")
    return maps.exists() and str(path.resolve()) in maps.read_text()


@pytest.mark.parametrize("name", [*(f"a{suffix}" for suffix in SUFFIXES), "feeds.safetensors", "feeds.npz"])
def test_what_was_read_stays_though_its_file_is_cut(name, tmp_path):
    path = write(tmp_path / name)
    held = read(path)
    assert not is_mapped(path)
    os.truncate(path, 0)
    assert held.keys() == FACTORS.keys()
    for key, values in held.items():
        np.testing.assert_array_equal(values, FACTORS[key])


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1], ids=["empty", "header", "half", "whole"])
@pytest.mark.parametrize("name", ["a.safetensors", "feeds.safetensors"])
def test_a_file_cut_or_written_again_between_header_and_values(name, share, tmp_path, monkeypatch):
    path, own = write(tmp_path / name), reading.read_header

    def read_header(path):
        found = own(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        os.utime(path, ns=(1, 1))  # a moment later, which clocks of file systems may not tell
        return found

    monkeypatch.setattr(reading, "read_header", read_header)
    if name.startswith("feeds"):
        with pytest.raises(InputChangedError, match="changed while being read"):
            read(path)
    elif share == 1:  # an adapter is read again, and then nothing has changed
        for key, values in read(path).items():
            np.testing.assert_array_equal(values, FACTORS[key])
    else:
        with pytest.raises(AdapterError, match=r"is not a complete \.safetensors file"):
            read(path)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".bin", ".ckpt"])
def test_an_empty_file_is_the_users_error(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(AdapterError, match=path.name):
        load_adapter(path, alpha=4)


def test_arrays_made_for_onnxruntime_live_until_the_file_is_written(tmp_path):
    turned = {f"m{number}": np.full((300, 400), number, np.float32).T for number in range(40)}
    assert not any(values.flags.c_contiguous for values in turned.values())
    write_ort_file(tmp_path / "a.onnx_adapter", turned, 1, only_this_base=False)
    for name, values in read_ort_file(tmp_path / "a.onnx_adapter")[0].items():
        np.testing.assert_array_equal(values, turned[name])


# --- bases, which are mapped: what is found short is said ------------------------------------------------


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
    save_file({"fc.weight": A}, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def graph(folder: Path) -> Path:
    folder.mkdir()
    ends = [helper.make_tensor_value_info(name, 1, ["b", size]) for name, size in (("x", 4), ("y", 3000))]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(A, "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.data"


def opened(kind, folder):
    """Return a file with a base's values, and how to read them by what is open."""
    if kind == "checkpoint":
        data = checkpoint(folder)
        base = Checkpoint.open(folder)
        return data, lambda: base.read("fc.weight")
    data = graph(folder)
    (value,) = load_graph(folder / "m.onnx").initializers()
    return data, value.const_value.numpy if kind == "graph" else value.const_value.tobytes


@pytest.mark.parametrize("size", [0, 100, None])
@pytest.mark.parametrize("kind", ["checkpoint", "graph", "graph's bytes"])
def test_a_base_cut_before_its_values_are_looked_at(kind, size, tmp_path):
    def cut(data):
        data.unlink() if size is None else os.truncate(data, size)

    with same_inputs():
        data, values = opened(kind, tmp_path / "noted")
        cut(data)
        with pytest.raises(InputChangedError, match=data.name):
            values()
    shutil.rmtree(tmp_path / "noted")
    data, values = opened(kind, tmp_path / "alone")
    cut(data)
    with pytest.raises((CheckpointError, GraphError), match=r"can't be read|cannot read") as caught:
        values()
    assert data.name in str(caught.value)
