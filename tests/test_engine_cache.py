"""The cache returns an engine for what it was built from, and never for anything else."""

import json
import os
import shutil
import time

import pytest

from lora_export.engines.cache import EngineCache, default_folder, key_of
from lora_export.engines.record import sha256_of


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


def engine(tmp_path, name="e", data=b"engine"):
    path = tmp_path / name
    path.write_bytes(data)
    return path, {"size_bytes": len(data), "sha256": sha256_of(path)}


def keep(cache, key, path, built):
    log = path.with_name("log")
    log.write_text("the builder's messages")
    cache.keep(key, path, log, built)


@pytest.fixture
def settled(monkeypatch):
    """Files look as if they had changed long ago."""
    monkeypatch.setattr("lora_export.engines.cache._RACY_NS", -1)


def test_what_was_kept_is_found(cache, tmp_path):
    path, built = engine(tmp_path)
    assert cache.find("k") is None
    keep(cache, "k", path, built)
    found = cache.find("k")
    assert found.engine.read_bytes() == b"engine"
    assert found.built == built
    assert cache.find("other") is None


def test_the_builders_messages_are_kept_with_it(cache, tmp_path):
    path, built = engine(tmp_path)
    keep(cache, "k", path, built)
    assert cache.take("k", tmp_path / "e2", tmp_path / "log2") == built
    assert (tmp_path / "e2").read_bytes() == b"engine"
    assert (tmp_path / "log2").read_text() == "the builder's messages"
    assert cache.take("other", tmp_path / "e3", tmp_path / "log3") is None


@pytest.mark.parametrize("how", ["removes", "replaces"])
def test_another_process_that_changes_an_entry_meanwhile(how, cache, tmp_path, monkeypatch):
    """What was copied is nothing, or no longer what the builder said of it: it is built again."""
    path, built = engine(tmp_path)
    keep(cache, "k", path, built)
    other, rebuilt = engine(tmp_path, "other", b"ENGINE")
    copy = shutil.copyfile

    def interrupted(source, target):
        monkeypatch.setattr(shutil, "copyfile", copy)
        if how == "removes":
            shutil.rmtree(tmp_path / "cache" / "k")
        else:
            keep(cache, "k", other, rebuilt)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    assert cache.take("k", tmp_path / "e2", tmp_path / "log2") is None


def test_a_cache_that_may_only_be_read_is_one(cache, tmp_path, monkeypatch):
    path, built = engine(tmp_path)
    keep(cache, "k", path, built)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("lora_export.engines.cache.os.utime", refuse)
    assert cache.find("k") is not None


@pytest.mark.parametrize("name", ["engine", "built.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_forgotten(cache, tmp_path, name, how):
    path, built = engine(tmp_path)
    keep(cache, "k", path, built)
    file = tmp_path / "cache" / "k" / name
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-2] if how == "cut" else data[:-2] + b"#!")
    assert cache.find("k") is None
    assert not (tmp_path / "cache" / "k").exists()


def test_hashes_are_remembered_and_a_changed_file_is_read_again(cache, tmp_path, settled):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = cache.sha256(path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lora_export.engines.cache.sha256_of", lambda _: pytest.fail("read again"))
        assert cache.sha256(path) == first
    path.write_bytes(b"two")
    assert cache.sha256(path) == sha256_of(path) != first


@pytest.mark.parametrize("age_s", [0, 60])
def test_a_file_that_has_just_changed_is_not_remembered(age_s, cache, tmp_path):
    """Also not one that looks older than it is, as `cp -p` and `tar` leave it."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    then = time.time() - age_s
    os.utime(path, (then, then))
    cache.sha256(path)
    assert not (tmp_path / "cache" / "hashes.json").exists()


def test_a_damaged_memory_of_hashes_is_no_reason_to_fail(cache, tmp_path):
    path, _ = engine(tmp_path)
    (tmp_path / "cache").mkdir()
    for text in ("[", "[]", json.dumps({str(path): 3})):
        (tmp_path / "cache" / "hashes.json").write_text(text)
        assert cache.sha256(path) == sha256_of(path)


def test_those_used_least_recently_make_room(tmp_path):
    cache = EngineCache(tmp_path / "cache", max_bytes=250)
    path, built = engine(tmp_path, data=b"x" * 100)
    for number in range(3):
        keep(cache, f"k{number}", path, built)
        os.utime(tmp_path / "cache" / f"k{number}", (number + 1, number + 1))
    assert cache.find("k1")  # used: now k2 is the oldest
    keep(cache, "k3", path, built)
    assert [cache.find(f"k{number}") is not None for number in range(4)] == [False, True, False, True]


def test_one_larger_than_the_limit_is_kept_until_the_next(tmp_path):
    cache = EngineCache(tmp_path / "cache", max_bytes=1)
    path, built = engine(tmp_path)
    keep(cache, "a", path, built)
    assert cache.find("a")


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path, settled):
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file" / "cache")
    path, built = engine(tmp_path)
    keep(cache, "k", path, built)
    assert cache.find("k") is None
    assert cache.sha256(path) == built["sha256"]


def test_the_key_depends_on_everything():
    parts = {"source": "a", "options": {"tf32": False}, "profiles": [1, 2]}
    same = {"profiles": [1, 2], "options": {"tf32": False}, "source": "a"}
    assert key_of(parts) == key_of(same)
    others = [parts | {"source": "b"}, parts | {"options": {"tf32": True}}, parts | {"profiles": [2, 1]}]
    assert len({key_of(part) for part in [parts, *others]}) == 4


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORA_EXPORT_CACHE", raising=False)
    assert default_folder() == tmp_path / "lora-export" / "engines"
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
