"""Sets whose folder others move or write while they are committed, and locks that fail to close."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from written_sets import NAMES, contents, write

from lora_export.errors import OutputError
from lora_export.storage.commit import steps
from lora_export.storage.commit.lease import Lease, new_identity
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.commit.steps import Move
from lora_export.storage.commit.told import has_begun, listening
from lora_export.storage.outputs import OutputSet


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
