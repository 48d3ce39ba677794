"""What an engine is made from, kept for and called."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from engine_graphs import SMALL, graph_of, made, product, value
from exposed_models import group
from onnx import TensorProto, helper
from small_graphs import Huge

from lora_export import build_engine
from lora_export.engines.record import read_engine
from lora_export.engines.run_builder import run_worker
from lora_export.engines.source import serialize
from lora_export.errors import BackendError, GraphError, InputChangedError
from lora_export.graph.onnx_file import load_graph
from lora_export.machines.targets import gpus_of
from lora_export.storage.hashes import sha256_of

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")


def test_data_beside_a_link(tmp_path):
    """Where the model is a link, its data is beside the link, for us and for every runtime."""
    real, link = tmp_path / "real", tmp_path / "link"
    for folder, factor in ((real, 1), (link, 2)):
        folder.mkdir()
        weight = np.full((64, 64), factor, np.float32)
        constant = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], weight.tobytes(), raw=True)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        path = graph_of(
            folder / "m.onnx", [node], [value("x", ["batch", 64])], [value("y", ["batch", 64])], [constant]
        )
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    (link / "m.onnx").unlink()
    (link / "m.onnx").symlink_to("../real/m.onnx")
    engine = build_engine(link / "m.onnx", "sm89", tmp_path / "out").engines[0].path.read_bytes()
    twos = np.full(64, 2, np.float32).tobytes()
    assert twos in engine
    assert np.ones(64, np.float32).tobytes() not in engine


@group("llama")
def test_weights_that_change_while_they_are_built_from(tmp_path, monkeypatch):
    """An engine of the old or the new ones, who knows, is not kept for either."""
    model, _ = made("merge", "llama", tmp_path)
    data = tmp_path / "m.onnx.data"

    def changing(*arguments, **named):
        built = run_worker(*arguments, **named)
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
        return built

    monkeypatch.setattr("lora_export.engines.build.run_worker", changing)
    options = {"shapes": SMALL, "cache": tmp_path / "cache"}
    with pytest.raises(InputChangedError, match="changed while being read"):
        build_engine(model, "sm89", tmp_path / "out", **options)
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "cache").glob("*/engine"))


def test_a_graph_that_protobuf_cannot_hold(tmp_path, monkeypatch):
    """With weights that were rewritten inside it, say."""
    graph = load_graph(product(tmp_path / "m.onnx"))
    monkeypatch.setattr(ir, "to_proto", lambda model: Huge())
    with pytest.raises(GraphError, match="2 GB"):
        serialize(graph, sha256_of)


def test_an_engine_of_another_lora_export_is_built_again(tmp_path, monkeypatch):
    model, cache = product(tmp_path / "m.onnx"), tmp_path / "cache"
    build_engine(model, "sm89", tmp_path / "a", cache=cache)
    monkeypatch.setattr("lora_export.engines.build.__version__", "0.0.1")
    assert not build_engine(model, "sm89", tmp_path / "b", cache=cache).engines[0].cached


def test_the_builders_messages_are_those_of_the_build(tmp_path):
    """From the cache too; who asks for all of them gets all of them."""
    model, cache = product(tmp_path / "m.onnx"), tmp_path / "cache"
    for folder in ("a", "b"):
        build_engine(model, "sm89", tmp_path / folder, cache=cache)
    log = (tmp_path / "a" / "m.sm89.log").read_text()
    assert "Engine generation completed" in log
    assert (tmp_path / "b" / "m.sm89.log").read_text() == log
    (engine,) = build_engine(model, "sm89", tmp_path / "c", cache=cache, verbose=True).engines
    assert not engine.cached
    assert "[VERBOSE]" in (tmp_path / "c" / "m.sm89.log").read_text()


def test_an_output_without_a_shape_has_the_engines(tmp_path):
    model = onnx.load(product(tmp_path / "m.onnx"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "m.onnx")
    (engine,) = build_engine(tmp_path / "m.onnx", "sm89", tmp_path / "out").engines
    (port,) = read_engine(engine.path).outputs
    assert (port.shape, port.dims) == ((-1, 4), ("y[0]", 4))


def test_a_past_that_is_sized_by_its_own_name(tmp_path):
    """The mask is as long as what it masks, or the usual shapes contradict each other."""
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["all"], axis=1),
        helper.make_node("Add", ["all", "attention_mask"], ["y"]),
    ]
    inputs = [
        value("x", ["batch", "sequence_length"]),
        value("past", ["batch", "past_sequence_length"]),
        value("attention_mask", ["batch", "past_sequence_length + sequence_length"]),
    ]
    model = graph_of(tmp_path / "m.onnx", nodes, inputs, [value("y", ["batch", "total"])])
    shapes = {"past_sequence_length": "0:4:16", "sequence_length": "1:1:8"}
    (engine,) = build_engine(model, "sm89", tmp_path / "out", shapes=shapes).engines
    assert engine.record.profiles[0].shapes["attention_mask"] == ((1, 1), (1, 5), (4, 24))


def test_the_log_of_a_build_that_failed_is_replaced(tmp_path):
    model = product(tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.sm89.log").write_text("K exceeds the maximum value")
    build_engine(model, "sm89", tmp_path / "out")
    assert "K exceeds" not in (tmp_path / "out" / "m.sm89.log").read_text()


@pytest.mark.parametrize("name", ["a/b", "../m", "/m", "a\nb", "."])
def test_a_name_is_no_folder(name, tmp_path):
    with pytest.raises(BackendError, match="can't begin a file's name"):
        build_engine(product(tmp_path / "m.onnx"), "sm89", tmp_path / "out", name=name)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_an_engine_of_many_gpus_is_called_by_their_compute_capabilities(tmp_path):
    names = [t.name for t in gpus_of("8.9") + gpus_of("12.0") if "tensorrt-rtx" in t.compilers]
    model = product(tmp_path / "m.onnx")
    report = build_engine(model, names, tmp_path / "out", together=True, dry_run=True)
    assert report.engines[0].path.name == "m.sm89+sm120.engine"
    report = build_engine(model, names[:2], tmp_path / "out", together=True, dry_run=True)
    assert report.engines[0].path.name == f"m.{names[0]}+{names[1]}.engine"


def test_timings_where_nothing_is_measured(tmp_path):
    with pytest.raises(BackendError, match="measures no timings"):
        build_engine(product(tmp_path / "m.onnx"), "sm89", tmp_path / "out", timing_cache=tmp_path / "t")
