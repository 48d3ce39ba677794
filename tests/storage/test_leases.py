"""Leases that no run of ours has left: they came with a stranger's folder, and lead nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import faults
import pytest
from output_cases import CASES, checkpoint, exposed, inputs

from lora_export import cli
from lora_export.storage.commit import lease
from lora_export.storage.commit.lease import Lease, new_identity
from lora_export.storage.commit.leftovers import mention, tidy
from lora_export.storage.commit.steps import fingerprint


def planted(folder: Path, identity: str, *lines: object) -> None:
    """Write a lease that nobody holds, as whoever packs a folder can."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / f".lora-export-{identity}.lease").write_text(text)


def entry(target: object, victim: Path) -> dict[str, object]:
    return {"target": str(target), "new": list(fingerprint(victim)), "replaces": False}


@pytest.fixture
def stranger(tmp_path):
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "mine")
    return folder


@pytest.fixture
def victim(tmp_path):
    """A file beside the stranger's folder, whose kind, size and time the stranger knows."""
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "thesis.txt"
    path.write_text("mine")
    return path


# What leads from the stranger's folder to the victim's; whether it is covered is tried both ways.
PLACES = {
    "absolute": lambda victim: str(victim.parent),
    "upwards": lambda victim: f"../{victim.parent.name}",
    "by a detour": lambda victim: f"link/../{victim.parent.name}",
    "a link": lambda victim: "link",
}


@pytest.mark.parametrize("is_marked", [False, True])
@pytest.mark.parametrize("says", ["entries", "a folder and entries", "a folder", "first"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("theirs", [None, [], [{"folder": "../stranger"}], [{"first": "../third"}]])
def test_no_lease_leads_to_another_folder(theirs, place, says, is_marked, stranger, victim, tmp_path):
    """Though the command writes where it lies; a lease in the other folder has to point back."""
    identity, where = new_identity(), PLACES[place](victim)
    (tmp_path / "third").mkdir()
    covers, goes = {"folder": where}, {"entries": [entry(f"{where}/{victim.name}", victim)]}
    lines = {
        "entries": [goes],
        "a folder and entries": [covers, goes],
        "a folder": [covers],
        "first": [{"first": where}],
    }
    planted(stranger, identity, *lines[says])
    if theirs is not None:
        planted(victim.parent, identity, *theirs)
    for name in (f"x.tmp-{identity}", f"{victim.name}.tmp-{identity}.old"):
        (victim.parent / name).write_text("mine too")
    if is_marked:
        own = Lease(stranger, identity)
        own.path.rename(own.mark.destination)
    before = faults.snapshot(victim.parent)
    with contextlib.suppress(UserWarning):
        tidy(stranger)
    assert faults.snapshot(victim.parent) == before


DAMAGED = {
    "no JSON": "{",
    "no object": [],
    "an unknown field": {"folder": "a", "more": 1},
    "no text": {"folder": 1},
    "an empty text": {"first": ""},
    "a zero": {"first": "a\0b"},
    "no list": {"entries": "m"},
    "a number": {"entries": [1]},
    "a field missing": {"entries": [{"target": "m", "new": [1, 2, 3]}]},
    "two numbers": {"entries": [{"target": "m", "new": [1, 2], "replaces": False}]},
    "texts for numbers": {"entries": [{"target": "m", "new": ["1", "2", "3"], "replaces": False}]},
    "no truth": {"entries": [{"target": "m", "new": [1, 2, 3], "replaces": 0}]},
    "no name": {"entries": [{"target": "./", "new": [1, 2, 3], "replaces": False}]},
    "the folder itself": {"entries": [{"target": "./..", "new": [1, 2, 3], "replaces": True}]},
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_lease_with_other_fields_is_left_alone_with_its_set(kind, tmp_path):
    identity = new_identity()
    (tmp_path / f"m.tmp-{identity}").write_text("kept")
    planted(tmp_path, identity, DAMAGED[kind])
    before = faults.snapshot(tmp_path)
    with pytest.warns(UserWarning, match=f"not touched in .*: m.tmp-{identity}"):
        assert not tidy(tmp_path)
    assert faults.snapshot(tmp_path) == before


def test_a_large_lease_is_not_read(tmp_path):
    identity = new_identity()
    (tmp_path / f"m.tmp-{identity}").write_text("kept")
    planted(tmp_path, identity)
    os.truncate(tmp_path / f".lora-export-{identity}.lease", 1 << 40)
    with pytest.warns(UserWarning, match="not touched in"):
        assert not tidy(tmp_path)


def test_another_users_lease_decides_nothing(tmp_path):
    """In a folder into which all write, a name of ours may meet a lease of theirs."""
    if os.geteuid():
        pytest.skip("only root can give a file away")
    identity = new_identity()
    (tmp_path / f"m.tmp-{identity}").write_text("kept")
    planted(tmp_path, identity)
    os.chown(tmp_path / f".lora-export-{identity}.lease", 12345, -1)
    with pytest.warns(UserWarning, match="not touched in"):
        assert not tidy(tmp_path)
    os.chown(tmp_path / f".lora-export-{identity}.lease", 0, -1)
    with pytest.warns(UserWarning, match="removed"):
        assert tidy(tmp_path)
    assert not faults.snapshot(tmp_path)


def test_names_that_are_not_utf_8_are_settled(tmp_path):
    name = os.fsdecode(b"m\xff")
    held = Lease(tmp_path, new_identity())
    held.hold()
    staged = lease.staged_as(tmp_path / name, held.identity)
    staged.path.write_text("new")
    held.remember([staged])
    held.path.rename(held.mark.destination)
    held.let_go()
    Lease.held_here.discard(held.identity)
    with pytest.warns(UserWarning, match="finished"):
        assert tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


READING = {
    "inspect": lambda folder, out: ["inspect", inputs(folder)[1]],
    "inspect with its base": lambda folder, out: ["inspect", inputs(folder)[1], "--base", checkpoint(folder)],
    "inspect a graph": lambda folder, out: ["inspect", exposed(folder)],
    "inspect, drawn": lambda folder, out: ["inspect", inputs(folder)[1], "--plot", out / "p.html"],
    "verify": lambda folder, out: ["verify", inputs(folder)[0]],
    "verify a folder": lambda folder, out: ["verify", inputs(folder)[0].parent],
}
WRITING = ("merge", "merge-onnx", "swap-onnx", "bank-onnx", "convert-adapter", "kit")


@pytest.mark.parametrize("verb", [*READING, *WRITING])
def test_nothing_is_touched_where_a_verb_reads(verb, tmp_path, monkeypatch, capsys):
    """Neither what an ended run has left there, nor what a lease says that it has; it is said."""
    made, out = tmp_path / "made", tmp_path / "out"
    for folder in (made, out, tmp_path / "tmp"):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    arguments = READING[verb](made, out) if verb in READING else CASES[verb].arguments(made, out)
    for folder in [made, *(path for path in made.iterdir() if path.is_dir())]:
        identity = new_identity()
        victim = folder / "notes.txt"
        victim.write_text("mine")
        (folder / f"m.onnx.tmp-{identity}").write_text("half")
        planted(folder, identity, {"entries": [entry("./notes.txt", victim)]})
    before = faults.snapshot(made)
    cli._run([str(argument) for argument in arguments], False)
    said = capsys.readouterr().err
    assert faults.snapshot(made) == before
    assert "note: an ended run has left m.onnx.tmp-" in said
    assert "Traceback" not in said
    # What is written into is put in order, so that the same lease would have done something.
    identity = new_identity()
    (out / f"m.onnx.tmp-{identity}").write_text("half")
    planted(out, identity)
    cli._run(["inspect", str(tmp_path / "none"), "--plot", str(out / "other.html")], False)
    assert "note: removed " in capsys.readouterr().err
    assert not list(out.glob("*.tmp-*"))


@pytest.mark.parametrize(("option", "name"), [("--report", "r.json"), ("--plot", "p.svg")])
def test_where_a_report_goes_what_is_left_is_removed_and_not_only_mentioned(option, name, tmp_path, capsys):
    out, identity = tmp_path / "out", new_identity()
    out.mkdir()
    (out / f"m.onnx.tmp-{identity}").write_text("half")
    planted(out, identity)
    cli._run(["inspect", str(tmp_path / "none"), option, str(out / name)], False)
    said = capsys.readouterr().err
    assert "note: removed " in said
    assert "an ended run has left" not in said
    assert not list(out.glob("*.tmp-*"))


def test_what_runs_is_not_mentioned(tmp_path):
    held = Lease(tmp_path, new_identity())
    held.hold()
    (tmp_path / f"m.onnx.tmp-{held.identity}").write_text("being written")
    Lease.held_here.discard(held.identity)  # as another process sees it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mention(tmp_path)
    held.let_go()
    with pytest.warns(UserWarning, match="an ended run has left m.onnx.tmp-"):
        mention(tmp_path)
