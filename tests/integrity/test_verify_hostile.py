"""Descriptions that say much with few bytes: verify's memory and answers stay in proportion to them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import peaks
import pytest

from lora_export.errors import LoraExportError
from lora_export.integrity.check import verify
from lora_export.storage.hashes import sha256_of
from lora_export.storage.sums.listed import read_sums
from lora_export.untrusted.links import RealPaths

HEX = "0" * 64


def written(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def good(folder: Path) -> Path:
    written(folder, "a.txt", "a")
    return written(folder, "SHA256SUMS", f"{sha256_of(folder / 'a.txt')}  a.txt\n")


def claims(count: int) -> str:
    entry = {"name": "", "sha256": "", "size_bytes": 1}
    return json.dumps({"files": {f"{i:060x}": entry for i in range(count)}}, separators=(",", ":"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_descriptions_take_no_more_than_ten_times_their_file(tmp_path: Path) -> None:
    folders = [
        written(tmp_path / "lines", "SHA256SUMS", "\n" * 3_000_000),
        written(tmp_path / "letters", "SHA256SUMS", "\u65e5\n" * 1_000_000),
        written(tmp_path / "sums", "SHA256SUMS", "".join(f"{HEX}  {i:x}\n" for i in range(100_000))),
        written(tmp_path / "outside", "SHA256SUMS", "".join(f"{HEX}  ../{i:x}\n" for i in range(100_000))),
        written(tmp_path / "manifest", "m.lora.json", claims(60_000)),
    ]
    found = peaks.measured([["verify", good(tmp_path / "good")]], [["verify", path] for path in folders])
    for folder, (code, _, err, peak, _) in zip(folders, found, strict=True):
        (file,) = folder.iterdir()
        assert code == 1, err
        assert len(err) < 10_000
        assert peak <= peaks.allowed(file), f"{folder.name}: {peak / 1e6:.0f} MB"


def test_the_first_wrong_lines_of_a_list_are_named(tmp_path: Path) -> None:
    right = f"{HEX}  a b\r\t\u2028\n"
    path = written(tmp_path, "SHA256SUMS", f"{right}x\n{right}{'y' * 5}\n{HEX}  end") / "SHA256SUMS"
    found = read_sums(path)
    assert found.files == (("a b\r\t\u2028", HEX),) * 2
    assert found.problems == (
        "line 2 is not a hash and a name",
        "line 4 is not a hash and a name",
        "line 5 does not end with a line break",
    )
    path.write_text("x\n" * 1000)
    assert len(read_sums(path).problems) == 21
    assert read_sums(path).problems[-1].startswith("980 more lines")


def test_a_file_with_very_many_names_is_not_read_for_each(tmp_path: Path) -> None:
    folder = good(tmp_path / "set")
    written(folder, "m.lora.json", claims(2))
    for i in range(70):
        (folder / f"l{i}.lora.json").symlink_to("m.lora.json")
    for given in (folder, folder / "a.txt"):
        with pytest.raises(LoraExportError, match="more than 64 links") as caught:
            verify(given)
        assert "remove" in caught.value.hint


def resolved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often verify follows the links of a whole path."""
    count = 0

    def counted(path: str | Path, real_of: Callable[..., str] = os.path.realpath) -> str:
        nonlocal count
        count += 1
        return real_of(path)

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "realpath", counted)
        verify(folder)
    return count


@pytest.mark.parametrize("kind", ["one name", "many names", "absent", "manifest"])
def test_a_claim_does_not_follow_the_links_of_every_folder_above(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deep(count: int) -> Path:
        folder = written(tmp_path / str(count), "top.txt", "a")
        names = ["top.txt", *(f"d/d/d/{'x' if kind == 'one name' else i}" for i in range(count))]
        for name in names[1:] if kind != "absent" else ():
            written(folder / "d/d/d", name.rpartition("/")[2], "a")
        digest = sha256_of(folder / "top.txt")
        if kind == "manifest":
            files = {name: {"name": name, "sha256": digest, "size_bytes": 1} for name in names}
            return written(folder, "m.lora.json", json.dumps({"files": files}))
        return written(folder, "SHA256SUMS", "".join(f"{digest}  {name}\n" for name in names))

    assert resolved(deep(40), monkeypatch) == resolved(deep(4), monkeypatch)


def test_real_paths_are_those_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    written(tmp_path / "a/b", "file", "a")
    for name, leads_to in {
        "folder": "a/b",
        "link": "folder/file",
        "nowhere": "x/y",
        "loop": "loop",
        "a/b/up": "../..",
    }.items():
        (tmp_path / name).symlink_to(leads_to)
    names = ["a/b/file", "a/b", "folder/file", "folder/../b", "link", "nowhere", "nowhere/z", "loop/z"]
    names += [
        "a/b/up/link",
        "a/b/up/a/b/up/folder/file",
        "absent/x/y",
        "link/x",
        "..",
        "",
        "a/../link",
        "x" * 300,
    ]
    real = RealPaths()
    for _ in range(2):
        for path in (tmp_path / name for name in names):
            assert real.of(path) == os.path.realpath(path)
