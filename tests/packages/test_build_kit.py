"""A build kit is complete, its script is a shell's, and what it writes on the device is what we read."""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import onnx
import onnxruntime as ort
import pytest
import tiny
from engine_graphs import SMALL, graph_of, product, run, value
from exposed_models import group
from onnx import helper

from lora_export import swap_onnx
from lora_export.engines.plan import BuildRequest
from lora_export.engines.profiles import ProfileRequest
from lora_export.engines.record import BuildOptions, read_engine
from lora_export.errors import BackendError, EngineBuildError, OutputError
from lora_export.packages.build_kit import write_kits
from lora_export.storage.commit.lease import new_identity
from lora_export.storage.commit.leftovers import tidy
from lora_export.storage.commit.told import listening
from lora_export.storage.outputs import OutputSet

# Stands for trtexec: writes what it was asked to, and says its version.
FAKE = """#!{python}
import sys
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
import json
json.dump(flags, open({seen!r}, "w"))
print({version!r})
print("[I] [TRT] Total Weights Memory: 1234 bytes")
open(flags["--saveEngine"], "wb").write(b"ftrt" + b"0" * 60)
sys.exit({code})
"""


VERSION = "[I] TensorRT version: 10.13.3"


def fake_tool(folder, code=0, version=VERSION, name="trtexec"):
    folder.mkdir(exist_ok=True)
    tool = folder / name
    seen = str(folder / "seen.json")
    tool.write_text(FAKE.format(python=sys.executable, seen=seen, code=code, version=version))
    tool.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}


def split_shapes(text):
    """Read shapes as trtexec does (samples/common/sampleOptions.cpp, splitNameAndValue)."""
    found = {}
    for part in text.split(","):
        pieces = part.split("'")
        assert len(pieces) in (1, 3), "else it complains"
        name, shape = (
            part.rsplit(":", 1) if len(pieces) == 1 else (pieces[0] + pieces[1], pieces[2].removeprefix(":"))
        )
        found[name] = tuple(map(int, shape.split("x")))
    return found


def shell(kit, env, *arguments):
    return subprocess.run(
        ["sh", str(kit / "build.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )


@pytest.fixture
def kit(tmp_path):
    swap_onnx(tiny.base_onnx("llama", "dynamo"), tmp_path / "m.onnx", adapter=tiny.adapter("llama"))
    request = BuildRequest(
        targets=["orin-nano-8gb"], shapes=SMALL, options=BuildOptions(workspace_bytes=5 << 20)
    )
    (path,) = write_kits(tmp_path / "m.onnx", request, tmp_path / "kits").kits
    moved = tmp_path / "on the device"  # nothing in it knows where it was made
    shutil.move(path, moved)
    (tmp_path / "m.onnx").unlink()
    return moved


@group("llama")
def test_the_script_is_a_shells(kit):
    for name in ("sh", "bash", "dash"):
        if shutil.which(name):
            assert subprocess.run([name, "-n", kit / "build.sh"], check=False).returncode == 0
    assert os.access(kit / "build.sh", os.X_OK)


@group("llama")
def test_the_graph_is_whole_and_what_the_compiler_is_to_get(kit):
    session = ort.InferenceSession(kit / "m.onnx")
    record = json.loads((kit / "record.json").read_text())
    assert {port.name for port in session.get_inputs()} == {port["name"] for port in record["inputs"]}
    assert not session.get_overridable_initializers()
    checked = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=kit, capture_output=True, text=True, check=True
    )
    names = {line.partition(":")[0] for line in checked.stdout.splitlines()}
    assert names == {path.name for path in kit.iterdir()} - {"SHA256SUMS"}


@group("llama")
def test_it_builds_with_trtexec_and_the_record_is_read(kit, tmp_path):
    done = shell(kit, fake_tool(tmp_path / "bin"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = read_engine(tmp_path / "out" / "m.orin-nano-8gb.engine")
    assert (record.backend, record.builder_version) == ("tensorrt", "10.13.3")
    assert record.compute_capabilities == ("8.7",)
    assert record.memory == {"weights": 1234}
    flags = json.loads((tmp_path / "bin" / "seen.json").read_text())
    assert {"--stronglyTyped", "--skipInference", "--noTF32"} <= set(flags)
    assert flags["--memPoolSize"] == "workspace:5M"
    for number, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
        assert split_shapes(flags[flag]) == {
            name: shapes[number] for name, shapes in record.profiles[0].shapes.items()
        }


@group("llama")
def test_with_lora_export_on_the_device_it_is_used(kit, tmp_path):
    """The options that it is called with are the command line's, and say the same."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "lora-export"
    seen = str(tmp_path / "seen")
    tool.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({seen!r}, 'w'))")
    tool.chmod(0o755)
    done = shell(kit, {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    from lora_export.commands.build_engine import _request, build_engine

    context = build_engine.make_context("build-engine", json.loads((tmp_path / "seen").read_text())[1:])
    assert context.params.pop("force")
    for name in ("model", "output", "kit", "as_json", "quiet", "timing_cache", "verbose", "dry_run"):
        context.params.pop(name)
    for name in ("cache_dir", "no_cache"):
        context.params.pop(name)
    request = _request(context.params)
    record = json.loads((kit / "record.json").read_text())
    assert tuple(request.targets) == ("orin-nano-8gb",)
    assert request.ignore_memory  # it was looked at, or waived, when the kit was made
    assert request.options == BuildOptions(workspace_bytes=5 << 20)
    (request,) = request.profiles
    assert request.shapes == {
        name: ":".join("x".join(map(str, shape)) for shape in shapes)
        for name, shapes in record["profiles"][0]["shapes"].items()
    }


@group("llama")
def test_a_build_that_fails_leaves_no_engine_and_says_why(kit, tmp_path):
    done = shell(kit, fake_tool(tmp_path / "bin", code=1), tmp_path / "out")
    assert done.returncode == 1
    assert "could not build" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.orin-nano-8gb.log"]


@group("llama")
def test_a_damaged_kit_is_refused(kit, tmp_path):
    with (kit / "m.onnx.data").open("r+b") as file:
        file.write(b"#")
    done = shell(kit, fake_tool(tmp_path / "bin"), tmp_path / "out")
    assert done.returncode == 1
    assert "the kit is damaged" in done.stderr


@group("llama")
def test_without_a_compiler_it_says_what_to_do(kit, tmp_path):
    done = shell(kit, {"PATH": "/usr/bin:/bin"}, tmp_path / "out")
    assert done.returncode == 1
    assert "TRTEXEC" in done.stderr


def test_several_profiles_and_every_flag(tmp_path):
    options = BuildOptions(
        tf32=True,
        weight_streaming=True,
        refit=True,
        strip_weights=True,
        version_compatible=True,
        hardware_compatible=True,
        optimization_level=3,
        workspace_bytes=1,
    )
    requests = [ProfileRequest("a", {"batch": "1"}), ProfileRequest("b", {"batch": "2:3:4"})]
    request = BuildRequest(targets=["jetson-thor"], options=options, profiles=requests, name="my model")
    (path,) = write_kits(product(tmp_path / "m.onnx"), request, tmp_path).kits
    text = (path / "build.sh").read_text()
    for flag in (
        *("--profile=0", "--profile=1", "--refit", "--stripWeights", "--allowWeightStreaming"),
        *("--versionCompatible", "--hardwareCompatibilityLevel=ampere+", "--builderOptimizationLevel=3"),
        *("--memPoolSize=workspace:1M", "--optimization-level", "--workspace", "--tf32"),
    ):
        assert flag in text
    assert "--noTF32" not in text
    done = shell(path, fake_tool(tmp_path / "bin"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert read_engine(tmp_path / "out" / "my model.jetson-thor.engine").options == options


def test_the_command_writes_it(tmp_path, capsys):
    model = product(tmp_path / "m.onnx")
    command = ["build-engine", str(model), "--target", "orin-nano-8gb", "--kit", "-o", str(tmp_path / "kits")]
    code, said, _ = run(capsys, *command, "--dry-run")
    assert code == 0
    assert not (tmp_path / "kits").exists()
    code, said, _ = run(capsys, *command)
    assert code == 0
    assert "build.sh" in said
    code, _, said = run(capsys, *command)
    assert code == 1
    assert "exists already" in said
    code, said, _ = run(capsys, *command, "--force", "--json")
    assert Path(json.loads(said)["kits"][0]["path"]).is_dir()


@pytest.mark.parametrize("late", [False, True])
def test_a_kit_to_which_something_was_added_is_not_replaced(late, tmp_path, monkeypatch):
    """``sh build.sh`` in it builds the engine into it."""
    model, request = product(tmp_path / "m.onnx"), BuildRequest(targets=["orin-nano-8gb"])
    (kit,) = write_kits(model, request, tmp_path / "kits").kits
    write_kits(model, request, tmp_path / "kits", force=True)
    engine, own = kit / "m.orin-nano-8gb.engine", OutputSet.commit

    def build(outputs=None, *check):
        engine.write_bytes(b"built for an hour")
        if outputs is not None:
            own(outputs, *check)

    if late:
        monkeypatch.setattr(OutputSet, "commit", build)
    else:
        build()
    with pytest.raises(OutputError, match="files that its record does not list") as caught:
        write_kits(model, request, tmp_path / "kits", force=True)
    assert caught.value.problems == (engine.name,)
    assert engine.read_bytes() == b"built for an hour"


def test_a_folder_that_is_no_kit_is_not_replaced(tmp_path):
    model, request = product(tmp_path / "m.onnx"), BuildRequest(targets=["orin-nano-8gb"])
    (kit,) = write_kits(model, request, tmp_path / "kits", dry_run=True).kits
    kit.mkdir(parents=True)
    write_kits(model, request, tmp_path / "kits", force=True)  # an empty one may go
    shutil.rmtree(kit)
    kit.mkdir()
    (kit / "thesis.txt").write_text("mine")
    for sums in ("", f"{'0' * 64}  thesis.txt\n"):
        (kit / "SHA256SUMS").write_text(sums)
        with pytest.raises(OutputError, match="is not a kit that we wrote"):
            write_kits(model, request, tmp_path / "kits", force=True)
    shutil.rmtree(kit)
    (tmp_path / "elsewhere").mkdir()
    kit.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is not a folder of a kit"):
        write_kits(model, request, tmp_path / "kits", force=True)


def test_one_graph_serves_several_kits(tmp_path):
    model = product(tmp_path / "m.onnx")
    report = write_kits(model, BuildRequest(targets=["orin-nano-8gb", "h100-sxm"]), tmp_path / "kits")
    assert len(report.kits) == 2
    for path in report.kits:
        onnx.checker.check_model(str(path / "m.onnx"))
    with pytest.raises(OutputError):
        write_kits(model, BuildRequest(targets=["orin-nano-8gb"]), tmp_path / "kits")
    with pytest.raises(OutputError, match="exists already"):
        write_kits(model, BuildRequest(targets=["rtx-4090", "orin-nano-8gb"]), tmp_path / "kits")
    assert not (tmp_path / "kits" / "m.rtx-4090.kit").exists(), "nothing is written when one is refused"


NAMES = ["x y", "x:0", "a=b", 'x"y', "/x", "é"]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_any_name(name, tmp_path):
    node = helper.make_node("Relu", [name], ["y"])
    model = graph_of(tmp_path / "m.onnx", [node], [value(name, ["batch", 4])], [value("y", ["batch", 4])])
    (kit,) = write_kits(
        model, BuildRequest(targets=["orin-nano-8gb"], name="modèle d'essai"), tmp_path / "kits"
    ).kits
    done = shell(kit, fake_tool(tmp_path / "bin"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    flags = json.loads((tmp_path / "bin" / "seen.json").read_text())
    assert split_shapes(flags["--maxShapes"]) == {name: (4, 4)}
    record = read_engine(tmp_path / "out" / "modèle d'essai.orin-nano-8gb.engine")
    assert record.profiles[0].shapes[name][2] == (4, 4)


@pytest.mark.parametrize("name", ["a,b", "a'b", "a*"])
def test_names_that_trtexec_splits_are_refused(name, tmp_path):
    node = helper.make_node("Relu", [name], ["y"])
    model = graph_of(tmp_path / "m.onnx", [node], [value(name, ["batch", 4])], [value("y", ["batch", 4])])
    with pytest.raises(BackendError, match="trtexec can't be told") as caught:
        write_kits(model, BuildRequest(targets=["orin-nano-8gb"]), tmp_path / "kits")
    assert caught.value.problems == (name,)


def test_one_engine_for_several_gpus_of_tensorrt_rtx(tmp_path):
    """The tool is told for which, and lora-export to build one."""
    request = BuildRequest(targets=["rtx-4090", "rtx-5090"], together=True)
    (kit,) = write_kits(product(tmp_path / "m.onnx"), request, tmp_path / "kits").kits
    assert "--together" in (kit / "build.sh").read_text()
    done = shell(kit, fake_tool(tmp_path / "bin", name="tensorrt_rtx"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    flags = json.loads((tmp_path / "bin" / "seen.json").read_text())
    assert flags["--computeCapabilities"] == "89,120"
    assert "--stronglyTyped" not in flags
    assert read_engine(tmp_path / "out" / "m.rtx-4090+rtx-5090.engine").backend == "tensorrt-rtx"


def test_each_compiler_has_its_say(tmp_path):
    """Whatever the order: what one reads as it is meant, the other does not."""
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    dims = ["batch", 4]
    model = onnx.load(graph_of(tmp_path / "m.onnx", [node], [value("x", dims)], [value("y", dims)]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "m.onnx")
    for names in (["rtx-4090", "orin-nano-8gb"], ["orin-nano-8gb", "rtx-4090"]):
        with pytest.raises(EngineBuildError, match="can't be built by TensorRT as it is"):
            write_kits(tmp_path / "m.onnx", BuildRequest(targets=names), tmp_path / "kits")
    # Turing multiplies no float32 with TensorRT-RTX; a T4 with the classic one does.
    model = product(tmp_path / "p.onnx")
    assert write_kits(model, BuildRequest(targets=["rtx-4090", "t4"]), tmp_path / "kits", dry_run=True).kits
    with pytest.raises(EngineBuildError, match=r"7\.5"):
        write_kits(model, BuildRequest(targets=["orin-nano-8gb", "sm75"]), tmp_path / "kits")


def test_a_graph_without_varying_sizes(tmp_path):
    (kit,) = write_kits(
        product(tmp_path / "m.onnx", (2, 4)), BuildRequest(targets=["orin-nano-8gb"]), tmp_path / "kits"
    ).kits
    assert "--profile" not in (kit / "build.sh").read_text()
    done = shell(kit, fake_tool(tmp_path / "bin"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not any("Shapes" in flag for flag in json.loads((tmp_path / "bin" / "seen.json").read_text()))


@pytest.fixture
def small_kit(tmp_path):
    (kit,) = write_kits(
        product(tmp_path / "m.onnx"), BuildRequest(targets=["orin-nano-8gb"]), tmp_path / "kits"
    ).kits
    return kit


# Writes half of an engine, waits until the other run does so too, and writes the rest.
SLOW = """#!{python}
import os, sys, time
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
who = os.environ["WHO"]
print("[I] TensorRT version: 10.13.3", who)
with open(flags["--saveEngine"], "w") as file:
    file.write(who * 500)
    file.flush()
    open({folder!r} + "/" + who, "w").close()
    ends = time.monotonic() + 30
    while len(os.listdir({folder!r})) < 2 and time.monotonic() < ends:
        time.sleep(0.01)
    file.write(who * 500)
"""


def test_two_builds_into_one_folder_at_once(small_kit, tmp_path):
    (tmp_path / "there").mkdir()
    tool, out = tmp_path / "trt", tmp_path / "out"
    tool.write_text(SLOW.format(python=sys.executable, folder=str(tmp_path / "there")))
    tool.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "TRTEXEC": str(tool)}
    runs = [
        subprocess.Popen(
            ["sh", str(small_kit / "build.sh"), str(out)],
            env=env | {"WHO": who},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in "AB"
    ]
    said = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    engine, record, log = (next(out.glob(f"*.{kind}")) for kind in ("engine", "json", "log"))
    assert sorted(out.iterdir()) == sorted([engine, record, log])
    who = engine.read_text()[:1]
    assert engine.read_text() == who * 1000
    assert log.read_text().split()[-1] == who
    files = json.loads(record.read_text())["files"]
    for path in (engine, log):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == files[path.name]["sha256"]


def test_a_build_that_fails_leaves_the_log_of_the_engine_that_is_there(small_kit, tmp_path):
    out = tmp_path / "out"
    assert shell(small_kit, fake_tool(tmp_path / "bin"), out).returncode == 0
    before = faults.snapshot(out)
    done = shell(small_kit, fake_tool(tmp_path / "worse", 1), out)
    assert done.returncode == 1
    (added,) = faults.snapshot(out).keys() - before.keys()
    assert added.endswith(".failed.log")
    assert added in done.stderr
    assert {name: data for name, data in faults.snapshot(out).items() if name in before} == before


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_finish_that_is_stopped_leaves_no_record_of_another(step, small_kit, tmp_path, monkeypatch):
    out, built = tmp_path / "out", tmp_path / "built"
    assert shell(small_kit, fake_tool(tmp_path / "bin"), out).returncode == 0
    (engine,), (record,) = out.glob("*.engine"), out.glob("*.json")
    built.mkdir()
    (built / "engine").write_bytes(b"another")
    (built / "log").write_text(VERSION)
    spec = importlib.util.spec_from_file_location("finish", small_kit / "finish.py")
    finish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finish)
    own, left = Path.replace, iter(range(1, 9))

    def replace(path, target):
        if next(left) == step:
            raise KeyboardInterrupt
        return own(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        finish.main(str(small_kit / "record.json"), str(built / "engine"), str(built / "log"), str(engine))
    assert not record.exists()
    assert sorted(path.suffix for path in out.iterdir()) == [".engine", ".log"]


@pytest.mark.parametrize("suffix", [".engine", ".log", ".json"])
@pytest.mark.parametrize("problem", ["a folder", "refused"])
@pytest.mark.parametrize("has_old", [True, False])
def test_a_finish_that_fails_puts_the_old_files_back(
    suffix, problem, has_old, small_kit, tmp_path, monkeypatch
):
    out, built, good = tmp_path / "out", tmp_path / "built", tmp_path / "good"
    assert shell(small_kit, fake_tool(tmp_path / "bin"), good).returncode == 0
    (engine,) = (path.name for path in good.glob("*.engine"))
    out.mkdir()
    for path in good.iterdir() if has_old else ():
        shutil.copy(path, out)
    built.mkdir()
    (built / "engine").write_bytes(b"another")
    (built / "log").write_text(VERSION)
    bad = (out / engine).with_suffix(suffix)
    if problem == "a folder":
        bad.unlink(missing_ok=True)
        bad.mkdir()
    spec = importlib.util.spec_from_file_location("finish", small_kit / "finish.py")
    finish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finish)
    own, before = Path.replace, faults.snapshot(out)

    def replace(path, target):
        if problem == "refused" and target == bad:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path), None, str(target))
        return own(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(SystemExit) as caught:
        finish.main(
            *map(str, (small_kit / "record.json", built / "engine", built / "log")), engine=str(out / engine)
        )
    assert f"cannot write {bad}" in str(caught.value)
    assert "(nothing was replaced)" in str(caught.value)
    assert faults.snapshot(out) == before


def test_a_log_without_a_version_leaves_no_engine(small_kit, tmp_path):
    done = shell(small_kit, fake_tool(tmp_path / "bin", version="hello"), tmp_path / "out")
    assert done.returncode == 1
    assert "does not say which version" in done.stderr
    # Nothing has the engine's own name; what was built is kept under another one.
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["m.orin-nano-8gb.kept.engine", "m.orin-nano-8gb.log"]


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9] # trtexec", "10.13.3"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec\n[I] TensorRT version: 8.6.1", "8.6.1"),
        ("[I] TensorRT version: 11.0.0.1", "11.0.0.1"),
    ],
)
def test_versions_that_trtexec_says(said, version, small_kit, tmp_path):
    done = shell(small_kit, fake_tool(tmp_path / "bin", version=said), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert read_engine(tmp_path / "out" / "m.orin-nano-8gb.engine").builder_version == version


def test_the_tools_path_is_where_the_user_is(small_kit, tmp_path):
    env = fake_tool(tmp_path / "bin") | {"PATH": "/usr/bin:/bin", "TRTEXEC": "bin/trtexec"}
    script = str(small_kit.relative_to(tmp_path) / "build.sh")
    done = subprocess.run(
        ["sh", script, "out"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert read_engine(tmp_path / "out" / "m.orin-nano-8gb.engine")


@pytest.mark.parametrize(
    "option", [["--cache-dir", "c"], ["--no-cache"], ["--timing-cache", "t"], ["--verbose"]]
)
def test_options_of_a_build_are_not_for_kits(option, tmp_path, capsys):
    model = product(tmp_path / "m.onnx")
    command = ["build-engine", str(model), "--target", "orin-nano-8gb", "--kit", "-o", str(tmp_path / "kits")]
    code, _, said = run(capsys, *command, *option)
    assert code == 2
    assert "--kit builds no engine" in said


@group("llama")
def test_trtexec_is_used_where_both_are(kit, tmp_path):
    """lora-export may be there without TensorRT's Python package, and could not build then."""
    env = fake_tool(tmp_path / "bin")
    other = tmp_path / "bin" / "lora-export"
    other.write_text("#!/bin/sh\nexit 9\n")
    other.chmod(0o755)
    assert shell(kit, env, tmp_path / "out").returncode == 0
    assert read_engine(tmp_path / "out" / "m.orin-nano-8gb.engine").backend == "tensorrt"


def test_a_kit_for_a_compiler_that_never_builds_for_it_is_refused(tmp_path):
    with pytest.raises(BackendError, match="omit --backend tensorrt-rtx"):
        write_kits(
            product(tmp_path / "m.onnx"),
            BuildRequest(targets=["orin-nano-8gb"], backend="tensorrt-rtx"),
            tmp_path,
        )


# Writes a part of an engine, says so, and goes on until it is killed.
ENDLESS = """#!{python}
import os, sys, time
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
open(flags["--saveEngine"], "wb").write(b"x" * 1000)
with open({began!r} + ".tmp", "w") as file:
    file.write(str(os.getpid()))
os.rename({began!r} + ".tmp", {began!r})
time.sleep(600)
"""


def is_running(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("ends", ["both", "shell", "none"])
@pytest.mark.parametrize("by", ["kit", "lora-export"])
def test_what_a_killed_run_leaves_is_removed(by, ends, small_kit, tmp_path):
    """By the next run of a kit or of lora-export there, once all of the killed one's processes have ended."""
    tool, out, began = tmp_path / "endless", tmp_path / "out", tmp_path / "began"
    tool.write_text(ENDLESS.format(python=sys.executable, began=str(began)))
    tool.chmod(0o755)
    out.mkdir()
    env = {"PATH": "/usr/bin:/bin", "TRTEXEC": str(tool)}
    run = subprocess.Popen(["sh", str(small_kit / "build.sh"), str(out)], env=env, start_new_session=True)
    while not began.exists():
        assert run.poll() is None
        time.sleep(0.01)
    left = set(out.iterdir())
    (folder,) = (path for path in left if path.is_dir())
    assert (folder / "engine").stat().st_size == 1000
    assert {path.stat().st_mode & 0o077 for path in left} == {0}
    try:
        if ends == "both":
            os.killpg(run.pid, signal.SIGKILL)
            while is_running(int(began.read_text())):
                time.sleep(0.01)
        elif ends == "shell":
            run.kill()
        if ends != "none":
            run.wait()
        if by == "kit":
            done = shell(small_kit, fake_tool(tmp_path / "bin"), out)
            assert done.returncode == 0
            told = done.stderr
        else:
            said = []
            with listening(said.append):
                tidy(out)
            told = "".join(said)
        if ends == "both":
            assert not left & set(out.iterdir())
            assert folder.name in told
        else:
            assert left <= set(out.iterdir())
            assert (folder / "engine").exists()
            assert not told
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def test_a_kit_leaves_what_lora_export_has_to_settle(small_kit, tmp_path):
    """A killed set of lora-export's has files beside its lease, or a lease that tells what was renamed."""
    out = tmp_path / "out"
    out.mkdir()
    for word in (b"", b'{"folder": "x"}\n'):
        identity = new_identity()
        (out / f".lora-export-{identity}.lease").write_bytes(word)
        (out / f".lora-export-{identity}").mkdir()
        if not word:
            (out / f"m.onnx.tmp-{identity}").touch()
    left = set(out.iterdir())
    assert shell(small_kit, fake_tool(tmp_path / "bin"), out).returncode == 0
    assert left <= set(out.iterdir())


def test_the_folder_of_an_earlier_kit_is_told_of(tmp_path):
    (tmp_path / ".lora-export-kit.aB3xyZ").mkdir()
    said = []
    with listening(said.append):
        tidy(tmp_path)
    assert ".lora-export-kit.aB3xyZ" in said[0]
    assert (tmp_path / ".lora-export-kit.aB3xyZ").exists()


# Sends a signal to the whole group, as a terminal does, after one of finish.py's calls that change names.
AT_A_CALL = """
import os, pathlib, runpy, signal, sys, time
left = [int(os.environ["AT"])]
def wrapped(place, name):
    own = getattr(place, name)
    def call(*arguments, **options):
        made = own(*arguments, **options)
        left[0] -= 1
        if not left[0]:
            os.killpg(0, int(os.environ["NUMBER"]))
            time.sleep(0.1)
        return made
    setattr(place, name, call)
for name in ("rename", "replace", "unlink"):
    wrapped(pathlib.Path, name)
wrapped(os, "link")
wrapped(os, "fsync")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What the script calls "python3 -I -S", which imports no sitecustomize.
PYTHON = """#!/bin/sh
case $3 in
  *finish.py) shift 2; exec {python} {hook} "$@" ;;
esac
exec {python} "$@"
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("has_old", [True, False])
def test_a_signal_while_files_get_their_names_leaves_the_old_or_the_new_ones(
    has_old, number, small_kit, tmp_path
):
    hook = tmp_path / "hook.py"
    hook.write_text(AT_A_CALL)
    env = fake_tool(tmp_path / "bin") | {"NUMBER": str(int(number))}
    (tmp_path / "bin" / "python3").write_text(PYTHON.format(python=sys.executable, hook=hook))
    (tmp_path / "bin" / "python3").chmod(0o755)
    ends = set()
    for at in range(1, 40):
        out = tmp_path / f"out{at}"
        if has_old:
            assert shell(small_kit, fake_tool(tmp_path / "old", version=VERSION + ".9"), out).returncode == 0
        before = faults.snapshot(out) if has_old else {}
        done = subprocess.run(
            ["sh", str(small_kit / "build.sh"), str(out)],
            capture_output=True, text=True, check=False, env=env | {"AT": str(at)}, start_new_session=True,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        after = {name: data for name, data in faults.snapshot(out).items() if not name.endswith(".lock")}
        if done.returncode == 0:  # there are no further calls
            break
        assert done.returncode == (130 if number == signal.SIGINT else 143)
        assert not any(".lora-export-" in name for name in after)
        ends.add(after == before)
        if after == before:
            assert "nothing was replaced" in done.stderr
        else:
            assert "is complete and in place" in done.stderr
            assert read_engine(out / "m.orin-nano-8gb.engine").builder_version == "10.13.3"
            assert sorted(Path(name).suffix for name in after) == [".engine", ".json", ".log"]
    assert ends == {True, False}
