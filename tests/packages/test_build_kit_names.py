"""What a kit's script runs, where a stranger chose the names in the graph: one program, with these names."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from engine_graphs import graph_of, value
from onnx import helper

from lora_export.commands.build_engine import build_engine
from lora_export.engines.plan import BuildRequest
from lora_export.engines.profiles import ProfileRequest
from lora_export.engines.record import read_engine
from lora_export.errors import BackendError, GraphError
from lora_export.packages.build_kit import KitReport, fill, write_kits
from lora_export.reports.engine import kit_lines

# Records what it was called with, each call a line.
RECORDER = """#!{python}
import json, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
built = [flag.partition("=")[2] for flag in sys.argv if flag.startswith("--saveEngine=")]
print("[I] TensorRT version: 10.13.3")
for path in built:
    open(path, "wb").write(b"ftrt" + b"0" * 60)
"""
# In each, {mark} is a file that must not come to be. A comma, an apostrophe and an asterisk are refused.
COMMANDS = [
    "x$(touch {mark})",
    "x`touch {mark}`",
    "x;touch {mark};",
    "x\ntouch {mark}\n",
    "x\r\ntouch {mark}",
    'x"$(touch {mark})"',
    "x|touch {mark}",
    "x&touch {mark}&",
    "x>{mark}",
    "@FLAGS@$(touch {mark})",
    "@OURS@;touch {mark};",
    "@MODEL@ @ENGINE@ @TOOL@ @TARGET@ ; touch {mark}",
    "@@FLAGS@@;touch {mark}",
    "@OUR@FLAGS@S@;touch {mark}",
]
PLAIN = [
    *("-x", "--help", "--skipInference=1", " lead", "trail ", "#x", "~", "~root", "!x", "$HOME", "${{IFS}}"),
    *(
        "%s%n",
        "a\\b",
        "a\\",
        "\\\\",
        '"',
        '"x',
        "é",
        "日本語",
        "\u202ex",
        "x=y",
        "x:1x1",
        "{{}}",
        "[a-z]",
        "?",
    ),
    *("@FLAGS@", "@NOTHING@", "@", "x@y@z", "a\tb", "\x1b[31mred"),
]


@pytest.fixture
def recorded(tmp_path):
    """Make programs of these names; running a kit's script returns the calls, each with its name in front."""
    log, mark = tmp_path / "calls", tmp_path / "mark"

    def call(kit, *names):
        folder = tmp_path / f"bin-{'-'.join(names)}"
        folder.mkdir(exist_ok=True)
        for name in names:
            text = RECORDER.format(python=sys.executable, log=str(log), name=name)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        log.unlink(missing_ok=True)
        env = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            ["sh", str(kit / "build.sh"), str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
            env=env,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert not mark.exists()
        return [json.loads(line) for line in log.read_text().splitlines()]

    call.mark = mark
    return call


def kit_of(folder, name, request):
    node = helper.make_node("Relu", [name], ["out"])
    model = graph_of(folder / "m.onnx", [node], [value(name, ["batch", 4])], [value("out", ["batch", 4])])
    (kit,) = write_kits(model, request, folder / "kits").kits
    return kit


def shapes_in(flags, flag):
    (text,) = [text.partition("=")[2] for text in flags if text.startswith(f"{flag}=")]
    return text.rpartition(":")[::2]


@pytest.mark.parametrize(
    ("pattern", "compiler"),
    [
        *((pattern, "orin-nano-8gb:trtexec") for pattern in (*COMMANDS, *PLAIN)),
        *((pattern, "rtx-4090:tensorrt_rtx") for pattern in COMMANDS),
    ],
)
def test_an_input_of_any_name(pattern, compiler, recorded, tmp_path):
    """Once with the compiler's own tool, once with lora-export: each gets the name, and nothing else runs."""
    target, _, tool = compiler.partition(":")
    name = pattern.format(mark=recorded.mark)
    kit = kit_of(tmp_path, name, BuildRequest(targets=[target]))
    ((called, *flags),) = recorded(kit, tool)
    assert called == tool
    for flag in ("--minShapes", "--optShapes", "--maxShapes"):
        assert shapes_in(flags, flag)[0] == name
    others = [flag.partition("=")[0] for flag in flags if "Shapes" not in flag]
    assert set(others) <= {
        *("--onnx", "--saveEngine", "--stronglyTyped", "--skipInference", "--noTF32"),
        "--computeCapabilities",
    }
    record = read_engine(tmp_path / "out" / f"m.{target}.engine")
    assert list(record.profiles[0].shapes) == [name]

    ((called, verb, *arguments),) = recorded(kit, "lora-export")
    assert (called, verb) == ("lora-export", "build-engine")
    given = build_engine.make_context("build-engine", arguments).params
    (request,) = given["profiles"]
    assert isinstance(request, ProfileRequest)
    assert list(request.shapes) == [name]
    assert (given["targets"], given["name"]) == ((target,), "m")


@pytest.mark.parametrize(
    "name", [text for text in [*COMMANDS, *PLAIN, "it's", "a,b", "*"] if text.isprintable()]
)
def test_a_model_of_any_name(name, recorded, tmp_path):
    name = name.replace("{mark}", recorded.mark.name).replace("{{", "{").replace("}}", "}")
    kit = kit_of(tmp_path, "x", BuildRequest(targets=["orin-nano-8gb"], name=name))
    ((_, *flags),) = recorded(kit, "trtexec")
    assert f"--onnx={kit / name}.onnx" in flags
    assert read_engine(tmp_path / "out" / f"{name}.orin-nano-8gb.engine")
    ((_, _, *arguments),) = recorded(kit, "lora-export")
    given = build_engine.make_context("build-engine", arguments).params
    assert (str(given["model"]), given["name"]) == (f"{kit / name}.onnx", name)


@pytest.mark.parametrize("name", ["x\0y", "\0"])
def test_what_no_program_can_be_given_is_refused(name, tmp_path):
    with pytest.raises(BackendError, match="trtexec can't be told"):
        kit_of(tmp_path, name, BuildRequest(targets=["orin-nano-8gb"]))


@pytest.mark.parametrize("name", ["x\ny", "x/y", "\x1b[31m", os.fsdecode(b"\xff")])
def test_a_name_that_is_no_files_is_refused(name, tmp_path):
    with pytest.raises(BackendError, match="can't begin a file's name"):
        kit_of(tmp_path, "x", BuildRequest(targets=["orin-nano-8gb"], name=name))


@pytest.mark.parametrize("first", ["@B@", "x@B@y", "@@B@@", "\\1", "\\g<0>"])
def test_what_a_value_holds_is_no_key(first):
    values = {"A": shlex.quote(first), "B": shlex.quote("b'@A@")}
    filled = fill("@A@ @B@ @c@ a@b", values)
    assert shlex.split(filled) == [first, "b'@A@", "@c@", "a@b"]


@pytest.mark.parametrize("name", ["$(touch pwn) x;y", "-rf", "it's", "plain"])
def test_the_command_to_copy_is_one_command(name):
    """A shell reads the printed words as the folder's name and nothing else."""
    path = Path("kits") / f"{name}.kit"
    line = kit_lines(KitReport(kits=(path,), groups=(), profiles=()))[-1]
    command = line.partition("then: ")[2].removesuffix(")")
    shell, script = shlex.split(command)
    assert shell == "sh"
    assert not script.startswith("-")
    assert Path(script) == Path(path.name) / "build.sh"
    printed = subprocess.run(
        ["bash", "-c", f'sh() {{ printf "%s\\0" "$@"; }}; {command}'], capture_output=True, check=True
    )
    assert printed.stdout.decode().split("\0")[:-1] == [script]


def test_a_graph_whose_name_no_record_can_hold_is_refused(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    kit_of(folder, "x", BuildRequest(targets=["orin-nano-8gb"], name="m"))
    odd = (folder / "m.onnx").rename(folder / os.fsdecode(b"m\xff.onnx"))
    with pytest.raises(GraphError, match="is not UTF-8"):
        write_kits(odd, BuildRequest(targets=["orin-nano-8gb"], name="m"), tmp_path / "kits")


def test_a_command_to_copy_is_not_printed_in_part():
    path = Path("/".join(["k" * 200] * 10)) / ("'; touch mark; #" * 15 + ".kit")
    (line,) = kit_lines(KitReport(kits=(path,), groups=(), profiles=()))
    assert line == f"wrote {path}"
