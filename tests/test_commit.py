"""Steps that fail for good, signals from outside, locks, and what is done about other processes' names."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faults
import pytest
from output_cases import CASES, fill, inputs, run

from lora_export import cli
from lora_export.errors import OutputError
from lora_export.storage.commit import leftovers, lock, owner, steps
from lora_export.storage.commit.leftovers import scratch_folder, tidy
from lora_export.storage.commit.lock import locked
from lora_export.storage.commit.owner import Owner, this_process
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.outputs import OutputSet

NAMES = ("m.onnx.data", "m.lora.json", "m.onnx")


def write(folder: Path, text: str, force: bool = True) -> None:
    with OutputSet(force) as outputs:
        for name in NAMES:
            outputs.stage(folder / name).write_text(text)
        outputs.commit()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def all_of(text: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, text)


# --- errors that stay ----------------------------------------------------------------------------------


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
    old = dict.fromkeys(new, b"old")
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
        if "could not be named back" in said:
            stuck += 1
            assert "nothing was replaced" not in said, where
        elif code and "written and complete" not in said:
            assert old.items() <= found.items(), where
        else:
            assert new.items() <= found.items(), where
        with monkeypatch.context() as later:
            later.setattr(Owner, "has_ended", property(lambda self: True))
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


# --- signals -------------------------------------------------------------------------------------------

SLOW = """
import os, pathlib, sys, time
from lora_export import cli
name, number, mark, *arguments = sys.argv[1:]
own, calls = getattr(os, name), []
def slow(*given, **named):
    calls.append(given)
    if len(calls) == int(number):
        pathlib.Path(mark).touch()
        time.sleep(1)
    return own(*given, **named)
setattr(os, name, slow)
cli.main(arguments)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize(
    ("call", "at", "renaming"), [("fsync", 1, False), ("rename", 2, True), ("rename", 5, True)]
)
def test_a_signal_from_outside(number, call, at, renaming, tmp_path, capsys):
    graph, adapter = inputs(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    fill(out, dict.fromkeys(NAMES, b"old"))
    arguments = [
        "merge-onnx",
        "--base",
        graph,
        "--adapter",
        adapter,
        "-o",
        out / "m.onnx",
        "--force",
        "--quiet",
    ]
    command = [sys.executable, "-c", SLOW, call, str(at), str(tmp_path / "mark"), *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "mark").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        said = process.stderr.read()
    if number == signal.SIGKILL:
        assert process.returncode == -number
        cli._run(["inspect", str(out / "nothing")], False)
        told = capsys.readouterr().err
        if not renaming:
            assert "note: removed " in told
        else:
            # The second renaming takes an old file away, the fifth gives a new one its name.
            assert ("note: put back " if at == 2 else "note: finished ") in told
        whole = at == 5
    else:
        assert process.returncode == 128 + number
        whole = renaming
        told = "complete and in place: " if renaming else "nothing was replaced"
        assert f"Aborted: {told}" in said
        assert "Traceback" not in said
    found = contents_of_bytes(out)
    assert set(found) == set(NAMES)
    assert (found["m.onnx"] != b"old") == whole
    assert ([text == b"old" for text in found.values()]) == [not whole] * 3


def contents_of_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_signals_wait_and_come_in_the_end():
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append("TERM"))
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert not arrived
        assert arrived == ["TERM"]
    finally:
        signal.signal(signal.SIGTERM, before)
    done = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(done)
    assert done


def _interrupted(done):
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(True)


# --- the lock ------------------------------------------------------------------------------------------


def test_a_lock_is_waited_for_and_leaves_nothing(tmp_path):
    with (
        locked([tmp_path]),
        pytest.raises(OutputError, match="another process is writing into"),
        locked([tmp_path], 0.05),
    ):
        pass
    assert not list(tmp_path.iterdir())
    with locked([tmp_path]):
        assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
    assert not list(tmp_path.iterdir())


def test_a_lock_of_a_killed_process_is_taken(tmp_path):
    (tmp_path / lock.NAME).touch()
    write(tmp_path, "new")
    assert contents(tmp_path) == all_of("new")


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks(refusal, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    write(tmp_path, "new")
    assert contents(tmp_path) == all_of("new")


def test_a_link_in_the_locks_place_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / lock.NAME).symlink_to(tmp_path / "victim")
    write(tmp_path, "new")
    assert (tmp_path / "victim").read_text() == "mine"


# --- other processes' names ----------------------------------------------------------------------------


def staged_by(who: Owner, folder: Path, name: str = "m.onnx", kind: str = "") -> Path:
    path = folder / f"{name}.tmp-{who}-abc123{kind}"
    path.write_bytes(b"x" * 2_000_000)
    return path


def dead() -> Owner:
    process = subprocess.Popen(["true"])
    process.wait()
    return Owner(this_process().host, process.pid, "0" * 6)


def test_only_what_certainly_has_ended_is_removed(tmp_path):
    here = this_process()
    running = subprocess.Popen(["sleep", "60"])
    try:
        kept = [
            staged_by(here, tmp_path, "own"),
            staged_by(Owner(here.host, running.pid, owner._start_of(running.pid)), tmp_path, "running"),
            staged_by(Owner("f" * 6, 99999999, here.start), tmp_path, "another-machine"),
        ]
        # Neither ours by its name, nor by its form.
        kept += [tmp_path / name for name in ("m.onnx.tmp-123-abcdef", "x.tmp", "lora-export-notes")]
        # An earlier version's: on which machine its process ran is not known.
        kept += [tmp_path / f"m.onnx.tmp-{dead().pid}-abcdef12{kind}" for kind in ("", ".old")]
        for path in kept[3:]:
            path.write_text("mine")
        gone = [
            staged_by(dead(), tmp_path, "dead"),
            staged_by(Owner(here.host, running.pid, "0" * 6), tmp_path, "reused"),
        ]
        (tmp_path / f"folder.tmp-{dead()}-abc123").mkdir()
        with pytest.warns(UserWarning, match=r"removed 4\.0 MB that ended runs have left in"):
            assert tidy(tmp_path)
    finally:
        running.kill()
        running.wait()
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert not any(path.exists() for path in gone)
    assert leftovers.foreign(tmp_path) == [kept[2], *kept[-2:]]


def test_a_process_that_is_only_waited_for_has_ended():
    process = subprocess.Popen(["true"])
    try:
        deadline = time.monotonic() + 30
        while owner._start_of(process.pid) != "ended" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Owner(this_process().host, process.pid, "0" * 6).has_ended
    finally:
        process.wait()


def test_whose_processes_can_be_asked_for(monkeypatch, tmp_path):
    """The same machine after a restart; not another container, nor a container of that name elsewhere."""
    boot = tmp_path / "boot"
    monkeypatch.setattr(owner, "_BOOT", boot)

    def host(namespace, start):
        monkeypatch.setattr(owner, "_namespace", lambda: namespace)
        boot.write_text(start)
        return owner._host.__wrapped__()

    own, one, two = owner._MACHINES_OWN, "pid:[4026532201]", "pid:[4026532202]"
    assert host(own, "first") == host(own, "second")
    assert len({host(own, "first"), host(one, "first"), host(two, "first"), host(one, "second")}) == 4


def test_without_proc_a_number_that_runs_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(owner, "_PROC", tmp_path)
    who = this_process()
    assert not who.has_ended
    assert Owner(who.host, dead().pid, who.start).has_ended
    assert not Owner(who.host, 10**9 * 9, who.start).has_ended


def test_temporary_folders_of_ended_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as mine:
        left = tmp_path / f"lora-export-{dead()}-0123456789abcdef"
        (left / "deep").mkdir(parents=True)
        (left / "deep" / "graph.onnx").write_bytes(b"x" * 3000)
        assert cli._run(["inspect", str(tmp_path / "none" / "x")], False) == 1
        assert (
            f"removed 3.0 kB that ended runs have left in {tmp_path}: {left.name}" in capsys.readouterr().err
        )
        assert list(tmp_path.iterdir()) == [mine]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--help", "--dry-run"])
def test_help_and_dry_runs_change_nothing(option, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = staged_by(dead(), tmp_path)
    cli._run(["merge-onnx", "--base", str(tmp_path / "b.onnx"), option], False)
    assert left.exists()


def test_a_finished_set_does_not_replace_what_came_later(tmp_path):
    who = dead()
    staged = staged_by(who, tmp_path)
    mark = staged_by(who, tmp_path, kind=steps.MARK)
    (tmp_path / "m.onnx").write_text("later")
    with pytest.warns(UserWarning, match=r"m\.onnx exists by now, so nothing was touched"):
        assert not tidy(tmp_path)
    assert staged.exists()
    assert mark.exists()
    assert (tmp_path / "m.onnx").read_text() == "later"


def test_the_next_writer_finishes_before_it_refuses(tmp_path):
    """Half of a killed run's files have their names: without --force they are in the way, until all have."""
    who = dead()
    (tmp_path / "m.onnx.data").write_text("new")
    for name in NAMES[1:]:
        staged_by(who, tmp_path, name).write_text("new")
    staged_by(who, tmp_path, kind=steps.MARK)
    with (
        pytest.warns(UserWarning, match="finished"),
        pytest.raises(OutputError, match="exists already") as caught,
    ):
        write(tmp_path, "newer", force=False)
    assert contents(tmp_path) == all_of("new")
    assert str(tmp_path / NAMES[0]) in caught.value.problems


def test_doctor_says_and_removes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    left = staged_by(dead(), tmp_path)
    other = staged_by(Owner("f" * 6, 1, "0" * 6), tmp_path, "other")
    from lora_export.doctor.doctor import _leftovers

    said = _leftovers()
    assert [line.split(" that ")[0] for line in said[:1]] == ["removed 2.0 MB"]
    assert other.name in said[1]
    assert not left.exists()
    assert other.exists()


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
            with pytest.raises(OutputError, match="no folder of an earlier demo"):
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
