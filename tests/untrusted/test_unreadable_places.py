"""That nobody can say what is at a place is an error that names it: nothing is taken for absent."""

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from exposed_models import group

from lora_export.cli import _run
from lora_export.storage.commit.steps import places_below
from lora_export.storage.hashes import hash_folder, sha256_of
from lora_export.untrusted import places
from lora_export.untrusted.places import exists, files_below, is_file, is_folder, is_link, is_there, listed

PACKAGE = Path(places.__file__).parents[1]
LOOKS = (exists, is_there, is_file, is_folder, is_link)
# Run on the device by themselves.
_ALONE = ("kit/begin.py", "kit/finish.py")


@pytest.fixture
def failing(monkeypatch):
    """Let looking at a place fail, each time or only the first, as a network's file system does."""

    def fail(path, code, times=10**6):
        left = [times]
        for name in ("stat", "lstat"):
            own = getattr(os, name)

            def look(given, *args, _own=own, **more):
                if not isinstance(given, int) and os.fspath(given) == os.fspath(path) and left[0] > 0:
                    left[0] -= 1
                    raise OSError(code, os.strerror(code), os.fspath(given))
                return _own(given, *args, **more)

            monkeypatch.setattr(os, name, look)

    return fail


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_error_is_no_absence(look, code, failing, tmp_path):
    failing(tmp_path / "a", code)
    with pytest.raises(OSError, match="/a'") as caught:
        look(tmp_path / "a")
    assert caught.value.errno == code


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_absent_and_what_is_there(look, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    names = ("file", "folder", "link", "broken", "loop", "none", "file/below", "x" * 300, "a\0b")
    theirs = {
        exists: os.path.exists,
        is_there: os.path.lexists,
        is_file: os.path.isfile,
        is_folder: os.path.isdir,
        is_link: os.path.islink,
    }
    for name in names:
        assert look(tmp_path / name) == theirs[look](tmp_path / name), name


def test_no_other_way_of_looking():
    """`pathlib`'s and `os.path`'s ways say "absent" where an error is."""
    way = re.compile(
        r"\.(exists|is_file|is_dir|is_symlink)\(\)|os\.path\.(exists|isfile|isdir|islink|lexists)"
    )
    files = [path for path in PACKAGE.rglob("*.py") if not path.as_posix().endswith(_ALONE)]
    assert not [f"{path}: {found[0]}" for path in files for found in way.finditer(path.read_text())]


def test_no_other_way_of_listing():
    """`Path.glob` and `os.walk` take a folder that can't be listed for an empty one, and call themselves."""
    way = re.compile(r"\.r?glob\(|\bos\.f?walk\(")
    files = [path for path in PACKAGE.rglob("*.py") if not path.as_posix().endswith(_ALONE)]
    assert not [f"{path}: {one[0]}" for path in files for one in way.finditer(path.read_text())]


@pytest.fixture
def deep(tmp_path):
    """Make in ``set`` a folder that holds one that holds one …, and a file in the last."""
    yield lambda depth: _deepen(tmp_path / "set", depth)
    # Before `tmp_path` ends: pytest removes it by calling itself for each folder.
    subprocess.run(["rm", "-rf", str(tmp_path / "set")], check=True)


def _deepen(folder, depth):
    place = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("a", dir_fd=place)
        inner = os.open("a", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(os.open("evil.bin", os.O_CREAT | os.O_WRONLY, dir_fd=place))
    os.close(place)


@pytest.mark.parametrize(
    ("depth", "says"),
    [(1500, "evil.bin: not described"), (3000, "a/a: not described; it is not a regular file")],
)
def test_folders_in_folders(depth, says, deep, tmp_path, capsys):
    """Python calls itself a thousand times at most; a path has 4,096 letters at most."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "tokenizer.txt").write_text("x")
    (tmp_path / "set" / "SHA256SUMS").write_text(
        f"{sha256_of(tmp_path / 'set/tokenizer.txt')}  tokenizer.txt\n"
    )
    deep(depth)
    assert _run(["verify", str(tmp_path / "set")], False) == 1
    assert says in capsys.readouterr().err
    if depth == 1500:
        assert len(files_below(tmp_path)) == 3


@pytest.fixture
def closed(monkeypatch):
    """Let a folder be one that can't be listed."""

    def close(folder, code=errno.EACCES):
        for name in ("scandir", "listdir"):
            own = getattr(os, name)

            def scan(path=".", _own=own):
                if not isinstance(path, int) and os.fspath(path) == os.fspath(folder):
                    raise OSError(code, os.strerror(code), os.fspath(path))
                return _own(path)

            monkeypatch.setattr(os, name, scan)

    return close


def test_a_folder_that_cannot_be_listed_is_not_empty(closed, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f").write_text("x")
    assert files_below(tmp_path) == [tmp_path / "a" / "b" / "f"]
    assert listed(tmp_path / "a" / "b", "?") == [tmp_path / "a" / "b" / "f"]
    assert listed(tmp_path / "a" / "b", "*.f") == listed(tmp_path / "none") == []
    closed(tmp_path / "a" / "b")
    for look in (hash_folder, files_below, places_below):
        with pytest.raises(PermissionError, match="/a/b"):
            look(tmp_path)
    with pytest.raises(PermissionError, match="/a/b"):
        listed(tmp_path / "a" / "b")


def test_a_set_with_a_folder_that_cannot_be_listed_is_not_right(closed, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "evil.bin").write_text("x")
    (tmp_path / "tokenizer.txt").write_text("x")
    (tmp_path / "SHA256SUMS").write_text(f"{sha256_of(tmp_path / 'tokenizer.txt')}  tokenizer.txt\n")
    assert _run(["verify", str(tmp_path)], False) == 1
    assert "sub/evil.bin: not described" in capsys.readouterr().err
    closed(tmp_path / "sub")
    assert _run(["verify", str(tmp_path)], False) == 1
    assert "sub: not described; it can't be listed: Permission denied" in capsys.readouterr().err


@group("llama")
def test_a_base_that_cannot_be_listed_is_not_one_without_links(closed, tmp_path, capsys):
    """Its files can be read by their names, and transformers does that."""
    base = shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    closed(base)
    adapter = str(tiny.adapter("llama"))
    assert _run(["merge", "--base", str(base), "--adapter", adapter, "-o", str(tmp_path / "out")], False) == 1
    assert f"{base}: Permission denied" in capsys.readouterr().err
    words = ["merge-onnx", "--base", str(base), "--adapter", adapter, "-o", str(tmp_path / "m.onnx")]
    assert _run(words, False) == 1
    assert f"{base}: Permission denied" in capsys.readouterr().err


@group("llama")
@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize(
    "place", ["adapter/adapter_config.json", "base/config.json", "base/lora.json", "adapter", "out"]
)
def test_verbs_name_the_place(place, code, failing, tmp_path, capsys):
    """A config that is there would be none, and an earlier merge's history empty."""
    adapter = shutil.copytree(tiny.adapter("llama"), tmp_path / "adapter")
    shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    (tmp_path / "out").mkdir()
    failing(tmp_path / place, code)
    words = ["merge", "--base", tmp_path / "base", "--adapter", adapter, "-o", tmp_path / "out", "--force"]
    assert _run(list(map(str, words)), False) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / place) in error
    assert os.strerror(code) in error
    assert "does not exist" not in error
    assert not list((tmp_path / "out").iterdir())
