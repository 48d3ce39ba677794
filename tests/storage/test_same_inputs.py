"""lora_export.storage.inputs: what a result is made from stays as it is, or there is no result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from importlib import import_module

import numpy as np
import onnx
import pytest
from half_graphs import small_adapter
from onnx import helper, numpy_helper
from output_cases import CASES
from small_graphs import adapter as adapter_of

import lora_export
from lora_export import InputChangedError, LoraModule, cli
from lora_export.formats.reading import tensors
from lora_export.formats.reading.tensors import write_safetensors
from lora_export.packages import onnxruntime_genai
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.inputs import FileState, note_inputs, refuse_changed_inputs, same_inputs
from lora_export.storage.outputs import OutputSet

NAMES = ("a.weight", "fc.weight", "z.weight")


def checkpoint(folder, value):
    """Write three shards, so that one of them is read after another."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    shards = {name: f"model-0000{n}-of-00003.safetensors" for n, name in enumerate(NAMES, 1)}
    for name, shard in shards.items():
        write_safetensors(folder / shard, {name: np.full((64, 64), value, np.float32)}, {"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def graph(path, value):
    """Write two products, whose weights lie beside the graph, and a bias within it."""
    path.parent.mkdir(exist_ok=True)
    nodes = [
        helper.make_node("MatMul", ["x", "p.weight"], ["t"], name="/p/MatMul"),
        helper.make_node("MatMul", ["t", "q.weight"], ["u"], name="/q/MatMul"),
        helper.make_node("Add", ["u", "q.bias"], ["y"], name="/q/Add"),
    ]
    shapes = {"p.weight": (64, 64), "q.weight": (64, 64), "q.bias": (64,)}
    constants = [numpy_helper.from_array(np.full(s, value, np.float32), n) for n, s in shapes.items()]
    ends = [helper.make_tensor_value_info(name, 1, ["batch", 64]) for name in "xy"]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = path.name + ".data"
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=1024)
    return path


def replaced(path, value):
    """Let another run write another base under the same names, as a commit does."""
    other = graph(path.parent / "next" / path.name, value)
    for name in (path.name + ".data", path.name):
        (other.parent / name).replace(path.parent / name)


def lora(value=0.01):
    a, b = np.full((1, 64), value, np.float32), np.full((64, 1), value, np.float32)
    return adapter_of(LoraModule("q", "linear", a, b, alpha=1.0, rank=1))


def test_a_checkpoint_replaced_while_it_is_merged(tmp_path):
    small_adapter(tmp_path / "adapter", 0.01)
    base, other = checkpoint(tmp_path / "base", 1.0), checkpoint(tmp_path / "other", 2.0)
    seen = []

    def progress(_):
        if not seen:
            seen.append(1)
            base.rename(tmp_path / "old")
            other.rename(base)

    with pytest.raises(InputChangedError, match="two models") as refused:
        lora_export.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", progress=progress)
    assert f"{base / 'model-00003-of-00003.safetensors'}: replaced by another file" in refused.value.problems
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["merge_onnx", "swap_onnx"])
def test_a_graph_replaced_between_its_nodes_and_its_weights(verb, tmp_path, monkeypatch):
    import lora_export.modes.branches.output as exposing
    import lora_export.modes.merge_onnx as merging

    base = graph(tmp_path / "base.onnx", 1.0)
    module = merging if verb == "merge_onnx" else exposing
    own = module.plan_data

    def plan_data(*given):
        replaced(base, 2.0)
        return own(*given)

    monkeypatch.setattr(module, "plan_data", plan_data)
    given = {"adapters" if verb == "merge_onnx" else "adapter": lora()}
    with pytest.raises(InputChangedError) as refused:
        getattr(lora_export, verb)(base, output=tmp_path / "out.onnx", checkpoint=False, **given)
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [
        str(base),
        str(tmp_path / "base.onnx.data"),
    ]
    assert not list(tmp_path.glob("out*"))


def test_parity_of_a_candidate_replaced_before_it_is_run(tmp_path, monkeypatch):
    from lora_export.parity.sides import sides

    right, wrong = graph(tmp_path / "right.onnx", 1.0), graph(tmp_path / "wrong.onnx", 2.0)
    own = sides.open_candidate

    def open_candidate(*given):
        replaced(wrong, 1.0)
        return own(*given)

    monkeypatch.setattr(sides, "open_candidate", open_candidate)
    with pytest.raises(InputChangedError, match="changed while being read"):
        lora_export.check_parity(right, wrong)


def overwrite(path, factor):
    """Save other values into the very file, as safetensors' own writer does."""
    held, metadata = tensors.read_safetensors(path)
    values = {name: np.array(array) * np.float32(factor) for name, array in held.items()}
    write_safetensors(path.with_name("next"), values, metadata)
    with path.open("r+b") as file:
        file.write(path.with_name("next").read_bytes())
    path.with_name("next").unlink()
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))  # a clock of any step


def test_an_adapter_overwritten_after_it_was_loaded(tmp_path):
    small_adapter(tmp_path / "adapter", 0.01)
    file = next((tmp_path / "adapter").glob("*.safetensors"))
    base = checkpoint(tmp_path / "base", 1.0)
    loaded = lora_export.load_adapter(tmp_path / "adapter")
    overwrite(file, 100)
    with pytest.raises(InputChangedError, match="since loading"):
        lora_export.merge_checkpoint(base, loaded, tmp_path / "out")
    loaded = lora_export.load_adapter(tmp_path / "adapter")
    file.write_bytes(b"")
    with pytest.raises(InputChangedError, match="since loading"):
        lora_export.merge_checkpoint(base, loaded, tmp_path / "out")


def test_an_adapter_replaced_after_it_was_loaded_is_the_old_one(tmp_path):
    small_adapter(tmp_path / "adapter", 0.01)
    small_adapter(tmp_path / "next", 5.0)
    base = checkpoint(tmp_path / "base", 1.0)
    lora_export.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "wanted")
    loaded = lora_export.load_adapter(tmp_path / "adapter")
    for file in (tmp_path / "next").iterdir():
        file.replace(tmp_path / "adapter" / file.name)
    lora_export.merge_checkpoint(base, loaded, tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "wanted").glob("*.safetensors"))]
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == [
        (tmp_path / "wanted" / name).read_bytes() for name in names
    ]


def test_header_and_values_are_of_one_file(tmp_path, monkeypatch):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_safetensors(file, {"x": np.ones(8, np.float32)}, {})
    write_safetensors(other, {"x": np.zeros(8, np.float32)}, {"note": "a longer header" * 20})
    own = tensors.read_header

    def read_header(path):
        found = own(path)
        other.replace(file)
        return found

    monkeypatch.setattr(tensors, "read_header", read_header)
    with pytest.raises(InputChangedError, match="changed while being read"):
        tensors.read_safetensors(file)


def test_what_a_run_replaces_itself_is_no_change(tmp_path):
    file = tmp_path / "f"
    file.write_text("old")
    with same_inputs():
        note_inputs([file])
        for text in ("new", "newer"):
            with OutputSet(force=True) as outputs:
                outputs.stage(file).write_text(text)
                outputs.commit()
    assert file.read_text() == "newer"


def test_inputs_are_those_of_one_result(tmp_path):
    """Of another run in the same thread (a callback's), of another thread, and of none."""
    file = tmp_path / "f"
    file.write_text("old")

    def change():
        file.write_text("another size")

    with same_inputs():
        note_inputs([file])
        with same_inputs():
            change()
            refuse_changed_inputs()
        beside = threading.Thread(target=refuse_changed_inputs)
        beside.start()
        beside.join()
        with pytest.raises(InputChangedError, match="a file has changed"), same_inputs(at_end=True):
            pass  # a part of it
    refuse_changed_inputs()


def test_what_became_of_a_file(tmp_path):
    file = tmp_path / "f"
    absent = FileState.of(file)
    file.write_text("a")
    state = FileState.of(file)
    assert state.change() == ""
    assert absent.change() == f"{file}: was not there"
    file.write_text("ab")
    assert state.change() == f"{file}: written to (1 bytes then, 2 now)"
    (tmp_path / "g").write_text("a")
    (tmp_path / "g").replace(file)
    assert state.change() == f"{file}: replaced by another file"
    file.unlink()
    assert state.change() == f"{file}: not there any more"


def test_a_benchmark_of_a_model_replaced_before_it_is_timed(tmp_path, monkeypatch):
    from lora_export.bench import run

    model = graph(tmp_path / "m.onnx", 1.0)
    own = run._open_all

    def open_all(*given):
        replaced(model, 2.0)
        return own(*given)

    monkeypatch.setattr(run, "_open_all", open_all)
    monkeypatch.setattr(run, "_probe_all", lambda *_: [None])
    with pytest.raises(InputChangedError, match="2 files have changed while being read"):
        run.run_bench(model, seconds=0.2)


def test_what_was_read_in_a_scratch_folder_of_ours_is_no_input():
    """Parity reads graphs that it has made for itself, and they go with their folder."""
    with same_inputs(at_end=True):
        with scratch_folder() as folder:
            (folder / "probes.onnx").write_bytes(b"x")
            note_inputs([folder / "probes.onnx"])
        refuse_changed_inputs()


def shards(folder, value, alpha=4):
    """Write an adapter of two shards with their index and config: B of the second, A of the first."""
    folder.mkdir()
    names = {f"base_model.model.fc.lora_{half}.weight": half for half in "AB"}
    files = {name: f"adapter_model-0000{n}-of-00002.safetensors" for n, name in enumerate(names, 1)}
    for name, half in names.items():
        values = np.full((4, 64) if half == "A" else (64, 4), value, np.float32)
        write_safetensors(folder / files[name], {name: values}, {})
    index = {"metadata": {"of": value}, "weight_map": files}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["fc"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft(folder, value, alpha=4):
    """Write weights and config, as save_pretrained does."""
    shards(folder, value, alpha)
    a, b = (tensors.read_safetensors(path)[0] for path in sorted(folder.glob("*.safetensors")))
    for path in [*folder.glob("*-of-*"), folder / "adapter_model.safetensors.index.json"]:
        path.unlink()
    values = {name: np.array(value) for name, value in {**a, **b}.items()}
    write_safetensors(folder / "adapter_model.safetensors", values, {})
    return folder


HOOKED = """
import os, sys
live, new, backwards, at, *rest = sys.argv[1:]
names = sorted(os.listdir(new), reverse=backwards == "True")
seen = 0
def hook(event, given):
    global seen
    if event in ("open", "os.listdir", "os.scandir") and str(given[0]).startswith(live):
        if int(at) <= seen and names:
            os.replace(os.path.join(new, name := names.pop(0)), os.path.join(live, name))
        seen += 1
sys.addaudithook(hook)
import lora_export
found = lora_export.load_adapter(live)
(module,) = found.modules.values()
print(float(module.lora_a.flat[0]), float(module.lora_b.flat[0]), module.alpha)
seen = -1 if seen <= int(at) else seen
print(seen)
"""


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("make", [shards, peft])
def test_an_adapter_replaced_file_by_file_while_it_is_loaded(make, backwards, tmp_path):
    """At every file that is opened, and one more at each that follows: it is one of both, or refused."""
    at, seen = 0, set()
    while True:
        place = tmp_path / str(at)
        place.mkdir()
        live, new = make(place / "live", 0.25, 4), make(place / "new", 0.5, 400)
        given = [str(live), str(new), str(backwards), str(at)]
        done = subprocess.run(
            [sys.executable, "-c", HOOKED, *given], capture_output=True, text=True, check=False
        )
        if done.returncode:
            assert "InputChangedError" in done.stderr, f"{at}: {done.stderr}"
            seen.add("refused")
        else:
            values, number = done.stdout.splitlines()
            assert values in ("0.25 0.25 4.0", "0.5 0.5 400.0"), at
            seen.add(values)
            if number == "-1":
                break
        at += 1
    assert {"0.25 0.25 4.0", "0.5 0.5 400.0"} <= seen
    assert at >= 4


@pytest.mark.parametrize("verb", ["merge", "merge-onnx", "swap-onnx", "bank-onnx", "convert-adapter"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_replaced_after_a_command_has_loaded_it(name, verb, tmp_path, monkeypatch, capsys):
    """Half of what a download brings came before the command read it, the other half while it went on."""
    (tmp_path / "out").mkdir()
    arguments = [str(word) for word in CASES[verb].arguments(tmp_path, tmp_path / "out")]
    module = import_module(f"lora_export.commands.{verb.replace('-', '_')}")
    own = module.load_all

    def load_all(*given):
        loaded = own(*given)
        file = tmp_path / "adapter" / name
        (tmp_path / "next").write_bytes(file.read_bytes())
        (tmp_path / "next").replace(file)
        return loaded

    monkeypatch.setattr(module, "load_all", load_all)
    assert cli._run(arguments, False) == 1
    assert f"{tmp_path / 'adapter' / name}: replaced by another file" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert cli._run(arguments, False) == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "genai_config.json"])
def test_what_lies_beside_the_base_replaced_after_it_was_read(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    arguments = [str(word) for word in CASES["swap-onnx"].arguments(tmp_path, tmp_path / "out")]
    own = onnxruntime_genai.companions_of

    def companions_of(*given):
        found = own(*given)
        file = tmp_path / "g" / name
        (tmp_path / "next").write_bytes(file.read_bytes())
        (tmp_path / "next").replace(file)
        return found

    monkeypatch.setattr(onnxruntime_genai, "companions_of", companions_of)
    assert cli._run(arguments, False) == 1
    assert f"{tmp_path / 'g' / name}: replaced by another file" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_what_a_command_replaces_itself_is_no_change(tmp_path):
    """Also where it was noted for the command, and not for the result."""
    file = tmp_path / "f"
    file.write_text("old")
    with same_inputs(command=True):
        note_inputs([file])
        with same_inputs(), OutputSet(force=True) as outputs:
            outputs.stage(file).write_text("new")
            outputs.commit()
        with same_inputs():
            refuse_changed_inputs()
            file.write_text("another size")
            refuse_changed_inputs()
