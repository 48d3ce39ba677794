"""`capture-onnx` writes a checkpoint's graph and its data, or nothing; what can't be captured is said."""

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from lora_export import CheckpointError, OutputError, capture_onnx, merge_onnx, swap_onnx
from lora_export.cli import _run
from lora_export.graph.onnx_file import load_graph
from lora_export.modes import capture_onnx as mode

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bert")]
HEAD = "classifier."


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(tiny.checkpoint("bert"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change(folder, **changes):
    """Change the config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop(folder, beginning):
    """Remove weights by the beginning of their names; return these."""
    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if name.startswith(beginning)]
    kept = {name: values for name, values in tensors.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return sorted(gone)


def test_the_graph_is_the_checkpoints(tmp_path, folder, capsys):
    out = folder / "model.onnx"  # beside the weights, which stay
    before = sorted(path.name for path in folder.iterdir())
    assert _run(["capture-onnx", str(folder), "-o", str(out)], False) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*before, "model.onnx", "model.onnx.data"]
    )
    answer = tiny.run(out, tiny.feeds("bert", out))
    assert tiny.relative_error(answer, tiny.base_reference("bert")) < 2e-6
    assert _run(["capture-onnx", str(folder), "-o", str(out)], False) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("write", [merge_onnx, swap_onnx])
def test_values_are_compared_with_the_folder_that_was_captured(write, tmp_path, folder):
    adapter = {"adapters" if write is merge_onnx else "adapter": tiny.adapter("bert")}
    report = write(folder, output=tmp_path / "out.onnx", dry_run=True, **adapter)
    assert {row.proof for row in report.plan.placed} == {"values"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "graph", "folder/"])
def test_a_name_that_is_no_graphs(name, folder):
    before = (folder / "config.json").read_bytes()
    with pytest.raises(OutputError, match=r"does not end in \.onnx"):
        capture_onnx(folder, folder / name, force=True)
    assert (folder / "config.json").read_bytes() == before


def test_weights_that_the_checkpoint_lacks_are_not_made_up(tmp_path, folder):
    gone = drop(folder, "bert.encoder.layer.1.output.dense.")
    with pytest.raises(CheckpointError, match="lacks 2 of the model's weights") as caught:
        capture_onnx(folder, tmp_path / "m.onnx")
    assert [name.removeprefix("bert.") for name in caught.value.problems] == [
        name.removeprefix("bert.") for name in gone
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_weights_of_other_shapes_are_named(tmp_path, folder):
    """The error of transformers says "look at the above report", which nobody sees."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": config["max_position_embeddings"] + 1}))
    with pytest.raises(CheckpointError, match=r"1 weights of .* have other shapes") as caught:
        capture_onnx(folder, tmp_path / "m.onnx")
    (problem,) = caught.value.problems
    rows, width = config["max_position_embeddings"], config["hidden_size"]
    assert problem.endswith(f"position_embeddings.weight: [{rows}, {width}], wanted [{rows + 1}, {width}]")


def test_a_reason_behind_a_colon_is_said(tmp_path, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "x"}))
    with pytest.raises(CheckpointError, match=r"for field 'hidden_size': TypeError: .*got str"):
        capture_onnx(folder, tmp_path / "m.onnx")


def test_a_head_that_the_adapter_brings_may_be_missing(tmp_path, folder):
    """The usual base of a classifier has none: the adapter's `modules_to_save` is all of it."""
    adapter = tiny.adapter("bert", "modules_to_save")
    merge_onnx(folder, adapter, tmp_path / "whole.onnx")
    assert drop(folder, HEAD)
    merge_onnx(folder, adapter, tmp_path / "headless.onnx")
    whole, headless = (
        {str(value.name): value.const_value.numpy() for value in load_graph(path).initializers()}
        for path in (tmp_path / "whole.onnx", tmp_path / "headless.onnx")
    )
    assert whole.keys() == headless.keys()
    assert all(np.array_equal(whole[name], headless[name]) for name in whole)
    with pytest.raises(CheckpointError, match="lacks"):
        merge_onnx(folder, tiny.adapter("bert"), tmp_path / "m.onnx")


@pytest.mark.parametrize("size", [0, 100, -10])
def test_weights_that_are_cut_short(size, tmp_path, folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match="can't load"):
        capture_onnx(folder, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_weights_of_another_size(tmp_path, folder):
    change(folder, hidden_size=16)
    with pytest.raises(CheckpointError, match=r"can't load|have other shapes than its config.json makes"):
        capture_onnx(folder, tmp_path / "m.onnx")


@pytest.mark.parametrize("text", ["{", "[]", "{}", ""])
def test_a_config_that_is_none(text, tmp_path, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"can't load|no architecture|as JSON|not an object"):
        capture_onnx(folder, tmp_path / "m.onnx")


def test_what_is_no_folder(tmp_path, folder):
    """Nobody is asked for a model of that name."""
    for path, said in ((tmp_path / "nothing", "no folder at"), (folder / "config.json", "is a file, not a")):
        with pytest.raises(CheckpointError, match=said):
            capture_onnx(path, tmp_path / "m.onnx")


def test_images_of_unknown_size(tmp_path):
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    with tiny.quiet():
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    with pytest.raises(CheckpointError, match="states how large the images are"):
        capture_onnx(tmp_path / "resnet", tmp_path / "m.onnx")


def test_an_interrupted_capture_leaves_nothing(tmp_path, folder, monkeypatch):
    def interrupted(checkpoint, output, **_):
        output.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(mode, "capture_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture_onnx(folder, tmp_path / "out" / "m.onnx")
    assert not list((tmp_path / "out").iterdir())
