"""Files whose names are not UTF-8 are refused by name before anything is written."""

import os

import pytest
import tiny
from safetensors.numpy import save_file
from small_graphs import graph, random, save

from lora_export import AdapterError, CheckpointError, GraphError, load_adapter, merge_onnx
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.modes.merging.checkpoint_files import small_files

ODD = os.fsdecode(b"odd\xff")


@pytest.mark.parametrize("place", [f"{ODD}.txt", f"{ODD}/config.txt", f"sub/{ODD}"])
def test_a_file_of_a_base_folder(place, tmp_path):
    save_file({"q.weight": random(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "plain.txt").write_text("x")
    assert [str(path) for path in small_files(Checkpoint.open(tmp_path), set())[0]] == [
        "config.json",
        "plain.txt",
    ]
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("x")
    with pytest.raises(CheckpointError, match="1 files whose names are not UTF-8"):
        small_files(Checkpoint.open(tmp_path), set())


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_adapter(is_folder, tmp_path):
    tensors = {
        "base_model.model.q.lora_A.weight": random(2, 4),
        "base_model.model.q.lora_B.weight": random(4, 2),
    }
    place = tmp_path / ODD / "adapter_model.safetensors" if is_folder else tmp_path / f"{ODD}.safetensors"
    place.parent.mkdir(exist_ok=True)
    # The writer of safetensors takes no such name.
    save_file(tensors, tmp_path / "plain")
    (tmp_path / "plain").rename(place)
    if is_folder:
        (place.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(AdapterError, match=r"the name of the adapter .* is not UTF-8"):
        load_adapter(place.parent if is_folder else place, alpha=None if is_folder else 2)


def test_a_graph(tmp_path):
    base = save(
        graph("g (float[B,4] x) => (float[B,4] y) { y = MatMul (x, q_weight) }", {"q.weight": random(4, 4)}),
        tmp_path,
    )
    base.rename(tmp_path / f"{ODD}.onnx")
    with pytest.raises(GraphError, match=r"the name of the base .* is not UTF-8"):
        merge_onnx(tmp_path / f"{ODD}.onnx", tiny.adapter("llama"), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
