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
import threading
import time
from pathlib import Path

import faults
import pytest
from output_cases import CASES, fill, inputs, old_of, run

from lora_export import cli
from lora_export.errors import OutputError
from lora_export.storage.commit import lease, lock, steps
from lora_export.storage.commit.lease import Lease, new_identity
from lora_export.storage.commit.leftovers import scratch_folder, tidy
from lora_export.storage.commit.lock import locked
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import Move
from lora_export.storage.commit.told import has_begun, listening
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


def test_a_folder_of_two_paths_has_one_lock(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    bind = ["mount", "--bind", str(tmp_path / "a"), str(tmp_path / "b")]
    if subprocess.run(bind, capture_output=True, check=False).returncode:
        pytest.skip("folders can't be mounted here")
    try:
        with in_seconds(10), OutputSet() as outputs:
            outputs.stage(tmp_path / "a" / "p.json").write_text("new")
            outputs.stage(tmp_path / "b" / "p.html").write_text("new")
            outputs.commit()
        assert contents(tmp_path / "a") == dict.fromkeys(["p.json", "p.html"], "new")
    finally:
        subprocess.run(["umount", str(tmp_path / "b")], check=True)


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
        cli._run(["inspect", str(out / "nothing"), "--plot", str(out / "nothing.html")], False)
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


def _terminated(phase):
    with Uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        phase[:] = ["exit"]


def _interrupted(done):
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(True)


@pytest.mark.parametrize("at", ["enter", "exit"])
def test_a_signal_while_handlers_are_exchanged_leaves_none_behind(at, monkeypatch):
    """Ctrl-C once more, in the moment when some handlers are put in place or back, and others are not yet."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    arrived, own, phase = [], signal.signal, ["enter"]
    before = [signal.getsignal(number) for number in numbers]

    def hang_up(*_):
        arrived.append("HUP")
        raise SystemExit

    handlers = (signal.default_int_handler, lambda *_: arrived.append("TERM"), hang_up)
    for number, handler in zip(numbers, handlers, strict=True):
        own(number, handler)

    def exchanged(number, handler):
        result = own(number, handler)
        if number == signal.SIGINT and phase == [at]:
            phase.append("done")
            signal.raise_signal(signal.SIGHUP if at == "enter" else signal.SIGINT)
        return result

    monkeypatch.setattr(signal, "signal", exchanged)
    try:
        with pytest.raises(SystemExit if at == "enter" else KeyboardInterrupt):
            _terminated(phase)
        assert tuple(map(signal.getsignal, numbers)) == handlers
        assert arrived == (["HUP"] if at == "enter" else ["TERM"])
    finally:
        for number, handler in zip(numbers, before, strict=True):
            own(number, handler)


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


def test_a_signal_ends_the_wait_for_a_lock(tmp_path):
    def ask(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ask)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        timer.start()
        with locked([tmp_path]), in_seconds(10), pytest.raises(KeyboardInterrupt), locked([tmp_path]):
            pass
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def test_leases_are_no_other_users_business(tmp_path):
    with OutputSet() as outputs:
        outputs.stage(tmp_path / "m.onnx")
        (held,) = tmp_path.iterdir()
        assert held.stat().st_mode & 0o777 == 0o600


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


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
def test_what_lies_in_the_locks_place_is_not_followed_nor_waited_for(what, tmp_path, monkeypatch):
    """As another user could put it into a folder that all may write into: it can be opened to be read."""
    out, place = tmp_path / "out", tmp_path / "out" / lock.NAME
    out.mkdir()
    (tmp_path / "victim").write_text("mine")
    made = {"link": lambda: place.symlink_to(tmp_path / "victim"), "pipe": lambda: os.mkfifo(place)}
    made.get(what, place.mkdir)()
    own = os.open

    def not_ours(path, flags, *mode, **more):
        if str(path) == str(place) and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return own(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", not_ours)
    with in_seconds(10):
        with pytest.raises(OutputError, match="is not a regular file"):
            write(out, "new")
        with pytest.warns(UserWarning, match="is not a regular file"):
            assert not tidy(out)
    assert [path.name for path in out.iterdir()] == [lock.NAME]
    assert (tmp_path / "victim").read_text() == "mine"


@contextlib.contextmanager
def in_seconds(most: int):
    def late(*_):
        raise AssertionError("it waits without end")  # no OSError, which is dealt with

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- other processes' names ----------------------------------------------------------------------------


def ended(folder: Path, *names: str) -> str:
    """Leave files of a set whose process has ended; return the set's identity."""
    held = Lease(folder, new_identity())
    held.hold()
    for name in names:
        staged_by(held.identity, folder, name)
    held.let_go()
    Lease.held_here.discard(held.identity)
    return held.identity


def staged_by(identity: str, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / f"{name}.tmp-{identity}"
    path.write_bytes(b"x" * 2_000_000)
    return path


LIVE = """
import sys
from pathlib import Path
from lora_export.storage.outputs import OutputSet
with OutputSet() as outputs:
    outputs.stage(Path(sys.argv[1])).write_text("being written")
    print("written", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def writing(target: Path):
    """Let another process write a file for as long as the block goes on, and kill it."""
    command = [sys.executable, "-c", LIVE, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            yield
        finally:
            process.kill()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_what_certainly_has_ended_is_removed(tmp_path):
    # Neither ours by its name, nor by its form.
    strange = ["m.onnx.tmp-123-abcdef", "x.tmp", "lora-export-notes"]
    # An earlier version's: on which machine its process ran is not known.
    strange += [f"m.onnx.tmp-123-abcdef12{kind}" for kind in ("", ".old")]
    for name in strange:
        (tmp_path / name).write_text("mine")
    other = staged_by("ffffff-1-0123456789ab", tmp_path)
    without = staged_by(new_identity(), tmp_path, "without-a-lease")
    with OutputSet() as outputs, writing(tmp_path / "running"):
        outputs.stage(tmp_path / "own").write_text("mine")
        kept = names_in(tmp_path)
        ended(tmp_path, "one", "two")
        (tmp_path / f"folder.tmp-{ended(tmp_path)}").mkdir()
        with pytest.warns(UserWarning, match="removed") as told:
            assert tidy(tmp_path)
        assert names_in(tmp_path) == kept
    texts = [str(one.message) for one in told]
    assert any("removed 4.0 MB that ended runs had left in" in text for text in texts)
    (unknown,) = [text for text in texts if "not touched in" in text]
    assert other.name in unknown
    assert "and 1 more" in unknown
    with pytest.warns(UserWarning, match="removed .*: running"):
        assert tidy(tmp_path)
    assert names_in(tmp_path) == sorted([*strange, other.name, without.name])


@pytest.mark.parametrize("where", [["-p", "-f", "--mount-proc"], ["-T", "--boottime", "100000"]])
def test_other_namespaces_of_the_machine_see_who_runs(where, tmp_path):
    """Numbers of processes and their times of start are others there; the lock is the same."""
    code = "import sys; from pathlib import Path; from lora_export.storage.commit.leftovers import tidy"
    look = ["unshare", *where, sys.executable, "-c", f"{code}; tidy(Path(sys.argv[1]))", str(tmp_path)]
    if subprocess.run([*look[: 1 + len(where)], "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces can't be made here")
    with writing(tmp_path / "m.onnx"):
        kept = names_in(tmp_path)
        subprocess.run(look, check=True)
        assert names_in(tmp_path) == kept
    subprocess.run(look, check=True)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("boot", ["another", None])
def test_another_kernels_files_are_left_alone_and_told_of(boot, tmp_path, monkeypatch):
    """A clone of this machine, this one after it was started again, or one that hides which start it is."""
    own = tmp_path / "boot"
    monkeypatch.setattr(lease, "_BOOT", own)
    lease._kernel.cache_clear()
    try:
        out = tmp_path / "out"
        out.mkdir()
        if boot:
            own.write_text("first")
        ended(out, "m.onnx")
        if boot:
            own.write_text(boot)
        lease._kernel.cache_clear()
        left = names_in(out)
        with pytest.warns(UserWarning, match="it is unknown whether the run that wrote this has ended"):
            assert not tidy(out)
        assert names_in(out) == left
    finally:
        lease._kernel.cache_clear()


def test_temporary_folders_of_ended_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as mine:
        left = tmp_path / f"lora-export-{ended(tmp_path)}"
        (left / "deep").mkdir(parents=True)
        (left / "deep" / "graph.onnx").write_bytes(b"x" * 3000)
        assert cli._run(["inspect", str(tmp_path / "none" / "x")], False) == 1
        assert (
            f"removed 3.0 kB that ended runs had left in {tmp_path}: {left.name}" in capsys.readouterr().err
        )
        assert [path for path in tmp_path.iterdir() if path.suffix != ".lease"] == [mine]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--help", "--dry-run"])
def test_help_and_dry_runs_change_nothing(option, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended(tmp_path, "m.onnx")
    left = names_in(tmp_path)
    cli._run(["merge-onnx", "--base", str(tmp_path / "b.onnx"), option], False)
    assert names_in(tmp_path) == left


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_export.storage.commit import steps
from lora_export.storage.outputs import OutputSet
number, *targets = sys.argv[1:]
own, calls = steps._move, []
def move(*names):
    own(*names)
    calls.append(names)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
steps._move = move
with OutputSet(True) as outputs:
    for target in targets:
        outputs.stage(Path(target)).write_text("new")
    outputs.commit()
"""


def killed_after(number: int, *targets: Path) -> bool:
    """Let another process replace files, and kill it after some renamings; return whether it came to that."""
    command = [sys.executable, "-c", KILLED, str(number), *map(str, targets)]
    return subprocess.run(command, check=False).returncode == -signal.SIGKILL


def files(folder: Path) -> dict[str, str]:
    return {name: text for name, text in contents(folder).items() if name != lock.NAME}


def test_a_finished_set_does_not_replace_what_came_later(tmp_path):
    assert killed_after(1, *(tmp_path / name for name in NAMES))  # the mark
    (tmp_path / "m.onnx").write_text("later")
    left = files(tmp_path)
    with pytest.warns(UserWarning, match=r"m\.onnx exists now, so nothing was touched"):
        assert not tidy(tmp_path)
    assert files(tmp_path) == left


def test_the_next_writer_finishes_before_it_refuses(tmp_path):
    """Half of a killed run's files have their names: without --force they are in the way, until all have."""
    assert killed_after(2, *(tmp_path / name for name in NAMES))
    assert len(set(NAMES) & set(names_in(tmp_path))) == 1
    with (
        pytest.warns(UserWarning, match="finished"),
        pytest.raises(OutputError, match="exists already") as caught,
    ):
        write(tmp_path, "newer", force=False)
    assert contents(tmp_path) == all_of("new")
    assert str(tmp_path / NAMES[0]) in caught.value.problems


@pytest.mark.parametrize("force", [False, True])
def test_a_writer_that_waits_finishes_what_a_killed_one_has_left(force, tmp_path):
    """It began before the other came; what it must not replace is looked at when that is in order."""
    if force:
        write(tmp_path, "old")
    with OutputSet(force) as outputs:
        for name in NAMES:
            outputs.stage(tmp_path / name).write_text("newest")
        # All that is replaced is taken away, and the mark is there.
        assert killed_after(4 if force else 1, *(tmp_path / name for name in NAMES))
        refused = pytest.raises(OutputError, match="exists already")
        with pytest.warns(UserWarning, match="finished m"), contextlib.nullcontext() if force else refused:
            outputs.commit()
    assert contents(tmp_path) == all_of("newest" if force else "new")


@pytest.mark.parametrize("number", range(1, 8))
def test_old_files_are_put_back_where_the_new_ones_are_gone(number, tmp_path):
    """Somebody has made room by removing what looked unfinished, or a new file of the set."""
    write(tmp_path, "old")
    assert killed_after(number, *(tmp_path / name for name in NAMES))
    for path in tmp_path.iterdir():
        if ".tmp-" in path.name and path.suffix != ".old":
            path.unlink()
    if number == 7:
        (tmp_path / "m.onnx").unlink()
    with pytest.warns(UserWarning, match="put back m"):
        assert tidy(tmp_path)
    assert contents(tmp_path) == all_of("old")


@pytest.mark.parametrize("named", ["a", "b"])
@pytest.mark.parametrize("replaces", [False, True])
def test_all_folders_of_a_set_go_one_way(replaces, named, tmp_path):
    """Wherever the process was killed, and whichever folder the next command names."""
    states = []
    for number in range(1, 10):
        top = tmp_path / str(number)
        folders = [top / "a", top / "b"]
        for folder in folders:
            folder.mkdir(parents=True)
            if replaces:
                (folder / "p").write_text("old")
        was_killed = killed_after(number, *(folder / "p" for folder in folders))
        with contextlib.suppress(UserWarning):
            tidy(top / named)
        found = [files(folder) for folder in folders]
        assert found[0] == found[1]
        states.append(found[0].get("p"))
        if not was_killed:
            break
    assert states[-1] == "new"
    assert len(states) == (6 if replaces else 4)
    assert states[:-1] == (["old"] * 2 if replaces else []) + ["new"] * 3


@pytest.mark.parametrize("replaces", [False, True])
def test_a_set_of_which_one_folder_is_not_there_is_left_alone(replaces, tmp_path):
    """A volume is not mounted, or another one in its place: what lies here may be all that there is."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        if replaces:
            (folder / "p").write_text("old")
    assert killed_after(3 if replaces else 1, *(folder / "p" for folder in folders))
    folders[0].rename(tmp_path / "elsewhere")
    for _ in range(2):
        left = files(folders[1])
        what = "rename it back if p is missing" if replaces else "not touched in"
        with pytest.warns(UserWarning, match=what):
            assert not tidy(folders[1])
        assert files(folders[1]) == left
        folders[0].mkdir(exist_ok=True)
    folders[0].rmdir()
    (tmp_path / "elsewhere").rename(folders[0])
    with pytest.warns(UserWarning, match="finished p"):
        assert tidy(folders[1])
    assert [files(folder) for folder in folders] == [{"p": "new"}] * 2


def test_what_lies_in_a_set_is_asked_for_once(tmp_path, monkeypatch):
    """Its process ends while it is looked at: either all of the set is left alone, or none."""
    write(tmp_path, "old")
    assert killed_after(3, *(tmp_path / name for name in NAMES))
    for runs in range(3):
        own, asked = Lease.owner, []

        def dying(held, runs=runs, own=own, asked=asked):
            asked.append(held)
            return lease.Owner.RUNS if len(asked) <= runs else own(held)

        before = files(tmp_path)
        monkeypatch.setattr(Lease, "owner", dying)
        with contextlib.suppress(UserWarning):
            changed = tidy(tmp_path)
        monkeypatch.setattr(Lease, "owner", own)
        assert len(asked) <= 1
        assert files(tmp_path) == (all_of("old") if changed else before)
    assert not killed_after(9, *(tmp_path / name for name in NAMES))


def test_doctor_says_and_removes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    ended(tmp_path, "m.onnx")
    other = staged_by("ffffff-1-0123456789ab", tmp_path, "other")
    from lora_export.doctor.doctor import _leftovers

    said = _leftovers()
    assert [line.split(" that ")[0] for line in said[:1]] == ["removed 2.0 MB"]
    assert other.name in said[1]
    assert names_in(tmp_path) == [other.name]


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


def test_what_is_open_is_put_away_whatever_one_of_it_says():
    closed = []

    def failing():
        closed.append("failing")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    notes = []
    with listening(notes.append) as run:
        has_begun(lambda: closed.append("first"))
        has_begun(failing)
        run.put_away()
    assert closed == ["failing", "first"]
    assert os.strerror(errno.EIO) in notes[0]


def test_a_lease_is_let_go_once(tmp_path, monkeypatch):
    """The number of a file that is closed may be another thread's file by the second try."""
    lease = Lease(tmp_path, new_identity())
    lease.hold()
    closed, own = [], os.close

    def close(handle):
        closed.append(handle)
        own(handle)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        lease.let_go()
        lease.let_go()
    assert len(closed) == 1


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("moment", ["staged", "complete", *range(2 * len(NAMES) + 1)])
def test_the_folders_link_leads_elsewhere_while_a_set_is_written(moment, replaces, tmp_path, monkeypatch):
    """Deployments point ``current`` to another release at any time: a set goes where it led at first."""
    out, first, other = (tmp_path / name for name in ("out", "first", "other"))
    first.mkdir()
    other.mkdir()
    out.symlink_to(first)
    old = dict.fromkeys(NAMES, "old")
    for folder in (first, other) if replaces else ():
        write(folder, "old")
    count, move = 0, steps._move

    def point(now: object) -> None:
        if now == moment:
            (tmp_path / "link").symlink_to(other)
            (tmp_path / "link").replace(out)

    def moved(*paths: Path) -> None:
        nonlocal count
        point(count)
        count += 1
        move(*paths)

    monkeypatch.setattr(steps, "_move", moved)
    with OutputSet(True) as outputs:
        for name in NAMES:
            outputs.stage(out / name).write_text("new")
            point("staged")
            moment = None if moment == "staged" else moment
        point("complete")
        outputs.commit()
    assert contents(first) == dict.fromkeys(NAMES, "new")
    assert contents(other) == (old if replaces else {})


def test_a_scratch_folder_is_put_away_where_it_was_made(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "out").symlink_to("first")
    with scratch_folder(tmp_path / "out"):
        (tmp_path / "out").unlink()
        (tmp_path / "out").symlink_to("other")
    assert not any((tmp_path / "first").iterdir())


def test_another_file_under_the_new_name_is_not_the_one_that_was_renamed(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("mine")
    step = Move.of(one, two)
    one.unlink()
    two.write_text("somebody else's")
    assert not step.is_done()
    with pytest.raises(FileNotFoundError):
        step.do()
    assert two.read_text() == "somebody else's"


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "begun"])
@pytest.mark.parametrize("moment", ["checked", "named"])
def test_what_others_write_into_a_folder_that_is_replaced_is_not_lost(
    moment, complete, tmp_path, monkeypatch
):
    """Their file would be removed with the old folder, after their run has ended well."""
    folder, move = tmp_path / "m", steps._move
    folder.mkdir()
    (folder / "old").write_text("old")
    other = OutputSet()

    def come_by() -> None:
        other.stage(folder / "mine").write_text("mine")
        if complete:
            other.commit()

    def moved(*paths: Path) -> None:
        if moment == "named" and paths[0] == folder:
            come_by()
        move(*paths)

    monkeypatch.setattr(steps, "_move", moved)
    with OutputSet(True) as outputs:
        outputs.stage(folder, folder=True).mkdir()
        with pytest.raises(OutputError, match="nothing was replaced") as caught:
            outputs.commit(come_by if moment == "checked" else None)
    assert any("mine" in line for line in caught.value.problems)
    if not complete:
        other.commit()
    assert contents(folder) == {"old": "old", "mine": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
