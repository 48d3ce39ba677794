"""What a capture says that it takes, before it starts, and what this machine has no room for."""

import shutil
from collections import namedtuple

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from lora_export.base.capture import capture, estimate
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.errors import CheckpointError, OutputError
from lora_export.machines import memory

pytestmark = pytest.mark.xdist_group("llama")
Memory = namedtuple("Memory", "total available free", defaults=(0, 0))


@pytest.fixture(autouse=True)
def every_model_is_estimated(monkeypatch):
    monkeypatch.setattr(estimate, "_SMALL_BYTES", 0)


def machine(monkeypatch, total, free):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(total, free))
    monkeypatch.setattr(psutil, "swap_memory", lambda: Memory(0, 0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_what_the_weights_have_in_the_dtype(dtype, tmp_path):
    folder = tiny.checkpoint("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    stored = load_file(folder / "model.safetensors")
    named = {name: value for name, value in model.state_dict().items() if name in stored}
    found = estimate.estimate_capture(folder, dtype, in_outline=True)
    assert found.written == sum(value.nbytes for value in named.values())
    graph = capture_checkpoint(folder, tmp_path / "m.onnx", dtype=dtype, proven=False)
    data = graph.with_name("m.onnx.data").stat().st_size
    assert found.written == pytest.approx(data, rel=0.2)
    assert estimate.estimate_capture(folder, dtype, in_outline=True, shares_weights=True).written == 0


def test_files_that_only_torch_reads_are_estimated_by_their_size(tmp_path):
    folder = shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    size = (folder / "pytorch_model.bin").stat().st_size
    assert estimate.estimate_capture(folder, "float16", in_outline=False).written == size


def test_a_loaded_model_takes_its_weights_twice():
    found = [
        estimate.estimate_capture(tiny.checkpoint("llama"), "float32", in_outline=o) for o in (True, False)
    ]
    assert found[1].memory - estimate._PACKAGES_BYTES == 2 * found[1].written
    assert found[0].memory < found[1].memory
    assert found[0].seconds < found[1].seconds


@pytest.mark.parametrize(("trace", "way_out"), [("loaded", "--trace loaded"), ("outline", "more memory")])
def test_more_than_all_memory_is_refused_before_anything_is_loaded(trace, way_out, tmp_path, monkeypatch):
    machine(monkeypatch, total=300 << 20, free=200 << 20)
    monkeypatch.setattr(capture, "_loaded", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(capture, "_in_outline", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(CheckpointError, match="this machine has 315 MB") as caught:
        capture_checkpoint(tiny.checkpoint("llama"), tmp_path / "m.onnx", trace=trace)
    assert way_out in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_container_has_what_it_is_given(tmp_path, monkeypatch):
    machine(monkeypatch, total=64 << 30, free=32 << 30)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMIT", limit)
    assert memory.memory_here() == (64 << 30, 32 << 30)
    limit.write_text("max\n")
    assert memory.memory_here() == (64 << 30, 32 << 30)
    limit.write_text(f"{100 << 20}\n")
    assert memory.memory_here() == (100 << 20, 100 << 20)
    with pytest.raises(CheckpointError, match="this machine has 105 MB"):
        capture_checkpoint(tiny.checkpoint("llama"), tmp_path / "m.onnx", trace="loaded")


def test_memory_that_others_have_now_is_said_and_not_refused(tmp_path, monkeypatch):
    machine(monkeypatch, total=64 << 30, free=100 << 20)
    told = []
    monkeypatch.setattr(estimate, "tell_stage", told.append)
    capture_checkpoint(tiny.checkpoint("llama"), tmp_path / "m.onnx", proven=False)
    assert "only 105 MB of memory is free" in told[0]
    assert str(tiny.checkpoint("llama")) in told[0]


@pytest.mark.parametrize("trace", ["loaded", "outline"])
def test_a_full_disk_is_refused_before_anything_is_traced(trace, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, 1))
    monkeypatch.setattr(capture, "_loaded", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(capture, "_in_outline", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(OutputError, match="0 MB free"):
        capture_checkpoint(tiny.checkpoint("llama"), tmp_path / "m.onnx", trace=trace)
    assert not list(tmp_path.iterdir())
