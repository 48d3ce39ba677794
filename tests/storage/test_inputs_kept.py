"""Nothing that is written replaces what was read: every verb, every kind of input, by name and by link."""

import ast
import json
import os
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import session_graphs
from engine_graphs import product
from output_cases import CASES, checkpoint, exposed, inputs, run

from lora_export import cli, load_adapter, save_adapter
from lora_export.errors import OutputError
from lora_export.formats.reading.tensors import write_safetensors
from lora_export.storage.outputs import OutputSet, replaced_inputs

PACKAGE = Path(__file__).resolve().parents[2] / "lora_export"
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
CHECKPOINT = ("checkpoint/config.json", "checkpoint/model.safetensors")
# What a case of `output_cases` reads.
READ = {
    "merge-onnx": ("g/base.onnx", *ADAPTER),
    "swap-onnx": ("g/base.onnx", *ADAPTER),
    "bank-onnx": ("g/base.onnx", *ADAPTER),
    "convert-adapter": ("swap.onnx", "swap.onnx.data", "swap.lora.json", *ADAPTER),
    "parity": ("p.onnx", *CHECKPOINT),
    "bench": ("bench.onnx",),
    "quantize-onnx": ("g/base.onnx",),
}
WRITES_NOTHING = {"doctor", "targets", "verify"}
# Verbs that write, and where else they are tested.
ELSEWHERE = {
    "merge": "a folder, below",
    "demo": "reads nothing",
    "capture-onnx": "below",
    "build-engine": "below",
    "inspect": "below",
    "run": "below",
}


def call(*words):
    return cli._run([str(word) for word in words], False)


def linked(output, source, how):
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    if how == "a link":
        output.symlink_to(source)
    else:
        os.link(source, output)


def refused(capsys, code, output, source, before):
    said = capsys.readouterr().err
    assert code == 1, said
    assert source.read_bytes() == before
    assert output.samefile(source)
    assert source.name in said or output.name in said
    return said


def test_every_verb_is_tested_here():
    context = click.Context(cli.root)
    verbs = set(cli.root.list_commands(context))
    assert verbs == {*READ, *ELSEWHERE} | WRITES_NOTHING
    for verb in WRITES_NOTHING:
        command = cli.root.get_command(context, verb)
        assert not any({"-o", "--output", "--force"} & set(entry.opts) for entry in command.params), verb


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each verb's inputs, and the files that it writes."""
    found = {}
    for verb in READ:
        folder = tmp_path_factory.mktemp(verb)
        if verb == "parity":
            product(folder / "p.onnx")
            found[verb] = folder, ["p.json", "p.xml", "p.html"]  # refused before it is run
            continue
        if verb == "bench":
            found[verb] = folder, ["b.json", "b.html"]
            CASES[verb].arguments(folder, folder / "first")
            continue
        assert run(CASES[verb], folder, folder / "first") == 0
        names = sorted(path.name for path in (folder / "first").iterdir())
        found[verb] = folder, [name for name in names if not name.startswith(".")]
    return found


@pytest.mark.parametrize("how", ["a link", "a hard link"])
@pytest.mark.parametrize(("verb", "source"), [(verb, source) for verb in READ for source in READ[verb]])
def test_an_output_that_is_an_input(verb, source, how, written, tmp_path, capsys):
    folder, names = written[verb]
    assert names
    path = folder / source
    before = path.read_bytes()
    for name in names:
        out = tmp_path / name
        linked(out / name, path, how)
        refused(capsys, run(CASES[verb], folder, out, "--force"), out / name, path, before)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "swap.onnx.data"])
def test_a_converted_adapter_over_what_is_read(name, tmp_path, capsys):
    graph, (_, adapter) = exposed(tmp_path), inputs(tmp_path)
    path = adapter / name
    if not path.exists():  # a graph's data may be called so
        model = onnx.load(graph)
        for entry in [entry for entry in model.metadata_props if entry.key == "lora_export.data"]:
            model.metadata_props.remove(entry)
        (tmp_path / "st").mkdir()
        graph, path = tmp_path / "st" / "swap.onnx", tmp_path / "st" / "model.safetensors"
        onnx.save(model, graph, save_as_external_data=True, location=path.name, size_threshold=1024)
    before = path.read_bytes()
    code = call("convert-adapter", adapter, "--for", graph, "-o", path, "--force")
    assert "would replace a file that is read" in refused(capsys, code, path, path, before)


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
@pytest.mark.parametrize("source", CHECKPOINT)
def test_the_checkpoint_that_values_are_compared_with(verb, source, tmp_path, capsys):
    graph, adapter = inputs(tmp_path)
    weight = onnx.numpy_helper.to_array(onnx.load(graph).graph.initializer[0])
    folder = checkpoint(tmp_path)
    write_safetensors(
        folder / "model.safetensors", {"fc.weight": np.ascontiguousarray(weight.T)}, {"format": "pt"}
    )
    path, out = tmp_path / source, tmp_path / "out"
    before = path.read_bytes()
    linked(out / "m.onnx.data", path, "a hard link")
    given = f"a={adapter}" if verb == "bank-onnx" else adapter
    words = [verb, "--base", graph, "--adapter", given, "--checkpoint", folder, "-o", out / "m.onnx"]
    refused(capsys, call(*words, "--force"), out / "m.onnx.data", path, before)


@pytest.mark.parametrize("where", ["adapter", "checkpoint"])
def test_companions_of_the_base_beside_what_is_read(where, tmp_path, capsys):
    graph, adapter = inputs(tmp_path)
    graph.with_name("genai_config.json").write_text('{"model": {"decoder": {"filename": "base.onnx"}}}')
    for name in ("config.json", "adapter_config.json"):
        graph.with_name(name).write_text('{"base": 1}')
    folder = {"adapter": adapter, "checkpoint": checkpoint(tmp_path)}[where]
    path = folder / ("adapter_config.json" if where == "adapter" else "config.json")
    before = path.read_bytes()
    words = ["swap-onnx", "--base", graph, "--adapter", adapter, "-o", folder / "m.onnx", "--force"]
    if where == "checkpoint":
        words += ["--checkpoint", folder]
    refused(capsys, call(*words), path, path, before)
    assert not (folder / "m.onnx").exists()


@pytest.mark.parametrize("how", ["a link", "a hard link"])
def test_a_captured_graph_over_the_checkpoint(how, tmp_path, capsys):
    folder, out = checkpoint(tmp_path), tmp_path / "out"
    for name in ("config.json", "model.safetensors"):
        linked(out / "m.onnx.data", folder / name, how)
        before = (folder / name).read_bytes()
        code = call("capture-onnx", folder, "-o", out / "m.onnx", "--force")
        refused(capsys, code, out / "m.onnx.data", folder / name, before)


@pytest.mark.parametrize("name", ["p.sm89.engine", "p.sm89.json", "p.sm89.log"])
def test_an_engine_over_its_graph(name, tmp_path, capsys):
    graph = tmp_path / "p.onnx"
    product(graph)
    before = graph.read_bytes()
    linked(tmp_path / "out" / name, graph, "a hard link")
    code = call("build-engine", graph, "--target", "sm89", "-o", tmp_path / "out", "--force", "--dry-run")
    assert "would replace" in refused(capsys, code, tmp_path / "out" / name, graph, before)


def test_what_a_timing_cache_may_not_be(tmp_path, monkeypatch):
    from lora_export.engines import build

    product(tmp_path / "p.onnx")
    monkeypatch.setattr(build, "_check_timings", lambda _: None)
    with pytest.raises(OutputError, match="would replace a file that is read"):
        build.build_engine(
            tmp_path / "p.onnx", "sm89", tmp_path, timing_cache=tmp_path / "p.onnx", dry_run=True
        )


def test_a_folder_with_an_input_in_it(tmp_path, capsys):
    """Wherever that input is a link's end: a kit's folder and a merged model's go as a whole."""
    graph = tmp_path / "k" / "p.sm89.kit" / "p.onnx"
    graph.parent.mkdir(parents=True)
    product(graph)
    before = graph.read_bytes()
    words = ["--target", "sm89", "--kit", "-o", tmp_path / "k", "--name", "p", "--force"]
    assert call("build-engine", graph, *words) == 1
    assert graph.read_bytes() == before
    _, adapter = inputs(tmp_path)
    merged = tmp_path / "merged"
    words = ["--adapter", adapter, "-o", merged]
    assert call("merge", "--base", checkpoint(tmp_path), *words) == 0
    weights = adapter / "adapter_model.safetensors"
    weights.rename(merged / "kept.safetensors")
    weights.symlink_to(merged / "kept.safetensors")
    manifest = json.loads((merged / "lora.json").read_text())
    manifest["files"]["kept.safetensors"] = {}
    (merged / "lora.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    # A file that is named may be a link.
    words[1] = weights
    assert call("merge", "--base", checkpoint(tmp_path), *words, "--force") == 1
    assert "would replace a file that is read" in capsys.readouterr().err
    assert weights.exists()


@pytest.mark.parametrize("how", ["a link", "a hard link"])
def test_a_plot_over_an_adapter(how, tmp_path, capsys):
    graph, adapter = inputs(tmp_path)
    for source in (adapter / "adapter_model.safetensors", adapter / "adapter_config.json", graph):
        before = source.read_bytes()
        linked(tmp_path / "p.html", source, how)
        code = call("inspect", adapter, "--base", graph, "--plot", tmp_path / "p.html", "--force")
        refused(capsys, code, tmp_path / "p.html", source, before)


def test_a_recipe_that_a_step_would_write_over(tmp_path, capsys):
    _, adapter = inputs(tmp_path)
    recipe, steps = tmp_path / "r.html", [{"inspect": {"adapter": str(adapter), "plot": None, "force": True}}]
    steps[0]["inspect"]["plot"] = str(recipe)
    recipe.write_text(json.dumps({"name": "r", "description": "d", "needs": [], "steps": steps}))
    before = recipe.read_bytes()
    refused(capsys, call("run", recipe), recipe, recipe, before)
    steps[0]["inspect"]["plot"] = str(tmp_path / "other.html")
    recipe.write_text(json.dumps({"name": "r", "description": "d", "needs": [], "steps": steps}))
    assert call("run", recipe) == 0


def test_an_adapter_saved_over_itself(tmp_path):
    save_adapter(session_graphs.both(1), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(OutputError, match="would replace a file that is read"):
        save_adapter(load_adapter(tmp_path / "a"), tmp_path / "a", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    save_adapter(session_graphs.both(2), tmp_path / "a", force=True)  # which was not read from there


def test_an_output_that_becomes_an_input_meanwhile(tmp_path):
    read = tmp_path / "read"
    read.write_text("trained")
    with OutputSet(True, [read]) as outputs:
        outputs.stage(tmp_path / "out").write_text("new")
        os.link(read, tmp_path / "out")
        with pytest.raises(OutputError, match="would replace a file that is read"):
            outputs.commit()
    assert replaced_inputs(tmp_path / "out", [read]) == [read]
    assert not replaced_inputs(tmp_path / "other", [read])


def test_graphs_beside_the_checkpoint_they_are_made_of_can_be_made_again(tmp_path):
    """`--share-base` asks for them there."""
    graph, adapter = inputs(tmp_path)
    words = ["merge-onnx", "--base", graph, "--adapter", adapter, "-o", graph.with_name("m.onnx")]
    assert call(*words) == 0
    assert call(*words, "--force") == 0


# Who writes without having read anything that a user named.
NO_INPUTS = {
    "base/capture/kept.py": "writes below its own keys",
    "demo/run.py": "writes what it trains",
    "demo/run_smollm2.py": "writes what it trains",
    "engines/cache.py": "writes below its own keys",
    "engines/tensorrt.py": "build.carry_out compares the file",
    "runtimes/tensorrt/kernel_cache.py": "reads and writes one file",
}


def test_every_writer_says_what_it_has_read():
    without, known = {}, set()
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "OutputSet":
                known.add(place)
                if len(node.args) < 2 and not any(entry.arg == "reads" for entry in node.keywords):
                    without[place] = node.lineno
    assert len(known) > 10
    assert set(without) == set(NO_INPUTS), without
