"""An engine's record survives writing and reading, and belongs to its engine alone."""

import json
from dataclasses import replace

import pytest
from engine_files import RECORD

from lora_export.cli import main
from lora_export.engines.record import EngineRecord, is_engine, read_engine, record_path
from lora_export.errors import BackendError
from lora_export.storage.hashes import sha256_of


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / RECORD.name
    path.write_bytes(b"vtrt" + b"\0" * 96)
    record = replace(RECORD, sha256=sha256_of(path), size_bytes=100)
    record_path(path).write_text(record.to_json(), encoding="utf-8")
    return path


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, exposed=None)], ids=["bank", "plain"])
def test_it_reads_what_it_writes(record):
    assert EngineRecord.from_json(record.to_json(), "x") == record
    assert EngineRecord.from_json(record.to_json(), "x").to_json() == record.to_json()


def test_an_engine_is_read_with_its_record(engine):
    assert read_engine(engine).profiles == RECORD.profiles
    assert read_engine(engine).port("y").dtype == "float16"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "it is cut short"),
        (lambda path: path.write_bytes(b"vtrt" + b"\0" * 200), "it is another file"),
        (lambda path: path.write_bytes(b"vtrt" + b"\1" * 96), "is not what m.rtx-4090.json describes"),
        (lambda path: path.unlink(), "no engine at"),
        (lambda path: record_path(path).unlink(), "has no record beside it"),
        (lambda path: record_path(path).write_text("{"), "can't be read as JSON"),
        (lambda path: record_path(path).write_text("[]"), "is not a record of an engine"),
        (lambda path: record_path(path).write_bytes(b"\xff\xfe"), "is not UTF-8"),
        (lambda path: _change(path, kind="other"), 'kind "other"'),
        (lambda path: _change(path, format=99), "format 99"),
        (lambda path: _change(path, profiles=3), "profiles: 3, wanted a list"),
        (lambda path: _change(path, options={"nothing": 1}), "options.nothing: is not known"),
        (lambda path: _change(path, exposed={"mode": "swap"}), "exposed.modules: is missing"),
    ],
)
def test_damage_is_said(engine, damage, said, capsys):
    damage(engine)
    with pytest.raises(Exception, match=said):
        read_engine(engine)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(engine)])
    assert stop.value.code == 1
    assert "Traceback" not in capsys.readouterr().err


def _change(path, **fields):
    data = json.loads(record_path(path).read_text())
    record_path(path).write_text(json.dumps(data | fields))


def test_files_are_told_from_adapters(tmp_path, engine):
    assert is_engine(engine)
    assert is_engine(tmp_path / "x.plan")
    plain = tmp_path / "adapter.safetensors"
    plain.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert not is_engine(plain)
    assert not is_engine(tmp_path)
    assert not is_engine(tmp_path / "nothing")
    renamed = tmp_path / "renamed.bin"
    renamed.write_bytes(engine.read_bytes())
    assert is_engine(renamed)


def test_inspect_prints_it(engine, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(engine)])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for text in ("tensorrt-rtx 1.7.1", "rtx-4090", "8.9", "bank of 1 (a;", "tf32=True", "2x4"):
        assert text in said
    with pytest.raises(SystemExit):
        main(["inspect", str(engine), "--json"])
    assert EngineRecord.from_json(capsys.readouterr().out, "x") == read_engine(engine)


def test_inspect_refuses_an_adapters_options(engine, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(engine), "--alpha", "3"])
    assert stop.value.code == 2
    assert "omit --alpha" in capsys.readouterr().err


def test_a_record_of_another_kind_is_a_backend_error():
    with pytest.raises(BackendError, match="build the engine again"):
        EngineRecord.from_json('{"kind": "x", "format": 1}', "r.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory": {"weights": 2**63}}, "an integer of 64 bits"),
        ({"inputs": [{"name": "x", "dtype": "os", "dims": [-1]}]}, 'inputs[0].dtype: "os"'),
    ],
)
def test_what_no_build_writes_is_the_users_error(change, says):
    with pytest.raises(BackendError) as caught:
        EngineRecord.from_json(json.dumps(json.loads(RECORD.to_json()) | change), "m.json")
    assert says in "".join(caught.value.problems)
