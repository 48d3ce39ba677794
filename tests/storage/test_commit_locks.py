"""Locks of folders that are written into."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading

import pytest
from written_sets import all_of, contents, in_seconds, write

from lora_export.errors import OutputError
from lora_export.storage.commit import lock
from lora_export.storage.commit.leftovers import tidy
from lora_export.storage.commit.lock import locked
from lora_export.storage.outputs import OutputSet


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
