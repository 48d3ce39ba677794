"""Files of other processes: what has ended is removed or finished, the rest is left alone."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from written_sets import NAMES, all_of, contents, ended, names_in, staged_by, write

from lora_export import cli
from lora_export.errors import OutputError
from lora_export.storage.commit import lease, lock
from lora_export.storage.commit.lease import Lease, new_identity
from lora_export.storage.commit.leftovers import scratch_folder, tidy
from lora_export.storage.outputs import OutputSet

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
            return lease.HolderState.RUNS if len(asked) <= runs else own(held)

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
