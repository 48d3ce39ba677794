"""JSON and YAML of strangers: one reader with one set of rules, in every place that reads them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_export.base.checkpoint.weight_files import read_object
from lora_export.base.history.history import history_of
from lora_export.demo.greedy import Expected
from lora_export.engines.record import EngineRecord
from lora_export.errors import CheckpointError, LoraExportError
from lora_export.formats.reading.source import read_adapter_config
from lora_export.graph.captured import MODEL_KEY, Captured
from lora_export.graph.data_identity import KEY as DATA_KEY
from lora_export.graph.data_identity import refuse_changed_data
from lora_export.graph.exposed import LoraRecord
from lora_export.packages.onnxruntime_genai import CONFIG, companions_of
from lora_export.reports.parity.to_json import read_report
from lora_export.storage.manifest import Manifest
from lora_export.untrusted.documents import (
    MAX_BYTES,
    MAX_DEPTH,
    DocumentError,
    compose_yaml,
    parse_json,
    read_json,
)

ROOT = Path(__file__).resolve().parents[2]
DAMAGED = {
    "cut": b'{"a": [1, 2',
    "empty": b"",
    "deep lists": b"[" * 100_000,
    "deep lists, closed": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 90_000 + b"1" + b"}" * 90_000,
    "twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "not UTF-8": b'{"a": "\xff"}',
    "half a pair": b'{"a": "\\ud800"}',
    "too large for a float": b'{"a": %d}' % 10**309,
    "too small for a float": b'{"a": [%d]}' % -(10**400),
    "a number of 5000 digits": b"[" + b"9" * 5000 + b"]",
}


def _greedy(path: Path) -> Any:
    return Expected.load(path.rename(path.with_name("greedy.json")).parent)


def _genai(path: Path) -> Any:
    path.rename(path.with_name(CONFIG))
    return companions_of(path.with_name("model.onnx"), path.parent / "out" / "model.onnx")


READERS = {
    "an adapter's config": lambda path: read_adapter_config(path, path.parent),
    "a checkpoint's config": read_object,
    "a manifest": lambda path: Manifest.from_json(path.read_bytes()),
    "a graph's LoRA record": lambda path: LoraRecord.from_json(path.read_bytes()),
    "a captured graph's record": lambda path: Captured.from_metadata({MODEL_KEY: path.read_bytes()}),
    "a graph's data": lambda path: refuse_changed_data({DATA_KEY: path.read_bytes()}, path, lambda: ""),
    "an engine's record": EngineRecord.read,
    "a parity report": read_report,
    "the demo's answers": _greedy,
    "genai's config": _genai,
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_document_is_the_users_error_in_every_place(
    reader: str, damage: str, tmp_path: Path
) -> None:
    path = tmp_path / "document.json"
    path.write_bytes(DAMAGED[damage])
    # A parity report writes paths that are not UTF-8 as halves of pairs: that is legal, and no report.
    with pytest.raises(LoraExportError) as caught:
        READERS[reader](path)
    assert caught.value.exit_code == 1
    assert caught.value.hint


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_not_taken_for_none(damage: str, tmp_path: Path) -> None:
    (tmp_path / "lora.json").write_bytes(DAMAGED[damage])
    with pytest.raises(CheckpointError) as caught:
        history_of(tmp_path / "lora.json")
    assert "restore it" in str(caught.value.hint)


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2.5, true, null, "ü"]}', "3", '"x"', '{"a": Infinity, "b": -Infinity}', "[]"],
)
def test_what_python_reads_is_read_the_same(text: str) -> None:
    assert parse_json(text) == json.loads(text) == parse_json(text.encode())


@pytest.mark.parametrize("text", ["[NaN]", "[Infinity]", "[-Infinity]"])
def test_finite_numbers_where_somebody_computes_with_them(text: str) -> None:
    parse_json(text)
    with pytest.raises(DocumentError):
        parse_json(text, finite=True)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_the_deepest_that_is_read(opening: str, closing: str) -> None:
    parse_json(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 5000):
        with pytest.raises(DocumentError, match="nested deeper"):
            parse_json(opening * depth + "1" + closing * depth)


@pytest.mark.parametrize("value", ["[],", '{"":{}},', '"",', "{},"])
def test_what_takes_many_times_its_size_is_refused_before(value: str) -> None:
    with pytest.raises(DocumentError, match="in memory"):
        parse_json("[" + value * 4_000_000 + "1]")
    parse_json("[" + value * 1000 + "1]")


def test_a_real_index_is_not_costly() -> None:
    names = {
        f"model.layers.{i}.mlp.up_proj.weight": "model-00001-of-00002.safetensors" for i in range(60_000)
    }
    assert parse_json(json.dumps({"weight_map": names})) == {"weight_map": names}


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES * 4)
    with pytest.raises(LoraExportError, match="the limit for such a file"):
        read_json(path)


@pytest.mark.parametrize("content", ["a: &a [1, 2]\nb: *a\n", "- 1\n"])
def test_yaml_is_composed_as_pyyaml_does(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    wanted = yaml.compose(content, Loader=yaml.SafeLoader)
    assert yaml.serialize(compose_yaml(path, LoraExportError, "recipe")) == yaml.serialize(wanted)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: " + "[" * 5000, "nested deeper"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper"),
        ("a: &a [*a]", "nested deeper"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 9)), "more than"),
        ("a: b: c", "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("# " + "x" * (600 << 10), "the limit for such a file"),
    ],
)  # fmt: skip
def test_damaged_yaml(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(LoraExportError, match=says) as caught:
        compose_yaml(path, LoraExportError, "recipe")
    assert caught.value.hint


def test_nobody_reads_json_or_yaml_by_other_means() -> None:
    """But for the kit's script, which runs without lora-export."""
    own = {
        "untrusted/documents.py": {"loads", "compose"},
        "packages/kit/finish.py": {"loads"},
    }
    found: dict[str, set[str]] = {}
    for path in (ROOT / "lora_export").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                reads_json = node.value.id == "json" and node.attr in ("load", "loads")
                reads_yaml = node.value.id == "yaml" and node.attr in ("compose", "load", "safe_load")
                if reads_json or reads_yaml:
                    found.setdefault(str(path.relative_to(ROOT / "lora_export")), set()).add(node.attr)
    assert found == own


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("text", ["[1e999]", '{"a": -1e400}', '{"a": 1e999}', "17" + "0" * 400 + ".5"])
def test_a_number_too_large_for_a_float_is_refused_everywhere(text: str, finite: bool) -> None:
    """Written again, it would be Infinity, which is not JSON."""
    with pytest.raises(DocumentError, match="too large for a float"):
        parse_json(text, finite=finite)


@pytest.mark.parametrize("number", [2**63, -(2**64), 10**30, 10**299, 10**300, 10**308, int(1.7e308)])
def test_integers_that_a_float_holds_are_read_exactly(number: int) -> None:
    assert parse_json(json.dumps({"a": [number]})) == {"a": [number]}
    assert abs(float(number)) > 0
