"""Engines are built by the real compiler, TensorRT-RTX, for GPUs that are not here. None is executed."""

import json
import os
import signal
import subprocess
import sys
import time

import onnx
import pytest
import tiny
from engine_graphs import SMALL, graph_of, made, product, run, value
from exposed_models import group
from onnx import TensorProto, helper

from lora_export import build_engine, swap_onnx
from lora_export.engines.profiles import ProfileRequest
from lora_export.engines.record import BuildOptions, read_engine
from lora_export.errors import BackendError, BackendUnavailable, EngineBuildError, GraphError, OutputError
from lora_export.graph import data_identity
from lora_export.machines.packages import PACKAGES
from lora_export.machines.targets import RTX_COMPUTE_CAPABILITIES
from lora_export.storage.hashes import sha256_of

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")


GRAPHS = [
    ("merge", "llama", {}),
    ("merge", "conv", {}),
    ("swap", "llama", {}),  # flavour ort: the builder makes the other one of it
    ("swap", "bert", {"flavour": "tensorrt", "pack": True}),
    ("swap", "bert", {"flavour": "tensorrt", "fuse_base": True}),
    ("swap", "gpt2", {"flavour": "tensorrt", "dora": True}),
    ("swap", "conv", {"flavour": "tensorrt"}),
    ("bank", "llama", {}),
    ("bank", "llama", {"flavour": "tensorrt", "pack": True}),
    ("bank", "conv", {"flavour": "tensorrt", "resident": "inputs"}),
    ("bank", "gpt2", {"resident": "inputs", "flavour": "tensorrt"}),
]


@pytest.mark.parametrize(
    ("mode", "arch", "options"),
    [pytest.param(*case, marks=group(case[1]), id="-".join([*case[:2], *case[2]])) for case in GRAPHS],
)
def test_the_engine_is_the_graphs(mode, arch, options, tmp_path):
    """What the record says is what the graph and its LoRA record say, and the engine's own bytes hold it."""
    model, exposed = made(mode, arch, tmp_path, **options)
    shapes = SMALL if arch != "conv" else {"batch": "1:1:2"}
    report = build_engine(model, "sm89", tmp_path / "out", shapes=shapes)
    path = report.engines[0].path
    assert path.name == "m.sm89.engine"
    record = read_engine(path)
    graph = onnx.load(model, load_external_data=False).graph
    lora = set(exposed.tensor_names()) if exposed else set()
    if mode == "bank" and options.get("resident") != "inputs":
        lora = set()
    constants = {value.name for value in graph.initializer} - lora
    wanted = {value.name: value for value in graph.input if value.name not in constants}
    assert {port.name for port in record.inputs} == set(wanted) | lora
    assert [port.name for port in record.outputs] == [value.name for value in graph.output]
    for port in (*record.inputs, *record.outputs):
        value = next(v for v in [*graph.input, *graph.output] if v.name == port.name)
        tensor = value.type.tensor_type
        assert port.dtype == str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        assert [dim.dim_value or -1 for dim in tensor.shape.dim] == list(port.shape)
    (profile,) = record.profiles
    varying = {port.name for port in record.inputs if -1 in port.shape}
    assert set(profile.shapes) == varying
    if mode == "swap" and arch != "conv":
        for module in exposed.modules:
            high = exposed.max_rank * len(module.members)
            assert profile.shapes[module.lora_a] == tuple(
                (module.in_dim, rank) for rank in (1, exposed.max_rank // 2 * len(module.members), high)
            )
    data = path.read_bytes()
    assert all(name.encode() in data for name in lora), "the engine's own bytes name its inputs"
    assert record.exposed == (report_record(exposed) if exposed else None)
    assert record.size_bytes == len(data)
    assert record.memory["weights"] > 0


def report_record(exposed):
    from dataclasses import replace

    return replace(exposed, flavour="tensorrt")


def test_one_engine_for_every_gpu(tmp_path):
    model = product(tmp_path / "m.onnx", dtype=TensorProto.FLOAT16)  # Turing can't multiply float32
    one = build_engine(model, "sm89", tmp_path / "one").engines[0]
    report = build_engine(model, "all", tmp_path / "all", together=True)
    (engine,) = report.engines
    assert engine.path.name == "m.all.engine"
    assert engine.record.compute_capabilities == RTX_COMPUTE_CAPABILITIES
    assert engine.record.size_bytes > one.record.size_bytes


@group("llama")
def test_the_command_builds_and_takes_the_second_from_the_cache(tmp_path, capsys):
    model, _ = made("swap", "llama", tmp_path)
    capsys.readouterr()  # what making the base graph says
    command = [
        "build-engine",
        str(model),
        "--target",
        "rtx-4090",
        "--target",
        "RTX 4080",
        "--shape",
        "batch=1",
    ]
    command += ["-o", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache"), "--json"]
    first = json.loads(run(capsys, *command)[1])
    assert [engine["cached"] for engine in first["engines"]] == [False, True]  # one compute capability
    second = json.loads(run(capsys, *command, "--force")[1])
    assert [engine["cached"] for engine in second["engines"]] == [True, True]
    assert {engine["sha256"] for engine in [*first["engines"], *second["engines"]]} == {
        sha256_of(tmp_path / "out" / "m.rtx-4090.engine")
    }
    code, _, said = run(capsys, *command)
    assert code == 1
    assert "exists already" in said


@group("llama")
@pytest.mark.parametrize("what", ["weights", "shape", "option", "target"])
def test_what_changed_is_built_again(what, tmp_path):
    model, _ = made("merge", "llama", tmp_path)
    options = {"shapes": SMALL, "cache": tmp_path / "cache"}
    target = "sm89"
    if what == "weights":  # Of a graph that doesn't say what they are: ours would be refused.
        proto = onnx.load(model, load_external_data=False)
        kept = [entry for entry in proto.metadata_props if entry.key != data_identity.KEY]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
        onnx.save(proto, model)
    build_engine(model, target, tmp_path / "a", **options)
    if what == "weights":
        data = bytearray((tmp_path / "m.onnx.data").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "m.onnx.data").write_bytes(data)
    elif what == "shape":
        options["shapes"] = SMALL | {"batch": "1:1:3"}
    elif what == "option":
        options["options"] = BuildOptions(tf32=True)
    else:
        target = "sm86"
    assert not build_engine(model, target, tmp_path / "b", **options).engines[0].cached
    assert build_engine(model, target, tmp_path / "c", **options).engines[0].cached


@group("llama")
def test_several_profiles(tmp_path):
    model, _ = made("merge", "llama", tmp_path)
    requests = [
        ProfileRequest("short", {"sequence": "1:1:1"}),
        ProfileRequest("long", {"sequence": "2:8:16"}),
    ]
    report = build_engine(model, "sm89", tmp_path / "out", profiles=requests, shapes={"batch": "1"})
    record = read_engine(report.engines[0].path)
    assert [(p.name, p.shapes["input_ids"]) for p in record.profiles] == [
        ("short", ((1, 1), (1, 1), (1, 1))),
        ("long", ((1, 2), (1, 8), (1, 16))),
    ]


@group("llama")
@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(weight_streaming=True),
        BuildOptions(tf32=True, optimization_level=0, workspace_bytes=1 << 28),
    ],
)
def test_options_are_built_with_and_recorded(options, tmp_path):
    model, _ = made("merge", "llama", tmp_path)
    record = build_engine(model, "sm89", tmp_path / "out", shapes=SMALL, options=options).engines[0].record
    assert record.options == options


@group("llama")
def test_a_dry_run_writes_nothing(tmp_path, capsys):
    model, _ = made("swap", "llama", tmp_path)
    out = tmp_path / "out"
    code, said, _ = run(
        capsys, "build-engine", str(model), "--target", "rtx-4090", "-o", str(out), "--dry-run"
    )
    assert code == 0
    assert not out.exists()
    assert "rank of 28 LoRA inputs" in said
    assert f"would write {out / 'm.rtx-4090.engine'}" in said


# --- what can be wrong -------------------------------------------------------------------------------------


def test_a_truncated_graph(tmp_path):
    model = product(tmp_path / "m.onnx")
    model.write_bytes(model.read_bytes()[:-40])
    with pytest.raises(GraphError, match=r"m\.onnx"):
        build_engine(model, "sm89", tmp_path / "out")


def test_an_empty_file(tmp_path):
    """TensorRT's parser calls it a success."""
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(GraphError, match="holds no nodes"):
        build_engine(tmp_path / "m.onnx", "sm89", tmp_path / "out")


@pytest.mark.parametrize("how", ["missing", "short"])
@group("llama")
def test_external_data(how, tmp_path):
    model, _ = made("merge", "llama", tmp_path)
    data = tmp_path / "m.onnx.data"
    if how == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(GraphError, match=r"m\.onnx\.data"):
        build_engine(model, "sm89", tmp_path / "out")
    assert not (tmp_path / "out").exists()


FAILING = {
    "parser": (
        helper.make_node("Resize", ["x", "", "s"], ["y"], name="zoom", antialias=1, mode="linear"),
        ["batch", 3, 4, 4],
        ["batch", 3, 8, 8],
        [helper.make_tensor("s", TensorProto.FLOAT, [4], [1.0, 1.0, 2.0, 2.0])],
        "Antialiasing is not supported",
    ),
    "builder": (
        helper.make_node("TopK", ["x", "k"], ["y", "at"], name="zoom"),
        ["batch", 8000],
        ["batch", 5000],
        [helper.make_tensor("k", TensorProto.INT64, [1], [5000])],
        "K exceeds the maximum value",
    ),
}


@pytest.mark.parametrize("which", list(FAILING))
def test_the_first_real_error_names_the_node_and_its_module(which, tmp_path):
    node, dims, out, constants, said = FAILING[which]
    node = onnx.NodeProto.FromString(node.SerializeToString())
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'model.layers.3.up', 'zoom']")
    model = graph_of(tmp_path / "m.onnx", [node], [value("x", dims)], [value("y", out)], constants)
    with pytest.raises(EngineBuildError, match=said) as caught:
        build_engine(model, "sm89", tmp_path / "out")
    (problem,) = caught.value.problems
    assert "'zoom'" in problem
    assert node.op_type in problem
    assert "model.layers.3.up" in problem
    log = tmp_path / "out" / "m.sm89.log"
    assert str(log) in caught.value.hint
    assert said in log.read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.sm89.log"]


def test_the_log_of_an_engine_stays_where_the_next_build_fails(tmp_path):
    out = tmp_path / "out"
    build_engine(product(tmp_path / "m.onnx"), "sm89", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {*before} == {"m.sm89.engine", "m.sm89.log", "m.sm89.json"}
    node, dims, outputs, constants, said = next(iter(FAILING.values()))
    graph_of(tmp_path / "m.onnx", [node], [value("x", dims)], [value("y", outputs)], constants)
    with pytest.raises(EngineBuildError, match=said) as caught:
        build_engine(tmp_path / "m.onnx", "sm89", out, force=True)
    failed = out / "m.sm89.failed.log"
    assert str(failed) in caught.value.hint
    assert said in failed.read_text()
    failed.unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_bf16_on_turing(tmp_path):
    model = product(tmp_path / "m.onnx", dtype=TensorProto.BFLOAT16)
    with pytest.raises(EngineBuildError, match=r"7\.5"):
        build_engine(model, ["sm75", "sm89"], tmp_path / "out")
    assert build_engine(model, "sm89", tmp_path / "out").engines[0].record.inputs[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": "rtx-4900"}, "did you mean"),
        ({"targets": []}, "which GPUs"),
        ({"targets": ["orin-nano-8gb"]}, "--kit"),
        ({"targets": "sm89", "backend": "tensorrt"}, "this machine has no NVIDIA GPU"),
        ({"targets": "sm87", "backend": "tensorrt-rtx"}, "TensorRT-RTX builds for 7.5"),
        ({"targets": "sm89", "backend": "openvino"}, "the backend 'openvino' is unknown"),
        ({"targets": ["sm89", "orin-nano-8gb"], "together": True}, "--together"),
        ({"targets": "sm89", "options": BuildOptions(version_compatible=True)}, "version_compatible"),
        ({"targets": "sm89", "options": BuildOptions(hardware_compatible=True)}, "--together"),
        ({"targets": "sm89", "options": BuildOptions(refit=True)}, "only on a machine with a GPU"),
        ({"targets": "sm89", "options": BuildOptions(optimization_level=6)}, "wanted 0 to 5"),
        ({"targets": "sm89", "options": BuildOptions(workspace_bytes=0)}, "wanted at least 1"),
        ({"targets": "sm89", "adapters": -1}, "wanted 0 or more"),
        ({"targets": "sm89", "shapes": {"batch": "3:2:1"}}, "out of order"),
        ({"targets": "sm89", "shapes": {"y": "1"}}, "the graph has no such input or dimension"),
    ],
)
def test_what_cannot_be_built(options, said, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    model = product(tmp_path / "m.onnx")
    with pytest.raises(BackendError) as caught:
        build_engine(model, output=tmp_path / "out", **options)
    assert said in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_compiler_that_is_not_installed(tmp_path, monkeypatch):
    model = product(tmp_path / "m.onnx")
    monkeypatch.setitem(PACKAGES, "tensorrt_rtx", ("no-such-distribution",))
    with pytest.raises(BackendUnavailable, match="pip install 'lora-export\\[rtx\\]'"):
        build_engine(model, "sm89", tmp_path / "out")


def command_for(model, out):
    """What a shell would run: a process of its own, which takes nothing from the tests' cache."""
    script = "import sys; from lora_export.cli import main; main(sys.argv[1:])"
    options = ["--target", "sm89", "-o", str(out), "--no-cache"]
    return [sys.executable, "-c", script, "build-engine", str(model), *options]


def test_a_compiler_that_cannot_be_loaded(tmp_path):
    """Its libraries are broken: said by the process that loads it."""
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libtensorrt_rtx.so.1: cannot open')")
    model = product(tmp_path / "m.onnx")
    done = subprocess.run(
        command_for(model, tmp_path / "o"),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "installed but can't be loaded" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_builder_that_dies(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tensorrt_rtx.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(EngineBuildError, match="out of memory"):
        build_engine(product(tmp_path / "m.onnx"), "sm89", tmp_path / "out", cache=False)
    assert not list((tmp_path / "out").glob("*.engine"))


def test_an_existing_engine_stays_when_the_next_build_fails(tmp_path, monkeypatch):
    model = product(tmp_path / "m.onnx")
    path = build_engine(model, "sm89", tmp_path / "out").engines[0].path
    with pytest.raises(OutputError, match="exists already"):
        build_engine(model, "sm89", tmp_path / "out")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tensorrt_rtx.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(EngineBuildError, match="exit code 3"):
        build_engine(model, "sm89", tmp_path / "out", force=True, cache=False)
    assert read_engine(path).sha256 == sha256_of(path)


def test_weights_shared_with_a_base_that_changed(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    onnx.save(
        onnx.load(tiny.base_onnx("llama", "dynamo")),
        base / "b.onnx",
        save_as_external_data=True,
        location="b.data",
        size_threshold=0,
    )
    swap_onnx(base / "b.onnx", base / "s.onnx", adapter=tiny.adapter("llama"), share_base=True)
    data = bytearray((base / "b.data").read_bytes())
    data[9] ^= 1
    (base / "b.data").write_bytes(data)
    with pytest.raises(GraphError, match="have changed"):
        build_engine(base / "s.onnx", "sm89", tmp_path / "out")


def test_a_cache_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = [
        "build-engine",
        str(product(tmp_path / "m.onnx")),
        "--target",
        "sm89",
        "-o",
        str(tmp_path / "o"),
    ]
    code, _, said = run(capsys, *command, "--cache-dir", str(tmp_path / "file"), "--quiet")
    assert code == 0
    assert "warning: not kept for the next time" in said
    assert "is a file, not a folder" in said


def test_targets_may_be_listed_in_one_word(tmp_path):
    report = build_engine(product(tmp_path / "m.onnx"), "sm89, sm86", tmp_path / "out", dry_run=True)
    assert [engine.path.name for engine in report.engines] == ["m.sm89.engine", "m.sm86.engine"]


def test_a_size_that_nothing_holds_is_refused_at_once(tmp_path):
    model = product(tmp_path / "m.onnx")
    with pytest.raises(BackendError, match="would not fit"):
        build_engine(model, "rtx-4090", tmp_path / "out", shapes={"batch": (1, 1, 2**31 - 1)}, dry_run=True)


@group("llama")
def test_a_huge_size_takes_no_memory_to_refuse(tmp_path):
    """Onnx's propagation of values would make arrays of that size."""
    model, _ = made("swap", "llama", tmp_path)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "from lora_export.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "build-engine", str(model), "--target", "rtx-4090", "--dry-run"]
    command += ["-o", str(tmp_path / "out"), "--shape", "batch=1:1:2000000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "would not fit" in done.stderr


def test_a_terminated_build_leaves_nothing(tmp_path):
    """SIGTERM is what a container or a CI job is ended with."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tensorrt_rtx.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'started')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    process = subprocess.Popen(
        command_for(product(tmp_path / "m.onnx"), tmp_path / "o"),
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "TMPDIR": str(tmp_path / "site")},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int((tmp_path / "started").read_text())
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not list((tmp_path / "o").iterdir())
    assert [path.name for path in (tmp_path / "site").iterdir() if "lora-export" in path.name] == []
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
