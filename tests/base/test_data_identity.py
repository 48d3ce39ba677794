"""A graph's weights are those that it was written with, or nobody reads it; tools may save it anew."""

import json
import shutil

import exposed_models as exposed
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny

from lora_export import AdapterSession, GraphError, bank_onnx, convert_adapter, merge_onnx, swap_onnx
from lora_export.graph.data_identity import KEY
from lora_export.graph.onnx_file import load_graph
from lora_export.modes.capture_onnx import capture_onnx
from lora_export.runtimes.ort.device import DeviceMemory
from lora_export.runtimes.ort.open import open_session

ARCHS = ("llama", "bert")
CHANGED = "have changed since it was made"


def two_bases(arch, folder):
    """Write the base and one of equal shapes and other values, each with its data in one file."""
    places = [folder / name / "base.onnx" for name in ("one", "other")]
    for number, place in enumerate(places):
        place.parent.mkdir()
        model = ir.load(tiny.base_onnx(arch, "dynamo"))
        for value in model.graph.initializers.values():
            held = value.const_value.numpy()
            if number and held.dtype == np.float32 and held.ndim > 1:
                value.const_value = ir.tensor((held * 1.5).astype(held.dtype), name=value.name)
        ir.save(model, place, external_data="base.onnx.data", size_threshold_bytes=256)
    return places


def merged(base, out, adapter):
    merge_onnx(base, adapter, out, checkpoint=False)


def sharing(base, out, adapter):
    merge_onnx(base, adapter, out, checkpoint=False, share_base=True)


def swapped(base, out, adapter):
    swap_onnx(base, out, adapter=adapter, checkpoint=False)


def swapped_sharing(base, out, adapter):
    swap_onnx(base, out, adapter=adapter, checkpoint=False, share_base=True)


def banked(base, out, adapter):
    bank_onnx(base, {"a": adapter}, out, checkpoint=False)


# What writes a graph → the file of its weights that is exchanged.
WRITERS = {
    merged: "m.onnx.data",
    sharing: "base.onnx.data",
    swapped: "m.onnx.data",
    swapped_sharing: "base.onnx.data",
    banked: "m.onnx.data",
}


def readers(graph, adapter, folder):
    """Return what opens a graph, by name."""
    return {
        "session": lambda: AdapterSession(graph),
        "any session": lambda: open_session(graph, DeviceMemory("cpu")),
        "convert": lambda: convert_adapter(adapter, graph, folder / "a.safetensors"),
        "merge": lambda: merge_onnx(graph, adapter, folder / "again.onnx", checkpoint=False),
    }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_weights_of_another_base_of_equal_shapes(write, arch, tmp_path):
    adapter = tiny.adapter(arch)
    one, other = two_bases(arch, tmp_path)
    graphs = [base.parent / "m.onnx" for base in (one, other)]
    for base, graph in zip((one, other), graphs, strict=True):
        write(base, graph, adapter)
        open_session(graph, DeviceMemory("cpu"))
    shutil.copy(other.parent / WRITERS[write], one.parent / WRITERS[write])
    for name, read in readers(graphs[0], adapter, tmp_path).items():
        if name == "session" and write in (merged, sharing):
            continue  # it has no LoRA
        with pytest.raises(GraphError, match=CHANGED):
            read()
    assert not list(tmp_path.glob("a*"))
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_of_another_capture(arch, tmp_path):
    graphs = [tmp_path / name / "base.onnx" for name in ("one", "other")]
    for graph in graphs:
        graph.parent.mkdir()
        with tiny.quiet():
            capture_onnx(tiny.checkpoint(arch), graph)
    load_graph(graphs[0])
    data = graphs[1].with_name("base.onnx.data")
    held = np.fromfile(data, np.float32)
    (held * np.float32(1.5)).tofile(graphs[0].with_name("base.onnx.data"))
    with pytest.raises(GraphError, match=CHANGED):
        merge_onnx(graphs[0], tiny.adapter(arch), tmp_path / "m.onnx", checkpoint=False)


def scaled(graph, arch):
    """Multiply a norm's weights by two, as a tool does that changes a graph, and save it in its place."""
    model = onnx.load(graph)
    tensor = max(model.graph.initializer, key=lambda held: "norm" in held.name.lower() and sum(held.dims))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 2, tensor.name))
    graph.with_name("m.onnx.data").unlink()
    onnx.save_model(model, graph, save_as_external_data=True, location="m.onnx.data")


def slimmed(graph, arch):
    import onnxslim

    slim = onnxslim.slim(onnx.load(graph))
    graph.with_name("m.onnx.data").unlink()
    onnx.save_model(slim, graph, save_as_external_data=True, location="m.onnx.data")


@pytest.mark.parametrize("tool", [scaled, slimmed], ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_tool_that_saves_the_graph_in_its_place_is_believed(arch, tool, tmp_path):
    base, _ = two_bases(arch, tmp_path)
    graph = base.parent / "m.onnx"
    merged(base, graph, tiny.adapter(arch))
    before = tiny.run(graph, tiny.feeds(arch, graph))
    with tiny.quiet():
        tool(graph, arch)
    assert KEY in load_graph(graph).model.metadata_props or tool is slimmed
    after = tiny.run(graph, tiny.feeds(arch, graph))
    error = tiny.relative_error(after, before)
    assert error < 1e-5 if tool is slimmed else error > 1e-3
    open_session(graph, DeviceMemory("cpu"))


@pytest.mark.parametrize("arch", ARCHS)
def test_names_of_folders_do_not_matter(arch, tmp_path):
    base, _ = two_bases(arch, tmp_path)
    swapped(base, base.parent / "m.onnx", tiny.adapter(arch))
    moved = tmp_path / "moved"
    base.parent.rename(moved)
    wanted = tiny.reference(arch, tiny.adapter(arch), merged=False)
    got = exposed.run_swapped(arch, moved / "m.onnx", tiny.adapter(arch))
    assert tiny.relative_error(got, wanted) < 2e-5


@pytest.mark.parametrize("text", ["", "[]", '{"files": {}}', '{"layout": "x", "files": 3}'])
def test_a_damaged_entry(text, tmp_path):
    base, _ = two_bases("bert", tmp_path)
    model = onnx.load(base, load_external_data=False)
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, text
    onnx.save_model(model, base)
    with pytest.raises(GraphError, match=r"is damaged|can.t be read as JSON"):
        load_graph(base)


def test_a_file_that_is_named_twice_is_refused_and_not_hashed_again(tmp_path, monkeypatch):
    base, _ = two_bases("llama", tmp_path)
    swap_onnx(base, tmp_path / "m.onnx", adapter=tiny.adapter("llama"), checkpoint=False)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    (entry,) = (entry for entry in model.metadata_props if entry.key == KEY)
    said = json.loads(entry.value)
    said["files"] |= {f".{'/' * number}m.onnx.data": "0" for number in range(1, 200)}
    entry.value = json.dumps(said)
    onnx.save(model, tmp_path / "m.onnx")
    hashed = []
    monkeypatch.setattr("lora_export.graph.data_identity.hash_file", hashed.append)
    with pytest.raises(GraphError, match="names a file several times") as caught:
        load_graph(tmp_path / "m.onnx")
    assert caught.value.problems == ("m.onnx.data: named 200 times",)
    assert not hashed


def test_the_entry_says_what_the_files_are(tmp_path):
    base, _ = two_bases("llama", tmp_path)
    swapped_sharing(base, base.parent / "m.onnx", tiny.adapter("llama"))
    said = json.loads(load_graph(base.parent / "m.onnx").model.metadata_props[KEY])
    assert "base.onnx.data" in said["files"]
