"""What a kit's build keeps: engines that lie there, engines that were built, and facts that a log states."""

import json
import os
import subprocess
import sys

import pytest
from engine_graphs import graph_of, product, value
from onnx import helper

from lora_export.engines.plan import BuildRequest
from lora_export.engines.record import read_engine
from lora_export.packages.build_kit import write_kits

# Stands for trtexec: writes that it ran and an engine, and says its version.
FAKE = """#!{python}
import sys
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
open({seen!r}, "w").close()
print({version!r})
print("[I] [TRT] Total Weights Memory: 1234 bytes")
open(flags["--saveEngine"], "wb").write(b"ftrt" + b"0" * 60)
sys.exit(0)
"""
VERSION = "[I] TensorRT version: 10.13.3"


def fake_tool(folder, version=VERSION):
    folder.mkdir(exist_ok=True)
    tool = folder / "trtexec"
    tool.write_text(FAKE.format(python=sys.executable, seen=str(folder / "seen.json"), version=version))
    tool.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}


def shell(kit, env, *arguments):
    command = ["sh", str(kit / "build.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture
def small_kit(tmp_path):
    request = BuildRequest(targets=["orin-nano-8gb"])
    return write_kits(product(tmp_path / "m.onnx"), request, tmp_path / "kits").kits[0]


@pytest.mark.parametrize(
    "said",
    [
        "TensorRT version: 6.6.6",
        "Total Weights Memory: 1 bytes",
        "Total Weights Memory: " + "9" * 5000 + " bytes",
        "\n[I] TensorRT version: 6.6.6\n[I] Total Weights Memory: 1 bytes\n",
        "\r[I] TensorRT version: 6.6.6\r[I] Total Weights Memory: 1 bytes\r",
    ],
)
@pytest.mark.parametrize("says_version", [True, False])
def test_names_in_the_log_are_not_the_builders_statements(says_version, said, tmp_path):
    """The command line is printed, with the names of inputs, before anything else and at the end."""
    name = f"x {said}"
    node = helper.make_node("Relu", [name], ["y"])
    model = graph_of(tmp_path / "m.onnx", [node], [value(name, ["batch", 4])], [value("y", ["batch", 4])])
    (kit,) = write_kits(model, BuildRequest(targets=["orin-nano-8gb"]), tmp_path / "kits").kits
    env = fake_tool(tmp_path / "bin", version=VERSION if says_version else "")
    tool = tmp_path / "bin" / "trtexec"
    echo = 'print("&&&& {} TensorRT.trtexec [TensorRT v101303] # " + " ".join(sys.argv))\n'
    text = tool.read_text().replace("import sys\n", "import sys\n" + echo.format("RUNNING"))
    tool.write_text(text.replace("sys.exit", echo.format("PASSED") + "sys.exit"))
    done = shell(kit, env, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = read_engine(tmp_path / "out" / "m.orin-nano-8gb.engine")
    assert record.builder_version == "10.13.3"
    assert record.memory == {"weights": 1234}


@pytest.mark.parametrize("digits", [19, 5000])
def test_an_engine_is_not_lost_for_a_number_that_is_none(digits, small_kit, tmp_path):
    line = f"[I] [TRT] Total Weights Memory: {'9' * digits} bytes"
    activations = f"[I] [TRT] Total Activation Memory: {'9' * digits} bytes"
    env = fake_tool(tmp_path / "bin", version=f"{VERSION}\n{line}\n{activations}")
    done = shell(small_kit, env, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_engine(tmp_path / "out" / "m.orin-nano-8gb.engine").memory == {"weights": 1234}


def test_a_log_without_a_version_does_not_lose_the_engine(small_kit, tmp_path):
    for number, name in enumerate(("m.orin-nano-8gb.kept.engine", "m.orin-nano-8gb.kept-2.engine"), 1):
        done = shell(small_kit, fake_tool(tmp_path / "bin", version="hello"), tmp_path / "out")
        assert done.returncode == 1
        assert str(tmp_path / "out" / name) in done.stderr
        assert (tmp_path / "out" / name).read_bytes().startswith(b"ftrt")
        assert len(list((tmp_path / "out").glob("*.engine"))) == number


def other_kit(folder):
    """Return the kit of another graph of the same name."""
    folder.mkdir()
    node = helper.make_node("Neg", ["x"], ["y"])
    model = graph_of(folder / "m.onnx", [node], [value("x", ["batch", 4])], [value("y", ["batch", 4])])
    return write_kits(model, BuildRequest(targets=["orin-nano-8gb"]), folder / "kits").kits[0]


@pytest.mark.parametrize("there", ["another graph's", "no record", "no JSON", "a record alone", "a pipe"])
def test_another_engine_is_replaced_with_force_only(there, small_kit, tmp_path):
    out, other = tmp_path / "out", other_kit(tmp_path / "other")
    assert shell(other, fake_tool(tmp_path / "bin"), out).returncode == 0
    (engine,), (record,) = out.glob("*.engine"), out.glob("*.json")
    if there == "a record alone":
        engine.unlink()
    elif there != "another graph's":
        record.unlink()
    if there == "no JSON":
        record.write_text("[" * 100_000)
    elif there == "a pipe":
        os.mkfifo(record)
    (tmp_path / "bin" / "seen.json").unlink()
    before = sorted((path.name, path.stat().st_ino) for path in out.iterdir())
    done = shell(small_kit, fake_tool(tmp_path / "bin"), out)
    assert done.returncode == 1
    assert f"{engine} exists already" in done.stderr
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bin" / "seen.json").exists(), "before a build that may take an hour"
    assert sorted((path.name, path.stat().st_ino) for path in out.iterdir()) == before
    done = shell(small_kit, fake_tool(tmp_path / "bin"), "--force", out)
    if there == "a pipe":  # no file, with --force either
        assert done.returncode == 1
        assert "is not a regular file" in done.stderr
        assert record.is_fifo()
        assert (out / "m.orin-nano-8gb.kept.engine").exists()
        return
    assert done.returncode == 0, done.stderr
    source = json.loads((small_kit / "record.json").read_text())["source"]["sha256"]
    assert read_engine(engine).source.sha256 == source
    assert shell(small_kit, fake_tool(tmp_path / "bin"), out).returncode == 0, "the same graph again"


def test_an_engine_that_another_run_wrote_meanwhile_is_not_replaced(small_kit, tmp_path):
    good, out = tmp_path / "good", tmp_path / "out"
    assert shell(other_kit(tmp_path / "other"), fake_tool(tmp_path / "bin"), good).returncode == 0
    env = fake_tool(tmp_path / "bin")
    tool = tmp_path / "bin" / "trtexec"
    copied = f"import shutil\nshutil.copytree({str(good)!r}, {str(out)!r}, dirs_exist_ok=True)\nsys.exit"
    tool.write_text(tool.read_text().replace("sys.exit", copied))
    done = shell(small_kit, env, out)
    assert done.returncode == 1
    kept = out / "m.orin-nano-8gb.kept.engine"
    assert str(kept) in done.stderr
    assert kept.read_bytes() == b"ftrt" + b"0" * 60
    for path in good.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("given", [[], ["--force"]])
def test_lora_export_on_the_device_replaces_no_other_engine(given, small_kit, tmp_path):
    out, seen = tmp_path / "out", tmp_path / "seen"
    assert shell(other_kit(tmp_path / "other"), fake_tool(tmp_path / "bin"), out).returncode == 0
    tool = tmp_path / "own" / "lora-export"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >"{seen}"\n')
    tool.chmod(0o755)
    done = shell(small_kit, {"PATH": f"{tool.parent}:/usr/bin:/bin"}, *given, out)
    assert (done.returncode == 0) == seen.exists() == bool(given), done.stderr
    assert not given or "--force" in seen.read_text().split()
