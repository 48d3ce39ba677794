"""`merge-onnx` with bad input: every problem listed, exit 1, nothing half-written, no traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import tiny
from half_graphs import half_graph, small_adapter
from safetensors.numpy import load_file, save_file

from lora_export import Adapter, LoraModule, SiteError, load_adapter, merge_onnx, save_adapter
from lora_export.cli import _run


@pytest.fixture
def adapter(tmp_path):
    """A copy of a good adapter, to be damaged."""
    folder = tmp_path / "adapter"
    shutil.copytree(tiny.adapter("llama"), folder)
    return folder


pytestmark = pytest.mark.xdist_group("llama")


@pytest.fixture
def base():
    return tiny.base_onnx("llama", "dynamo")


@pytest.fixture
def out(tmp_path):
    """An output folder with an old result in it, which has to survive every failure."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("m.onnx", "m.onnx.data", "m.lora.json"):
        (folder / name).write_text("old")
    return folder


def refused(capsys, base, adapter, out, *more):
    """Run the command with --force, check that it fails cleanly, and return what it said."""
    capsys.readouterr()
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", out / "m.onnx", "--force", *more]
    assert _run([str(argument) for argument in arguments], False) == 1
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("Error: ")
    assert "Traceback" not in said.err
    assert "hint: " in said.err
    assert sorted(path.name for path in out.iterdir()) == ["m.lora.json", "m.onnx", "m.onnx.data"]
    assert {path.read_text() for path in out.iterdir()} == {"old"}
    return said.err


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_missing_files(capsys, base, adapter, out, tmp_path):
    assert "nothing.onnx" in refused(capsys, tmp_path / "nothing.onnx", adapter, out)
    assert "nothing" in refused(capsys, base, tmp_path / "nothing", out)
    assert "nothing" in refused(capsys, base, adapter, out, "--checkpoint", tmp_path / "nothing")


def test_truncated_graph_and_empty_file(capsys, adapter, out, tmp_path):
    whole = tiny.base_onnx("llama", "torchscript").read_bytes()
    short = tmp_path / "short.onnx"
    short.write_bytes(whole[: len(whole) // 2])
    assert "not a readable ONNX file" in refused(capsys, short, adapter, out)
    short.write_bytes(b"")
    assert "no nodes" in refused(capsys, short, adapter, out)


def test_external_data_missing_or_short(capsys, base, adapter, out, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(base.parent, copy)
    data = copy / "model.onnx.data"
    values = data.read_bytes()
    data.write_bytes(values[: len(values) // 2])
    said = refused(capsys, copy / "model.onnx", adapter, out)
    assert "external data can't be read" in said
    assert said.count("model.onnx.data") > 1
    data.unlink()
    assert "does not exist" in refused(capsys, copy / "model.onnx", adapter, out)


def test_truncated_adapter_and_no_config(capsys, base, adapter, out):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert "adapter_model.safetensors" in refused(capsys, base, adapter, out)
    file.write_bytes(whole)
    (adapter / "adapter_config.json").write_text("{ no json")
    assert "adapter_config.json" in refused(capsys, base, adapter, out)


def test_wrong_base_lists_every_shape(capsys, adapter, out, tmp_path):
    """The same architecture in another size: every module is named, with both shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import lora_export.base.capture.capture

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    other = lora_export.base.capture.capture.capture_checkpoint(tmp_path / "other", tmp_path / "other.onnx")
    said = refused(capsys, other, adapter, out)
    modules = {name for name in load_file(adapter / "adapter_model.safetensors") if "lora_A" in name}
    assert said.count("shapes differ") == len(modules) == 14
    assert said.count("the graph's weight is") == 14
    assert "(48, 48)" in said
    assert str(load_adapter(adapter).modules["model.layers.0.self_attn.q_proj.weight"].weight_shape) in said


def test_adapter_for_another_architecture(capsys, adapter, out):
    said = refused(capsys, tiny.base_onnx("gpt2", "torchscript"), adapter, out)
    assert "was made for another model: none of its 14 parameters" in said
    # A line for all of them; JSON and Python have each.
    assert re.search(r"(model\.layers\.\S+\.weight, ){2}\S+ and 11 more  not found: ", said)
    with pytest.raises(SiteError) as caught:
        merge_onnx(tiny.base_onnx("gpt2", "torchscript"), adapter, out / "other.onnx")
    assert sum("not found" in problem for problem in caught.value.problems) == 14
    # --allow-unmatched does not turn "nothing matches" into the base under an adapter's name.
    refused(capsys, tiny.base_onnx("gpt2", "torchscript"), adapter, out, "--allow-unmatched")


def test_tensors_without_a_place(capsys, base, adapter, out):
    def rename(tensors):
        for name in [name for name in tensors if ".layers.1.mlp.up_proj." in name]:
            tensors[name.replace("up_proj", "side_proj")] = tensors.pop(name)

    edit_tensors(adapter, rename)
    said = refused(capsys, base, adapter, out)
    assert "1 parameters with no place in model.onnx (of 14)" in said
    assert "model.layers.1.mlp.side_proj.weight" in said
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", out / "m.onnx", "--force"]
    assert _run([*map(str, arguments), "--allow-unmatched"], False) == 0
    assert "left out: model.layers.1.mlp.side_proj.weight" in capsys.readouterr().err
    rows = json.loads((out / "m.lora.json").read_text())["plan"]["rows"]
    assert [row["parameter"] for row in rows if row["action"] == "refused"] == [
        "model.layers.1.mlp.side_proj.weight"
    ]


def test_half_a_pair_nan_and_rank_are_listed_together(capsys, base, adapter, out):
    def damage(tensors):
        names = sorted(name for name in tensors if "lora_A" in name)
        del tensors[names[0].replace("lora_A", "lora_B")]
        tensors[names[1]][0, 0] = np.nan
        tensors[names[2]] = tensors[names[2]][:2]

    edit_tensors(adapter, damage)
    said = refused(capsys, base, adapter, out)
    assert len([line for line in said.splitlines() if line.startswith("  ")]) >= 3


@pytest.mark.parametrize("config", [{"r": 0}, {"r": -4}, {"lora_alpha": 0}, {"lora_alpha": -1}, {"r": 3}])
def test_rank_and_alpha_that_can_not_be(capsys, base, adapter, out, config):
    edit_config(adapter, **config)
    key = next(iter(config))
    assert key in refused(capsys, base, adapter, out) or key == "r"


def test_weights_and_adapters_of_different_number(capsys, base, adapter, out):
    assert "2 weights" in refused(capsys, base, adapter, out, "--weight", "1", "--weight", "2")
    assert "not a finite number" in refused(capsys, base, adapter, out, "--weight", "nan")


def test_dora_in_a_blend(capsys, base, out):
    adapter = tiny.adapter("llama", "dora")
    assert "DoRA" in refused(capsys, base, adapter, out, "--weight", "0.5")


def test_the_same_adapter_twice_one_after_the_other(capsys, base, adapter, out, tmp_path):
    merge_onnx(base, adapter, tmp_path / "once.onnx")
    assert "has this adapter merged into it already" in refused(capsys, tmp_path / "once.onnx", adapter, out)


@pytest.mark.parametrize(
    ("arch", "feature"),
    [("llama", "plain"), pytest.param("qwen2_moe", "target_parameters", marks=pytest.mark.slow)],
)
def test_wrong_checkpoint_is_noticed(capsys, out, tmp_path, arch, feature):
    """Names and shapes agree, values do not: the graph was not made of this checkpoint."""
    base, adapter = tiny.base_onnx(arch, "dynamo"), tiny.adapter(arch, feature)
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint(arch), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: np.roll(values, 1, axis=0) for name, values in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = refused(capsys, base, adapter, out, "--checkpoint", folder)
    assert said.count("does not hold the checkpoint's values") == len(load_adapter(adapter).modules)
    assert "was not exported from this checkpoint" in said


def test_output_that_exists_without_force(base, adapter, out, capsys):
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", out / "m.onnx"]
    capsys.readouterr()
    assert _run([str(argument) for argument in arguments], False) == 1
    said = capsys.readouterr().err
    assert all(f"out/m.{end}" in said for end in ("onnx", "onnx.data", "lora.json"))


def test_output_folder_that_can_not_be_written(base, adapter, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", tmp_path / "file" / "m.onnx"]
    capsys.readouterr()
    assert _run([str(argument) for argument in arguments], False) == 1
    assert "cannot write" in capsys.readouterr().err


def test_output_folder_that_is_read_only(base, adapter, tmp_path):
    """Root may write anywhere, so as root the process gives up its capabilities first."""
    without_rights = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("runs as root, and there is no setpriv to give up root's rights with")
        without_rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", closed / "m.onnx"]
    script = "from lora_export.cli import main; main()"
    command = [*without_rights, sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot write into" in done.stderr
    assert not list(closed.iterdir())


def test_output_that_would_replace_the_base(capsys, base, adapter, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(base.parent, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    arguments = ["merge-onnx", "--base", copy / "model.onnx", "--adapter", adapter, "--force"]
    capsys.readouterr()
    assert _run([*map(str, arguments), "-o", str(copy / "model.onnx")], False) == 1
    assert "would replace a file that is read" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in copy.iterdir()}


def test_a_value_that_the_type_can_not_hold(capsys, out, tmp_path):
    folder, _ = small_adapter(tmp_path / "a", 1e6)
    said = refused(capsys, half_graph(tmp_path / "half.onnx", np.float16), folder, out)
    assert "fc" in said
    assert "not finite" in said


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_weights_are_rounded_once(dtype, tmp_path):
    """Oracle: PyTorch adds in float32 and rounds once; every element must be the same."""
    import torch

    folder, module = small_adapter(tmp_path / "a", 0.01)
    base = half_graph(tmp_path / "half.onnx", dtype)
    report = merge_onnx(base, folder, tmp_path / "m.onnx")
    stored = ir.load(base).graph.initializers["fc.weight"].const_value.numpy().astype(np.float32)
    a, b = torch.from_numpy(module.lora_a), torch.from_numpy(module.lora_b)
    exact = torch.from_numpy(stored) + (b @ a).T
    half = torch.float16 if dtype is np.float16 else torch.bfloat16
    got = ir.load(tmp_path / "m.onnx").graph.initializers["fc.weight"].const_value.numpy()
    assert np.array_equal(got.astype(np.float32), exact.to(half).float().numpy())
    delta = (b @ a).T.double()
    error = (exact.to(half).double() - exact.double()).norm() / delta.norm()
    assert report.total.relative == pytest.approx(error.item(), rel=1e-3)
    lost = (exact.to(half).float() == torch.from_numpy(stored)).double().mean().item()
    assert report.total.lost_share == pytest.approx(lost, abs=1e-3)


def test_rounding_loss_is_warned_about(capsys, tmp_path):
    folder, _ = small_adapter(tmp_path / "a", 1e-4)
    base = half_graph(tmp_path / "half.onnx", ml_dtypes.bfloat16)
    arguments = ["merge-onnx", "--base", base, "--adapter", folder, "-o", tmp_path / "m.onnx"]
    assert _run([str(argument) for argument in arguments], False) == 0
    assert "warning: rounding to the stored type lost much" in capsys.readouterr().err


SCRIPT = """
import os, sys
from lora_export.cli import _run
from lora_export import merge_onnx
{setup}
base, adapter, out = sys.argv[1:]
{call}
"""
KILL = "merge_onnx(base, adapter, out, force=True, progress=lambda count: os.kill(os.getpid(), 9))"
FULL = (
    "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
)
CLI = "sys.exit(_run(['merge-onnx', '--base', base, '--adapter', adapter, '-o', out, '--force'], False))"


def in_process(setup, call, base, adapter, out):
    script = SCRIPT.format(setup=setup, call=call)
    command = [sys.executable, "-c", script, str(base), str(adapter), str(out / "m.onnx")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_killed_process_leaves_the_old_files(base, adapter, out):
    done = in_process("", KILL, base, adapter, out)
    assert done.returncode == -signal.SIGKILL
    assert all((out / name).read_text() == "old" for name in ("m.onnx", "m.onnx.data", "m.lora.json"))


def test_a_full_disk_leaves_the_old_files(base, adapter, out):
    """A file size limit stands in for the full disk: the kernel refuses the write in the same way."""
    done = in_process(FULL, CLI, base, adapter, out)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["m.lora.json", "m.onnx", "m.onnx.data"]
    assert {path.read_text() for path in out.iterdir()} == {"old"}


def big_graph(path, layers, rows, cols, dtype=np.float32):
    """Write a chain of MatMuls whose data file is sparse: zeros, but for the first row of each weight."""
    size = rows * cols * np.dtype(dtype).itemsize
    data = path.with_name(path.name + ".data")
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    x = ir.Input("x", ir.Shape(("batch", rows)), ir.TensorType(kind))
    value, nodes, weights = x, [], []
    with data.open("wb") as file:
        file.truncate(layers * size)
        for layer in range(layers):
            file.seek(layer * size)
            file.write(np.full(cols, layer + 1, dtype).tobytes())
            tensor = ir.ExternalTensor(
                data.name,
                layer * size,
                size,
                kind,
                shape=ir.Shape((rows, cols)),
                name=f"layers.{layer}.fc.weight",
                base_dir=path.parent,
            )
            weights.append(
                ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
            )
            nodes.append(ir.node("MatMul", [value, weights[-1]], name=f"/layers.{layer}/fc/MatMul"))
            value = nodes[-1].outputs[0]
            value.name = f"y{layer}"
    value.type = ir.TensorType(kind)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="big")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def big_adapter(folder, layers, rows, cols):
    rng = np.random.default_rng(0)
    modules = {}
    for layer in range(layers):
        path = f"layers.{layer}.fc"
        a, b = rng.normal(size=(8, rows)), rng.normal(size=(cols, 8))
        names = (f"{path}.a", f"{path}.b")
        module = LoraModule(
            path, "linear", a.astype(np.float32), b.astype(np.float32), alpha=8, rank=8, tensor_names=names
        )
        modules[module.key] = module
    names = tuple(name for module in modules.values() for name in module.tensor_names)
    return save_adapter(Adapter("big", "big", "peft", modules, tensor_names=names), folder), modules


# The peak of this process alone: ru_maxrss would still hold the parent's size at the fork.
PEAK = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


@pytest.mark.slow
def test_above_2_gb_in_little_memory(tmp_path):
    """2.6 GB of weights, float32 square layers: streamed, whatever the size."""
    layers, size = 10, 8064
    base = big_graph(tmp_path / "big.onnx", layers, size, size)
    folder, modules = big_adapter(tmp_path / "adapter", layers, size, size)
    (tmp_path / "out").mkdir()
    done = in_process("", f"merge_onnx(base, adapter, out); {PEAK}", base, folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 160_000, f"{int(done.stdout) / 1000} MB"
    output = tmp_path / "out" / "m.onnx"
    assert output.with_name("m.onnx.data").stat().st_size >= 2**31
    merged = ir.load(output)
    for layer in (0, layers - 1):
        module = modules[f"layers.{layer}.fc.weight"]
        values = merged.graph.initializers[f"layers.{layer}.fc.weight"].const_value.numpy()
        delta = (module.lora_b.astype(np.float64) @ module.lora_a).T
        for row in (0, 1, size - 1):
            wanted = delta[row] + (layer + 1 if row == 0 else 0)
            assert np.abs(values[row] - wanted).max() < 1e-4


@pytest.mark.parametrize("step", ["save_graph", "write_data"])
def test_no_space_at_any_step_leaves_the_old_files(capsys, base, adapter, out, monkeypatch, step):
    import errno

    import lora_export.modes.merge_onnx as mode

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mode, step, full)
    assert "No space left on device" in refused(capsys, base, adapter, out)


def test_a_folder_is_never_replaced_by_a_file(capsys, base, adapter, tmp_path):
    """Not even with --force: it may be the adapter, the checkpoint, or somebody's work."""
    folder = tmp_path / "work.onnx"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", folder, "--force"]
    capsys.readouterr()
    assert _run([str(argument) for argument in arguments], False) == 1
    assert "a folder of the output's name exists, but the output is a file" in capsys.readouterr().err
    plot = tmp_path / "plot.html"
    folder.rename(plot)
    assert _run(["inspect", str(adapter), "--plot", str(plot), "--force"], False) == 1
    assert "a folder of the output's name exists, but the output is a file" in capsys.readouterr().err
    assert (plot / "thesis.txt").read_text() == "years"


def test_the_inputs_are_never_replaced(capsys, base, adapter, tmp_path):
    for target in (adapter, base):
        capsys.readouterr()
        arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", target, "--force"]
        assert _run([str(argument) for argument in arguments], False) == 1
        assert target.exists()
    assert (adapter / "adapter_config.json").exists()


def test_an_output_of_another_ending(capsys, base, adapter, tmp_path):
    capsys.readouterr()
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", tmp_path / "merged"]
    assert _run([str(argument) for argument in arguments], False) == 1
    assert f"-o {tmp_path / 'merged' / 'model.onnx'}" in capsys.readouterr().err


def test_a_checkpoint_that_confirms_nothing(capsys, base, adapter, out):
    said = refused(capsys, base, adapter, out, "--checkpoint", tiny.checkpoint("bert"))
    assert "stores none of the 14 parameters" in said


def test_a_checkpoint_that_confirms_some(capsys, base, adapter, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = merge_onnx(base, adapter, tmp_path / "m.onnx", checkpoint=folder)
    assert [note.split(":")[0] for note in report.plan.notes] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_quantised_graph_is_called_so(capsys, adapter, out, tmp_path, exporter):
    """The quantiser of onnxruntime drops the names of a dynamo export; the operators still tell."""
    import contextlib
    import io

    from onnxruntime.quantization import quantize_dynamic

    with contextlib.redirect_stdout(io.StringIO()):
        quantize_dynamic(tiny.base_onnx("llama", exporter), tmp_path / "q.onnx")
    said = refused(capsys, tmp_path / "q.onnx", adapter, out)
    assert "has quantised weights (Gather, MatMulInteger)" in said
    assert "lora-export swap-onnx" in said


def test_share_base_with_nothing_to_share(capsys, adapter, out):
    said = refused(capsys, tiny.base_onnx("llama", "torchscript"), adapter, out, "--share-base")
    assert "nothing can be shared" in said


def test_weights_or_an_adapter_as_the_base(capsys, adapter, out):
    weights = tiny.checkpoint("llama") / "model.safetensors"
    assert "holds weights, not a graph" in refused(capsys, weights, adapter, out)
    assert "is an adapter, not a base model" in refused(
        capsys, tiny.adapter("llama"), adapter, out, "--quiet"
    )


def test_a_dry_run_says_what_is_in_the_way(capsys, base, adapter, out):
    capsys.readouterr()
    arguments = ["merge-onnx", "--base", base, "--adapter", adapter, "-o", out / "m.onnx", "--dry-run"]
    assert _run([str(argument) for argument in arguments], False) == 0
    assert "--force would be needed" in capsys.readouterr().out
