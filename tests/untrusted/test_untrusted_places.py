"""Names in files that no file can have: longer than a file system's, or with a null character."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.sentence_modules import transformer_folder
from lora_export.base.reads import holds_weights
from lora_export.errors import LoraExportError
from lora_export.formats import load_adapter
from lora_export.graph.data_identity import KEY
from lora_export.graph.onnx_file import load_graph
from lora_export.integrity.check import verify
from lora_export.parity.sides.merged import _is_of
from lora_export.reports.artefact import read_artefact
from lora_export.untrusted.places import is_file, is_folder, is_link

NAMES = {"long": "x" * 300, "very long": "x" * 5000, "long path": "/".join(["y" * 200] * 30), "null": "a\0b"}
HEX = "0" * 64


def graph(folder, location=None, identity=None):
    weight = TensorProto(name="w", data_type=1, dims=[4], raw_data=b"0" * 16)
    if location is not None:
        weight = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value=location)
    ports = [helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weight]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if identity is not None:
        model.metadata_props.add(key=KEY, value=json.dumps({"layout": HEX, **identity}))
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def sums(folder, name):
    graph(folder)
    (folder / "SHA256SUMS").write_text(f"{HEX}  {name}\n")
    return verify(folder)


def manifest(folder, name):
    graph(folder)
    entry = {"name": "m.onnx.data", "size_bytes": 1, "sha256": HEX, "blake3": HEX}
    (folder / "m.lora.json").write_text(json.dumps({"files": {name: entry}}))
    return verify(folder / "m.onnx")


def earlier_manifest(folder, name):
    graph(folder)
    outputs = {"graph": "m.onnx", "data": name, "identity": HEX}
    (folder / "m.lora.json").write_text(json.dumps({"mode": "merge-onnx", "outputs": outputs}))
    return verify(folder)


def identity(folder, name):
    return verify(graph(folder, identity={"files": {name: HEX}, "manifest": name}))


def opened_identity(folder, name):
    return load_graph(graph(folder, identity={"files": {name: HEX}}))


def location(folder, name):
    return load_graph(graph(folder, name))


def verified_location(folder, name):
    path = graph(folder, name)
    (folder / "SHA256SUMS").write_text(f"{HEX}  m.onnx\n")
    return verify(path)


def index(folder, name):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    return Checkpoint.open(folder)


def chosen(folder, name):
    save_file({"w": np.zeros(2, np.float32)}, folder / "model.safetensors")
    config = {"transformers_weights": f"{name}.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def modules(folder, name):
    (folder / "modules.json").write_text(json.dumps([{"path": name, "type": "st.Dense"}]))
    return transformer_folder(folder)


def shards(folder, name):
    save_file({}, folder / "adapter_model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": name}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return load_adapter(folder)


def genai(folder, name):
    config = {"model": {"decoder": {"filename": name}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return read_artefact(folder)


def manifest_for_parity(folder, name):
    return _is_of(SimpleNamespace(outputs={"identity": HEX, "data": name}), graph(folder))


def base_model(folder, name):
    return holds_weights(folder / name)


READERS = [sums, manifest, earlier_manifest, identity, opened_identity, location, verified_location]
READERS += [index, chosen, modules, shards, genai, manifest_for_parity, base_model]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("read", READERS)
def test_a_name_that_no_file_has_is_a_missing_file(read, name, tmp_path):
    """It says what it says of a missing file, or why the name is refused; never what the system says."""
    with pytest.raises((OSError, ValueError)):
        (tmp_path / NAMES[name]).open()
    found = None
    with contextlib.suppress(LoraExportError):
        found = read(tmp_path, NAMES[name])
    assert not isinstance(found, Checkpoint)
    if hasattr(found, "failures"):
        assert found.failures()


@pytest.mark.parametrize("name", NAMES)
def test_there_is_nothing_of_such_a_name(name, tmp_path):
    place = tmp_path / NAMES[name]
    assert not is_file(place)
    assert not is_folder(place)
    assert not is_link(place)


def test_what_is_there_is_found(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "none"):
        assert (is_file(path), is_folder(path), is_link(path)) == (
            path.is_file(),
            path.is_dir(),
            path.is_symlink(),
        )
