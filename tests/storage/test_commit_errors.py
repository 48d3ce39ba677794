"""Steps of writing a set that fail, and what somebody else put there meanwhile: nothing is lost or hidden."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import faults
import pytest
from output_cases import CASES, fill, old_of, run
from written_sets import NAMES, all_of, contents, ended, names_in, write

from lora_export import cli
from lora_export.errors import OutputError
from lora_export.storage.commit import steps
from lora_export.storage.commit.leftovers import tidy
from lora_export.storage.outputs import OutputSet


@pytest.mark.parametrize("fault", ["EBUSY", "ENOSPC"])
@pytest.mark.parametrize("verb", ["merge", "merge-onnx"])
def test_from_one_call_on_everything_fails(verb, fault, tmp_path, monkeypatch, capsys):
    """Nothing can be taken back either: what lies there is named, and is put in order when it can be."""
    case, top = CASES[verb], tmp_path / "inputs"
    top.mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert run(case, top, tmp_path / "good") == 0
    new = faults.snapshot(tmp_path / "good")
    old = old_of(new)
    number, stuck = 0, 0
    while True:
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        fill(out, old)
        capsys.readouterr()
        injector = faults.Injector(out, fault, range(number, 10_000))
        with injector.armed():
            code = run(case, top, out, "--force")
        said = capsys.readouterr().err
        if len(injector.made) <= number:
            break
        found = faults.snapshot(out)
        where = f"{number}: {injector.made[number]}\n{said}"
        assert "Traceback" not in said, where
        for name in {place.split("/")[0] for place in found} - {place.split("/")[0] for place in new}:
            assert name in said, f"{name}, {where}"
        if "could not be renamed back" in said:
            stuck += 1
            assert "nothing was replaced" not in said, where
        elif code and "written and complete" not in said:
            assert old.items() <= found.items(), where
        else:
            assert new.items() <= found.items(), where
        with contextlib.suppress(UserWarning):
            tidy(out)
        assert faults.snapshot(out) in (old, new), where
        number += 1
    assert code == 0
    assert stuck >= 2


def test_a_file_that_somebody_made_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    """Not by a run without --force, nor by one that took the old files away."""
    own = steps.Mark.do

    def late(mark):
        own(mark)
        (tmp_path / "m.onnx").write_text("somebody's")

    write(tmp_path, "old")
    monkeypatch.setattr(steps.Mark, "do", late)
    with pytest.raises(OutputError, match="File exists") as caught:
        write(tmp_path, "new")
    assert (tmp_path / "m.onnx").read_text() == "somebody's"
    kept = [name for name, text in contents(tmp_path).items() if text == "old"]
    assert len(kept) == 3
    assert all(name in str(caught.value) for name in kept if name not in NAMES)


def test_the_disk_does_not_confirm(tmp_path, monkeypatch):
    write(tmp_path, "old")
    calls = []
    own = steps.sync_path

    def second_fails(path):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        own(path)

    monkeypatch.setattr(steps, "sync_path", second_fails)
    with pytest.raises(OutputError, match="written and complete, but the system does not confirm"):
        write(tmp_path, "new")
    assert contents(tmp_path) == all_of("new")


@pytest.mark.parametrize("names", [NAMES[2:], NAMES])
def test_a_renaming_that_is_done_and_answered_with_an_error(names, tmp_path, monkeypatch):
    """A network file system may lose the answer; what is said then is what lies there."""
    write(tmp_path, "old")
    refused = []

    def after(own):
        def call(source, target, **more):
            own(source, target, **more)
            if Path(target).name == names[-1] and not refused:
                refused.append(target)
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(source))

        return call

    with OutputSet(True) as outputs:
        for name in names:
            outputs.stage(tmp_path / name).write_text("new")
        for call in ("rename", "replace"):
            monkeypatch.setattr(os, call, after(getattr(os, call)))
        if len(names) == 1:
            outputs.commit()
        else:
            with pytest.raises(OutputError, match="nothing was replaced"):
                outputs.commit()
    assert refused
    assert {contents(tmp_path)[name] for name in names} == {"new" if len(names) == 1 else "old"}


def test_a_folder_of_a_containers_image_says_so(tmp_path, monkeypatch):
    """Overlayfs does not rename a folder of a lower layer; permissions are not why."""

    def refused(source, _):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    (tmp_path / "m").mkdir()
    monkeypatch.setattr(steps, "_move", refused)
    with OutputSet(True) as outputs:
        outputs.stage(tmp_path / "m", folder=True).mkdir()
        with pytest.raises(OutputError, match="nothing was replaced") as caught:
            outputs.commit()
    assert "container's image" in caught.value.hint
    assert names_in(tmp_path) == ["m"]


def test_another_process_puts_in_order_what_this_one_could_not(tmp_path, monkeypatch):
    """As the error says, and though this process goes on."""
    write(tmp_path, "old")
    own, calls = steps._move, []

    def move(*names):
        calls.append(names)
        if len(calls) > 2:
            raise OSError(errno.EBUSY, "busy")
        own(*names)

    monkeypatch.setattr(steps, "_move", move)
    with pytest.raises(steps.StuckError, match="could not be renamed back"):
        write(tmp_path, "new")
    command = [
        sys.executable,
        "-c",
        "from lora_export.cli import main; main()",
        "inspect",
        tmp_path / "m.onnx",
        "--plot",
        tmp_path / "p.html",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert "note: put back m" in done.stderr
    assert contents(tmp_path) == all_of("old")


@pytest.mark.filterwarnings("error")
def test_notes_are_no_errors_even_where_warnings_are(tmp_path, monkeypatch, caplog):
    """Neither beside what an ended run has left, nor where what was replaced can't be removed."""
    ended(tmp_path, "x")
    write(tmp_path, "old")
    assert "removed 2.0 MB" in caplog.text
    own = steps._remove

    def busy(path):
        if path.suffix == ".old":
            raise OSError(errno.EBUSY, "busy", str(path))
        own(path)

    with monkeypatch.context() as later:
        later.setattr(steps, "_remove", busy)
        write(tmp_path, "new")
    assert caplog.text.count("could not remove") == 3
    assert all_of("new").items() <= contents(tmp_path).items()
    assert tidy(tmp_path)  # the mark has stayed, so what is left can be told from what is needed
    assert contents(tmp_path) == all_of("new")


@pytest.mark.parametrize("verb", ["merge", "demo"])
def test_a_folder_that_filled_meanwhile_is_not_replaced(verb, tmp_path, monkeypatch):
    """By --force a folder of ours may go, by no means somebody's; without it an empty one may."""
    own = OutputSet.commit

    def late(outputs, *check):
        if target.is_dir():
            shutil.rmtree(target)
        target.mkdir()
        (target / "thesis.txt").write_text("somebody's")
        own(outputs, *check)

    target = tmp_path / "out"
    if verb == "merge":
        arguments = CASES["merge"].arguments(tmp_path, tmp_path)
        arguments = [*arguments[:-1], target]
        assert cli._run([str(argument) for argument in arguments], False) == 0
        monkeypatch.setattr(OutputSet, "commit", late)
        assert cli._run([str(argument) for argument in [*arguments, "--force"]], False) == 1
    else:
        from lora_export.demo.run import check_output

        target.mkdir()
        with OutputSet(check_output(target, False)) as outputs:
            outputs.stage(target, folder=True).mkdir()
            with pytest.raises(OutputError, match="is not the folder of an earlier demo"):
                late(outputs, lambda: check_output(target, False))
    assert faults.snapshot(target) == {"thesis.txt": b"somebody's"}
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_file_of_its_own_force(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    with OutputSet() as outputs:
        outputs.stage(tmp_path / "a", force=True).write_text("new")
        with pytest.raises(OutputError, match="exists already"):
            outputs.stage(tmp_path / "b")
        outputs.commit()
    assert contents(tmp_path) == {"a": "new", "b": "old"}
    shutil.rmtree(tmp_path)
