"""What a file says of itself: graphs and engines by their content, whatever they are called."""

import engine_files
import pytest
import session_graphs

from lora_export.engines.record import EngineRecord, record_path
from lora_export.errors import GraphError
from lora_export.graph.onnx_file import GraphFile
from lora_export.runtimes.model_file import ModelFile


def test_a_graph_and_the_engine_of_it_say_the_same_of_lora(tmp_path):
    graph = session_graphs.swap(tmp_path)
    engine = engine_files.engine_of(graph, tmp_path)
    of_graph, of_engine = ModelFile.read(graph), ModelFile.read(engine)
    assert isinstance(of_graph.content, GraphFile)
    assert isinstance(of_engine.content, EngineRecord)
    assert of_graph.lora_record == of_engine.lora_record
    fed = {str(value.name) for value in of_graph.content.graph.inputs} - of_graph.lora_inputs
    assert fed == {port.name for port in of_engine.content.inputs} - of_engine.lora_inputs


def test_a_name_decides_nothing_that_the_content_says(tmp_path):
    engine = engine_files.engine_of(session_graphs.base(tmp_path), tmp_path)
    renamed = tmp_path / "named.onnx"
    record_path(renamed).write_bytes(record_path(engine).read_bytes())
    renamed.write_bytes(engine.read_bytes())
    assert isinstance(ModelFile.read(renamed).content, EngineRecord)
    graph = session_graphs.base(tmp_path).rename(tmp_path / "model.graph")
    assert isinstance(ModelFile.read(graph).content, GraphFile)
    assert ModelFile.read(graph).lora_inputs == frozenset()
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(GraphError, match="not a readable ONNX file"):
        ModelFile.read(tmp_path / "text.onnx")
