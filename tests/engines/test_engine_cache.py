"""The cache returns an engine for what it was built from, and never for anything else."""

import errno
import json
import os
import shutil
import time

import faults
import pytest
from engine_graphs import product

from lora_export import build_engine
from lora_export.engines.cache import EngineCache, default_folder, key_of
from lora_export.storage.commit.lease import new_identity
from lora_export.storage.hashes import sha256_of

KEYS = [key_of({"number": number}) for number in range(4)]
K = KEYS[0]


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


PORT = {"name": "x", "dtype": "FLOAT", "dims": [-1, 4]}
SAID = {
    "build_s": 1.5,
    "peak_build_bytes": 100,
    "memory": {"weights_bytes": 7},
    "inputs": [PORT],
    "outputs": [PORT | {"name": "y"}],
}


def engine(tmp_path, name="e", data=b"engine"):
    path = tmp_path / name
    path.write_bytes(data)
    return path, {**SAID, "size_bytes": len(data), "sha256": sha256_of(path)}


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
    assert cache.find(K) is None
    keep(cache, K, path, built)
    found = cache.find(K)
    assert found.engine.read_bytes() == b"engine"
    assert found.built == built
    assert cache.find(key_of({"other": 1})) is None


def test_the_builders_messages_are_kept_with_it(cache, tmp_path):
    path, built = engine(tmp_path)
    keep(cache, K, path, built)
    assert cache.take(K, tmp_path / "e2", tmp_path / "log2") == built
    assert (tmp_path / "e2").read_bytes() == b"engine"
    assert (tmp_path / "log2").read_text() == "the builder's messages"
    assert cache.take(key_of({"other": 1}), tmp_path / "e3", tmp_path / "log3") is None


@pytest.mark.parametrize("how", ["removes", "replaces"])
def test_another_process_that_changes_an_entry_meanwhile(how, cache, tmp_path, monkeypatch):
    """What was copied is nothing, or no longer what the builder said of it: it is built again."""
    path, built = engine(tmp_path)
    keep(cache, K, path, built)
    other, rebuilt = engine(tmp_path, "other", b"ENGINE")
    copy = shutil.copyfile

    def interrupted(source, target):
        monkeypatch.setattr(shutil, "copyfile", copy)
        if how == "removes":
            shutil.rmtree(tmp_path / "cache" / K)
        else:
            keep(cache, K, other, rebuilt)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    assert cache.take(K, tmp_path / "e2", tmp_path / "log2") is None


def test_a_cache_that_may_only_be_read_is_one(cache, tmp_path, monkeypatch):
    path, built = engine(tmp_path)
    keep(cache, K, path, built)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("lora_export.engines.cache.os.utime", refuse)
    assert cache.find(K) is not None


@pytest.mark.parametrize("name", ["engine", "built.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_forgotten(cache, tmp_path, name, how):
    path, built = engine(tmp_path)
    keep(cache, K, path, built)
    file = tmp_path / "cache" / K / name
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-2] if how == "cut" else data[:-2] + b"#!")
    assert cache.find(K) is None
    if how == "gone":  # it may be on its way
        assert (tmp_path / "cache" / K).exists()
    else:
        assert not (tmp_path / "cache" / K).exists()
    keep(cache, K, path, built)
    assert cache.find(K).built == built


# Field → what it may not be, beside missing.
WRONG = {
    "build_s": ["y", None, float("nan"), [1.5]],
    "peak_build_bytes": ["y", 1.5, -1, True],
    "memory": [[], {"weights_bytes": "y"}, {"weights_bytes": -1}],
    "inputs": [{}, [[]], [{"name": "x"}], [PORT | {"dtype": 1}], [PORT | {"dims": [-2]}]],
    "outputs": ["y", [PORT | {"name": None}], [PORT | {"dims": 4}], [PORT | {"dims": [1] * 99}]],
    "size_bytes": ["6", -6, None],
    "sha256": [1, None, ["a"], "0" * 64],
}


@pytest.mark.parametrize("field", WRONG)
def test_an_entry_with_other_fields_is_none_of_ours(field, cache, tmp_path):
    path, built = engine(tmp_path)
    rest = {key: value for key, value in built.items() if key != field}
    for said in [rest, *({**rest, field: value} for value in WRONG[field])]:
        keep(cache, K, path, said)
        assert cache.take(K, tmp_path / "e2", tmp_path / "log2") is None, said
        assert cache.find(K) is None, said
    keep(cache, K, path, built)
    assert cache.take(K, tmp_path / "e2", tmp_path / "log2") == built


@pytest.mark.parametrize("what", ["pipe", "link", "folder"])
@pytest.mark.parametrize("name", ["engine", "log", "built.json"])
def test_an_entry_of_other_things_than_files_is_not_read(name, what, cache, tmp_path):
    """A pipe would be waited for without end; where a link leads, is not the cache's to copy."""
    path, built = engine(tmp_path)
    keep(cache, K, path, built)
    file, elsewhere = tmp_path / "cache" / K / name, tmp_path / "elsewhere"
    elsewhere.write_bytes(file.read_bytes())
    file.unlink()
    {"pipe": os.mkfifo, "link": lambda place: place.symlink_to(elsewhere), "folder": os.mkdir}[what](file)
    assert cache.take(K, tmp_path / "e2", tmp_path / "log2") is None
    assert cache.find(K) is None
    assert elsewhere.exists()
    keep(cache, K, path, built)
    assert cache.find(K).built == built


@pytest.mark.parametrize("entry", [["y"], ["0" * 63], [None], [{}]])
def test_hashes_that_are_none_are_not_believed(entry, cache, tmp_path, settled):
    path, _ = engine(tmp_path)
    wanted = cache.sha256(path)
    hashes = tmp_path / "cache" / "hashes.json"
    (name, known), = json.loads(hashes.read_text()).items()  # fmt: skip
    hashes.write_text(json.dumps({name: [*entry, *known[1:]]}))
    assert cache.sha256(path) == wanted


def test_hashes_in_a_pipe_are_not_waited_for(cache, tmp_path, settled):
    path, built = engine(tmp_path)
    (tmp_path / "cache").mkdir()
    os.mkfifo(tmp_path / "cache" / "hashes.json")
    assert cache.sha256(path) == built["sha256"]


@pytest.mark.parametrize("change", ["another name", "one axis fewer", "none"])
def test_an_entry_with_other_ports_than_the_graphs_is_built_again(change, tmp_path):
    graph = product(tmp_path / "p.onnx")
    first = build_engine(graph, "sm89", tmp_path / "one", cache=tmp_path / "cache").engines[0]
    (file,) = (tmp_path / "cache").glob("*/built.json")
    said = json.loads(file.read_text())
    port = said["outputs"][0]
    changed = {
        "another name": [port | {"name": "z"}],
        "one axis fewer": [port | {"dims": port["dims"][1:]}],
        "none": [],
    }
    file.write_text(json.dumps(said | {"outputs": changed[change]}))
    again = build_engine(graph, "sm89", tmp_path / "two", cache=tmp_path / "cache").engines[0]
    assert not again.cached
    assert again.record.outputs == first.record.outputs
    third = build_engine(graph, "sm89", tmp_path / "three", cache=tmp_path / "cache").engines[0]
    assert third.cached
    assert third.record.outputs == first.record.outputs


@pytest.mark.parametrize("what", ["sha256_of", "open_regular"])
def test_an_entry_that_cannot_be_read_at_the_moment_is_kept(what, cache, tmp_path, monkeypatch):
    path, built = engine(tmp_path)
    keep(cache, K, path, built)

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(f"lora_export.engines.cache.{what}", fail)
        assert cache.find(K) is None
        assert cache.take(K, tmp_path / "e2", tmp_path / "log2") is None
    assert cache.find(K).built == built


@pytest.mark.parametrize("name", ["my-project", "f" * 64, "0" * 64 + ".tmp-"])
def test_what_others_keep_in_the_folder_is_not_removed(name, tmp_path):
    """Neither somebody's folder nor what another process is just writing."""
    cache = EngineCache(tmp_path / "cache", max_bytes=1)
    theirs = tmp_path / "cache" / (name + new_identity() if name.endswith("-") else name)
    theirs.mkdir(parents=True)
    (theirs / "engine").write_bytes(b"x" * 100)
    if "tmp" in name:
        (theirs / "built.json").write_text("{}")
    else:
        (theirs / "notes.txt").write_text("mine")
    (tmp_path / "cache" / "hashes.json").write_text('{"mine": 1}')
    os.utime(theirs, (1, 1))
    before = faults.snapshot(theirs)
    path, built = engine(tmp_path)
    for key in KEYS:
        keep(cache, key, path, built)
    cache.find(name)
    cache.sha256(path)
    assert [cache.find(key) is not None for key in KEYS] == [False, False, False, True]
    assert faults.snapshot(theirs) == before
    assert (tmp_path / "cache" / "hashes.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("state", ["whole", "damaged", "without its record"])
def test_what_others_keep_in_an_entry_is_not_replaced(state, cache, tmp_path):
    path, built = engine(tmp_path)
    keep(cache, K, path, built)
    place = cache.folder / K
    (place / "notes").mkdir()
    (place / "notes" / "NOTES.txt").write_text("mine")
    if state == "damaged":
        (place / "engine").write_bytes(b"other bytes")
    elif state == "without its record":
        (place / "built.json").unlink()
    assert "is not replaced" in cache.keep(K, path, tmp_path / "log", built)
    assert (place / "notes" / "NOTES.txt").read_text() == "mine"


def test_a_file_that_changes_while_it_is_read_is_not_remembered(cache, tmp_path, monkeypatch):
    """Reading a large one takes longer than the two seconds after which a time is believed."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    clock = [time.time_ns()]

    def read(_):
        clock[0] += 10**11
        return "of what was read"

    monkeypatch.setattr("lora_export.engines.cache.time.time_ns", lambda: clock[0])
    monkeypatch.setattr("lora_export.engines.cache.sha256_of", read)
    cache.sha256(path)
    assert not (tmp_path / "cache" / "hashes.json").exists()


def test_a_file_of_the_same_numbers_on_another_device(cache, tmp_path, settled, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    cache.sha256(path)
    file = tmp_path / "cache" / "hashes.json"
    known = json.loads(file.read_text())
    ((digest, device, *rest),) = known.values()
    assert device == path.stat().st_dev
    file.write_text(json.dumps({str(path): ["of the other", device + 1, *rest]}))
    assert cache.sha256(path) == digest


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
        keep(cache, KEYS[number], path, built)
        os.utime(tmp_path / "cache" / KEYS[number], (number + 1, number + 1))
    assert cache.find(KEYS[1])  # used: now k2 is the oldest
    keep(cache, KEYS[3], path, built)
    assert [cache.find(KEYS[number]) is not None for number in range(4)] == [False, True, False, True]


def test_one_larger_than_the_limit_is_kept_until_the_next(tmp_path):
    cache = EngineCache(tmp_path / "cache", max_bytes=1)
    path, built = engine(tmp_path)
    keep(cache, K, path, built)
    assert cache.find(K)


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path, settled):
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file" / "cache")
    path, built = engine(tmp_path)
    keep(cache, K, path, built)
    assert cache.find(K) is None
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
