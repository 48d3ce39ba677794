"""Paths that a stranger's file holds: by what they resolve to, followed in its folder, refused out of it."""

import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
from exposed_models import group
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from lora_export.cli import _run
from lora_export.errors import CheckpointError, GraphError
from lora_export.graph.data_identity import KEY, place_problem
from lora_export.graph.onnx_file import load_graph
from lora_export.untrusted.links import link_problems

SECRET = np.ones((4, 4), np.float32)


def graph_with(folder, location="d.bin", kind="initializer"):
    """Write x·w, w in another file: an initializer, a Constant, one in a branch, or an attribute."""
    folder.mkdir(parents=True, exist_ok=True)
    weight = TensorProto(name="w", data_type=1, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    ports = [helper.make_tensor_value_info(name, 1, [1, 4]) for name in "xy"]
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    nodes, initializers = [product], []
    if kind == "initializer":
        initializers = [weight]
    elif kind == "Constant":
        nodes = [constant("w", weight), product]
    elif kind == "branch":
        one, two = (
            helper.make_graph(
                [constant(f"w{n}", weight), helper.make_node("MatMul", ["x", f"w{n}"], [f"y{n}"])],
                f"b{n}",
                [],
                [helper.make_tensor_value_info(f"y{n}", 1, [1, 4])],
            )
            for n in (1, 2)
        )
        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=one, else_branch=two)]
        initializers = [yes]
    else:
        fill = helper.make_node("ConstantOfShape", ["four"], ["w"])
        fill.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(weight)
        nodes, initializers = [fill, product], [helper.make_tensor("four", 7, [2], [4, 4])]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def constant(name, tensor):
    node = helper.make_node("Constant", [], [name])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    return node


def data(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(SECRET.tobytes())
    return path


def link(path, to):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def cache(root, below=""):
    """Lay a graph and its data out as Hugging Face's cache does; return the graph."""
    snapshot = root / "snapshots" / "abc" / below
    graph_with(root / "made")
    data(root / "blobs" / "h2")
    (root / "made" / "m.onnx").rename(root / "blobs" / "h1")
    for name, blob in (("m.onnx", "h1"), ("d.bin", "h2")):
        link(snapshot / name, os.path.relpath(root / "blobs" / blob, snapshot))
    return snapshot / "m.onnx"


def lay_out(name, root):
    """Return the graph of one layout; `elsewhere` is out of every folder."""
    folder, elsewhere = root / "model", data(root / "elsewhere" / "d.bin")
    if name.startswith("cache"):
        path = cache(root / "repo", "onnx" if "below" in name else "")
        place = path.parent / "d.bin"
        if "out" in name:
            place.unlink()
            link(place, elsewhere)
        elif "other repo" in name:
            place.unlink()
            cache(root / "other")
            link(place, root / "other" / "blobs" / "h2")
        elif "graph copied" in name:
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        return path
    location = {"below": "sub/d.bin", "folder linked out": "sub/d.bin", "up": "../elsewhere/d.bin"}.get(
        name, "d.bin"
    )
    location = str(elsewhere) if name == "absolute" else location
    path = graph_with(folder, location)
    if name in ("beside", "below"):
        data(folder / location)
    elif name == "link inside":
        data(folder / "sub" / "other.bin")
        link(folder / "d.bin", "sub/other.bin")
    elif name == "link out":
        link(folder / "d.bin", elsewhere)
    elif name == "link to a link out":
        link(folder / "sub" / "d.bin", elsewhere)
        link(folder / "d.bin", "sub/d.bin")
    elif name == "folder linked out":
        link(folder / "sub", elsewhere.parent)
    elif name == "a file with two names":
        os.link(elsewhere, folder / "d.bin")
    elif name == "the model's folder is a link":
        data(folder / "d.bin")
        link(root / "linked", folder)
        return root / "linked" / "m.onnx"
    elif name == "the graph alone is a link":
        data(folder / "d.bin")
        link(root / "linked" / "m.onnx", folder / "m.onnx")
        data(root / "linked" / "d.bin")
        return root / "linked" / "m.onnx"
    return path


GOOD = ["beside", "below", "link inside", "the model's folder is a link", "the graph alone is a link"]
GOOD += ["cache", "cache, below", "a file with two names"]
BAD = ["link out", "link to a link out", "folder linked out", "up", "absolute"]
BAD += ["cache, out", "cache, below, out", "cache, other repo", "cache, graph copied"]


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_external_data_lies_where_onnx_runtime_reads_it(name, tmp_path):
    path = lay_out(name, tmp_path)
    try:
        session = ort.InferenceSession(path)
    except Exception:  # whichever kind of its own
        assert name in BAD
        with pytest.raises(GraphError, match="external data") as caught:
            load_graph(path)
        assert "w: " in caught.value.problems[0]
        assert caught.value.hint
    else:
        assert name in GOOD
        (found,) = session.run(None, {"x": np.ones((1, 4), np.float32)})
        graph = load_graph(path)
        assert np.array_equal(np.ones((1, 4)) @ graph.graph.initializers["w"].const_value.numpy(), found)


@pytest.mark.parametrize("kind", ["initializer", "Constant", "branch"])
@pytest.mark.parametrize("where", ["link out", "up"])
def test_wherever_in_the_graph_the_path_stands(kind, where, tmp_path):
    secret = data(tmp_path / "secret")
    path = graph_with(tmp_path / "model", "../secret" if where == "up" else "d.bin", kind)
    if where != "up":
        link(tmp_path / "model" / "d.bin", secret)
    with pytest.raises(GraphError, match="external data") as caught:
        load_graph(path)
    assert "../secret" in caught.value.problems[0] or str(secret) in caught.value.problems[0]


@pytest.mark.parametrize("location", ["d.bin", "../secret"])
def test_external_data_of_another_attribute_is_refused(location, tmp_path):
    """Nobody reads it; an output in another folder would refer to what lies there."""
    data(tmp_path / "secret")
    data(tmp_path / "model" / "d.bin")
    with pytest.raises(GraphError) as caught:
        load_graph(graph_with(tmp_path / "model", location, "ConstantOfShape"))
    assert "attribute 'value'" in caught.value.problems[0]
    assert "ConstantOfShape" in caught.value.problems[0]


@pytest.mark.parametrize("location", ["a\0b", "/etc/passwd", "a/../../b", ".."])
def test_places_that_are_none(location, tmp_path):
    assert "outside" in place_problem(tmp_path / "m.onnx", location)


@pytest.mark.parametrize("place", ["../secret", "d.bin"])
def test_a_record_of_data_files_hashes_nothing_outside(place, tmp_path):
    secret = data(tmp_path / "secret")
    path = graph_with(tmp_path / "model", "other.bin")
    data(tmp_path / "model" / "other.bin")
    link(tmp_path / "model" / "d.bin", secret)
    model = onnx.load(path, load_external_data=False)
    text = json.dumps({"layout": "0" * 64, "files": {place: "0" * 64}})
    model.metadata_props.add(key=KEY, value=text)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="can't be the graph's"):
        load_graph(path)


@group("llama")
@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "build-engine"])
def test_no_verb_copies_what_a_link_leads_to(verb, tmp_path, capsys):
    graph = tiny.base_onnx("llama", "dynamo")
    folder = tmp_path / "base"
    shutil.copytree(graph.parent, folder)
    (file,) = load_graph(folder / graph.name).data_files()
    file.rename(tmp_path / "private")
    link(file, tmp_path / "private")
    given = (
        ["--adapter", str(tiny.adapter("llama"))] if verb != "build-engine" else ["--target", "t4", "--kit"]
    )
    base = ["--base"] if verb != "build-engine" else []
    out = tmp_path / ("out.onnx" if base else "out")
    assert _run([verb, *base, str(folder / graph.name), *given, "-o", str(out)], False) == 1
    assert str(tmp_path / "private") in capsys.readouterr().err
    assert not out.exists()


# --- checkpoints ---------------------------------------------------------------------------------------


def snapshot(root):
    """Lay tiny Llama's checkpoint out as Hugging Face's cache does."""
    folder = root / "models--x" / "snapshots" / "abc"
    for number, file in enumerate(sorted(tiny.checkpoint("llama").iterdir())):
        blob = root / "models--x" / "blobs" / f"{number}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link(folder / file.name, f"../../blobs/{number}")
    return folder


def merge(base, out):
    return _run(
        ["merge", "--base", str(base), "--adapter", str(tiny.adapter("llama")), "-o", str(out)], False
    )


@group("llama")
@pytest.mark.parametrize("way", ["as it is", "by a link"])
def test_a_snapshot_of_hugging_faces_cache_is_merged(way, tmp_path):
    base = snapshot(tmp_path)
    if way == "by a link":
        link(tmp_path / "linked", base)
        base = tmp_path / "linked"
    assert merge(base, tmp_path / "out") == 0
    assert merge(tiny.checkpoint("llama"), tmp_path / "plain") == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all(np.array_equal(one[name], two[name]) for name in two)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / path.name).is_file()
        assert not (tmp_path / "out" / path.name).is_symlink()
    config = (tmp_path / "out" / "config.json").read_bytes()
    assert config == (tmp_path / "plain" / "config.json").read_bytes()


STRANGE = {
    "a private file": lambda folder, private: link(folder / "notes.txt", private),
    "by a link inside": lambda folder, private: (
        link(folder / "a.txt", private),
        link(folder / "notes.txt", "a.txt"),
    ),
    "below": lambda folder, private: link(folder / "sub" / "notes.txt", private),
    "a folder": lambda folder, private: link(folder / "notes.txt", private.parent),
    "its own folder": lambda folder, private: link(folder / "notes.txt", "."),
    "nothing": lambda folder, private: link(folder / "notes.txt", "missing"),
    "itself": lambda folder, private: link(folder / "notes.txt", "notes.txt"),
    "a pipe": lambda folder, private: os.mkfifo(folder / "notes.txt"),
}


@group("llama")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("cached", [False, True])
def test_a_merge_copies_no_file_of_another_folder(kind, cached, tmp_path, capsys):
    private = data(tmp_path / "home" / "private")
    base = snapshot(tmp_path) if cached else shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    STRANGE[kind](base, private)
    for more in ([], ["--dry-run"]):
        given = ["--base", str(base), "--adapter", str(tiny.adapter("llama")), "-o", str(tmp_path / "out")]
        assert _run(["merge", *given, *more], False) == 1
        error = capsys.readouterr().err
        assert "notes.txt is" in error
        assert "hint: put the files themselves into the folder" in error
        assert not (tmp_path / "out").exists()


@group("llama")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("verb", ["merge", "swap-onnx", "capture-onnx"])
def test_weights_and_config_are_held_to_the_rule_of_the_other_files(verb, name, cached, tmp_path, capsys):
    """In a snapshot of the cache a link into its own blobs is read; no other link out of the folder is."""
    base = snapshot(tmp_path) if cached else shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    other = shutil.copyfile(base / name, tmp_path / "elsewhere")
    (base / name).unlink()
    link(base / name, other)
    out = tmp_path / ("out" if verb == "merge" else "o.onnx")
    given = [base] if verb == "capture-onnx" else ["--base", base, "--adapter", tiny.adapter("llama")]
    assert _run([verb, *map(str, given), "-o", str(out)], False) == 1
    error = capsys.readouterr().err
    assert f"{name} is a link out of the folder, to {other}" in error
    assert "hint: put the files themselves into the folder" in error
    assert not out.exists()


@pytest.mark.parametrize("good", [True, False])
def test_blobs_are_those_of_the_same_repository(good, tmp_path):
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    blob = data(tmp_path / ("models--x" if good else "models--y") / "blobs" / "h")
    link(folder / "config.json", blob)
    assert bool(link_problems(folder, [folder / "config.json"])) is not good


@group("llama")
@pytest.mark.parametrize("name", ["../other.safetensors", "/dev/zero", "sub/model.safetensors", "a\0b", ".."])
def test_an_index_names_files_of_its_folder(name, tmp_path):
    from lora_export.base.checkpoint.checkpoint import Checkpoint

    base = shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    names = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not files of its folder"):
        Checkpoint.open(base)


@group("llama")
@pytest.mark.parametrize("path", ["../../..", "/", "a/../../b"])
def test_modules_of_sentence_transformers_lie_in_their_folder(path, tmp_path, capsys):
    base = shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    (base / "modules.json").write_text(json.dumps([{"path": path, "type": "st.Dense"}]))
    assert merge(base, tmp_path / "out") == 1
    assert "modules outside of its folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_files_for_onnxruntime_genai_are_not_copied_from_elsewhere(name, tmp_path):
    from lora_export.errors import PackageError
    from lora_export.packages.onnxruntime_genai import companions_of

    path = graph_with(tmp_path / "model")
    (path.parent / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "m.onnx"}}}))
    (path.parent / "vocab.json").write_text("{}")
    assert set(companions_of(path, tmp_path / "out" / "m.onnx").files) == {"vocab.json", "genai_config.json"}
    link(path.parent / name, data(tmp_path / "private"))
    with pytest.raises(PackageError, match="from somewhere else") as caught:
        companions_of(path, tmp_path / "out" / "m.onnx")
    assert name in caught.value.problems[0]


@group("llama")
@pytest.mark.parametrize("kind", ["links", "two names"])
def test_a_graph_in_hugging_faces_cache_serves_every_verb(kind, tmp_path):
    """Byte for byte as from a plain folder; `kind` is how the cache holds its files."""
    graph = tiny.base_onnx("llama", "dynamo")
    (file,) = load_graph(graph).data_files()
    snapshot = tmp_path / "models--x" / "snapshots" / "abc" / "onnx"
    snapshot.mkdir(parents=True)
    for number, path in enumerate((graph, file)):
        blob = tmp_path / "models--x" / "blobs" / f"{number}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, blob)
        link(snapshot / path.name, f"../../../blobs/{number}") if kind == "links" else os.link(
            blob, snapshot / path.name
        )
    adapter = str(tiny.adapter("llama"))
    for verb, rest in {
        "merge-onnx": ["--checkpoint", str(tiny.checkpoint("llama"))],
        "swap-onnx": ["--checkpoint", str(tiny.checkpoint("llama"))],
    }.items():
        made = []
        for base in (snapshot / graph.name, graph):
            out = tmp_path / f"{len(made)}-{verb}" / "out.onnx"
            out.parent.mkdir()
            given = ["--base", str(base), "--adapter", adapter, "-o", str(out)]
            assert _run([verb, *given, *rest], False) == 0
            made.append([(path.name, path.read_bytes()) for path in sorted(out.parent.iterdir())])
        assert made[0] == made[1]
