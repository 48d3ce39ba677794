"""Where a kit lies and builds: folders of any name, logs that say anything, runs ended at any time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine_graphs import graph_of, value
from onnx import helper

from lora_export.engines.plan import BuildRequest
from lora_export.packages.build_kit import write_kits
from lora_export.storage.commit.leftovers import tidy

ENGINE = "m.orin-nano-8gb.engine"
# Writes an engine, or fails with a log that a stranger's names have made.
TRTEXEC = """#!{python}
import os, sys
print("[I] TensorRT version: 10.13.3", flush=True)
sys.stdout.buffer.write(os.environb.get(b"SAY", b""))
for flag in sys.argv:
    if flag.startswith("--saveEngine=") and "SAY" not in os.environ:
        open(flag.partition("=")[2], "wb").write(b"ftrt" + b"0" * 60)
sys.exit("SAY" in os.environ)
"""
FOLDERS = [
    *(
        "a b",
        "a\nb",
        "end\n",
        "\n",
        "-",
        "--",
        "-P",
        "-x",
        "~",
        "*",
        "$(touch mark)",
        "`touch mark`",
        "x;touch mark",
    ),
    *("'", '"', "a\\", "a\\n", "%s", " ", "end ", "\x1b[31m", os.fsdecode(b"\xff"), "@OURS@", ":", "..x"),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    node = helper.make_node("Relu", ["x"], ["out"])
    model = graph_of(folder / "m.onnx", [node], [value("x", ["batch", 4])], [value("out", ["batch", 4])])
    (made,) = write_kits(model, BuildRequest(targets=["orin-nano-8gb"]), folder / "kits").kits
    (folder / "trtexec").write_text(TRTEXEC.format(python=sys.executable))
    (folder / "trtexec").chmod(0o755)
    return made


def built(
    kit: Path, script: str, *out: str, cwd: Path, say: bytes | None = None
) -> subprocess.CompletedProcess[str]:
    before = cwd / "before"
    before.mkdir(exist_ok=True)
    tool = kit.parents[1] / "trtexec"
    env = {"PATH": os.environ["PATH"], "TRTEXEC": str(tool), "OLDPWD": str(before), "CDPATH": str(before)}
    words = ["sh", *(["--"] if script.startswith("-") else []), script, *out]
    environment = {os.fsencode(key): os.fsencode(text) for key, text in env.items()}
    if say is not None:
        environment[b"SAY"] = say
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, check=False)
    texts = (text.decode(errors="backslashreplace") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(words, done.returncode, *texts)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_kit_and_its_output_in_folders_of_any_name(name: str, kit: Path, tmp_path: Path) -> None:
    shutil.copytree(kit, tmp_path / name)
    # What would be taken for it if the name were read in another way.
    for near in {name.strip(), name.rstrip("\n")} - {name, "", "."}:
        shutil.copytree(kit, tmp_path / near)
        (tmp_path / near / "m.onnx").write_bytes(b"another kit")
    for script in (f"{name}/build.sh", str(tmp_path / name / "build.sh")):
        out = f"{name}.out" if name.strip(".") and not name.endswith("\n") else f"out {name}"
        done = built(kit, script, out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / out / ENGINE).stat().st_size == 64
        shutil.rmtree(tmp_path / out)
    done = built(kit, str(kit / "build.sh"), name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = list(tmp_path.rglob(ENGINE))
    assert found == [tmp_path / name / ENGINE]
    assert not list(tmp_path.rglob("mark"))


def test_a_log_is_shown_as_text(kit: Path, tmp_path: Path) -> None:
    said = (
        b"\x1b[2J\x1b]0;x\x07\n::error::faked\n  ::warning::faked\n##[error]x\n"
        + b"Error: faked\n\xff\xe2\x80\xae\r\n"
        + b"y" * 9000
        + b"\nlast\n"
    )
    done = built(kit, str(kit / "build.sh"), "out", cwd=tmp_path, say=b"early\n" + b"\n" * 30 + said)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-1].startswith("Error: ")
    assert lines[-2] == "  last"
    assert len(lines) == 21
    shown = lines[:-1]
    assert all(line.startswith("  ") and line.isprintable() and len(line) < 4000 for line in shown)
    assert not [line for line in shown if line.lstrip().startswith("::") or "##[" in line]
    assert "  Error: faked" in shown
    assert said in (tmp_path / "out" / "m.orin-nano-8gb.log").read_bytes()


# A signal comes with the import of this module, one of the last.
LATE = {"begin.py": "time", "finish.py": "platform"}
INTERRUPTED = """
import builtins, os, runpy, signal, sys
real = builtins.__import__
def importing(name, *more):
    if name == {late!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *more)
builtins.__import__ = importing
sys.argv = [{script!r}, {folder!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", LATE)
def test_an_interrupt_while_a_script_starts_shows_no_traceback(
    script: str, kit: Path, tmp_path: Path
) -> None:
    code = INTERRUPTED.format(late=LATE[script], script=str(kit / script), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_a_shell_that_has_ended_shows_no_traceback(kit: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-I", str(kit / "begin.py"), str(tmp_path)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""


def test_an_old_lease_alone_is_removed(kit: Path, tmp_path: Path) -> None:
    """A run was killed before it made the folder; a young one may be about to."""
    command = [sys.executable, "-I", str(kit / "begin.py"), str(tmp_path)]
    kernel = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("-")[0]
    young, old = (tmp_path / f".lora-export-{kernel}-{i}-{'a' * 12}.lease" for i in (1, 2))
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    subprocess.run(command, capture_output=True, check=True)
    assert young.is_file()
    assert not old.is_file()


def test_nothing_beside_the_scripts_is_imported(kit: Path, tmp_path: Path) -> None:
    own = tmp_path / "kit"
    shutil.copytree(kit, own)
    for name in ("hashlib", "json", "secrets", "contextlib"):
        (own / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    done = built(kit, str(own / "build.sh"), "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").is_file()


# Kills finish.py before one of its calls that change names, and the shell that waits for it, if told so.
KILLED = """
import os, pathlib, runpy, signal, sys
left = [int(os.environ["AT"])]
def wrapped(place, name):
    own = getattr(place, name)
    def call(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            if os.environ["SHELL_TOO"]:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments, **options)
    setattr(place, name, call)
for name in ("rename", "replace", "unlink"):
    wrapped(pathlib.Path, name)
wrapped(os, "link")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What the script calls "python3 -I -S", which imports no sitecustomize.
PYTHON = """#!/bin/sh
case $3 in
  *finish.py) [ $# -lt 5 ] || { shift 2; exec {python} {hook} "$@"; } ;;
esac
exec {python} "$@"
"""


def visible(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("by", ["kit", "lora-export", "its shell"])
def test_a_kit_killed_while_files_get_their_names_leaves_the_old_or_the_new_ones(
    by: str, kit: Path, tmp_path: Path
) -> None:
    hook, tools = tmp_path / "hook.py", tmp_path / "tools"
    hook.write_text(KILLED)
    tools.mkdir()
    wrapper = PYTHON.replace("{python}", sys.executable).replace("{hook}", str(hook))
    (tools / "python3").write_text(wrapper)
    (tools / "python3").chmod(0o755)
    trtexec = kit.parents[1] / "trtexec"
    other = tmp_path / "other"
    other.write_text(trtexec.read_text().replace('b"0" * 60', 'b"1" * 70').replace("10.13.3", "10.14.1"))
    other.chmod(0o755)
    both = {}
    for tool in (trtexec, other):
        out = tmp_path / f"{tool.name}.out"
        build = ["sh", str(kit / "build.sh"), str(out)]
        subprocess.run(build, env={**os.environ, "TRTEXEC": str(tool)}, check=True, capture_output=True)
        both[tool] = visible(out)
    ends = []
    for at in range(1, 30):
        out = tmp_path / f"out{at}"
        shutil.copytree(tmp_path / "trtexec.out", out)
        build = ["sh", str(kit / "build.sh"), str(out)]
        env = {
            **os.environ,
            "TRTEXEC": str(other),
            "AT": str(at),
            "SHELL_TOO": "" if by == "its shell" else "1",
        }
        path = f"{tools}:{os.environ['PATH']}"
        killed = subprocess.run(build, env={**env, "PATH": path}, capture_output=True, check=False)
        if by == "kit":
            subprocess.run(
                build, env={**env, "SAY": "", "TRTEXEC": str(trtexec)}, capture_output=True, check=False
            )
        elif by == "lora-export":
            tidy(out)
        found = {name: data for name, data in visible(out).items() if not name.endswith(".failed.log")}
        assert found in both.values(), at
        assert not list(out.glob(".lora-export-*")), at
        ends.append(found == both[other])
        if killed.returncode == 0:
            break
    assert killed.returncode == 0
    assert ends == sorted(ends)
    assert set(ends) == {True, False}
