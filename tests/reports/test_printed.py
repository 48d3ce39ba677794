"""What `print(report)` says to somebody who works in Python: a few lines, and each file that was written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import session_graphs

import lora_export

ADAPTER = session_graphs.both(3)


def merged(folder: Path, **options: Any) -> Any:
    return lora_export.merge_onnx(session_graphs.base(folder), ADAPTER, folder / "m.onnx", **options)


def exposed(folder: Path, **options: Any) -> Any:
    return lora_export.swap_onnx(session_graphs.base(folder), folder / "s.onnx", adapter=ADAPTER, **options)


def converted(folder: Path, **options: Any) -> Any:
    exposed(folder)
    return lora_export.convert_adapter(ADAPTER, folder / "s.onnx", folder / "a.safetensors", **options)


@pytest.mark.parametrize("make", [merged, exposed, converted])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_mode_says_what_became_of_how_many_parameters_and_where_it_is(make, dry_run, tmp_path):
    report = make(tmp_path, dry_run=dry_run)
    first, *others = str(report).splitlines()
    counts = [int(count) for count in re.findall(r"\d+", first)]
    assert first.startswith("plan: ")
    assert sum(counts) == len(report.plan.rows) > 0
    files = [report.output] if make is converted else report.outputs.values()
    verb = "would write" if dry_run else "wrote"
    assert {f"{verb} {file}" for file in files} <= set(others)
    assert ("rounding lost" in str(report)) == (make is merged and not dry_run)


def test_a_name_stays_one_line(tmp_path):
    folder = tmp_path / "two\nlines"
    folder.mkdir()
    assert len(str(merged(folder)).splitlines()) == 2 + 3


def test_engines(tmp_path):
    report = lora_export.build_engine(
        session_graphs.base(tmp_path), ["rtx-4090", "rtx-3090"], tmp_path / "out", dry_run=True
    )
    lines = str(report).splitlines()
    assert [line for line in lines if line.startswith("would write ")] == [
        f"would write {engine.path} for {engine.group.label}" for engine in report.engines
    ]


def test_verified_files(tmp_path):
    merged(tmp_path)
    assert "ok" in str(lora_export.verify(tmp_path)).splitlines()[0]
    shutil.copy(tmp_path / "m.onnx", tmp_path / "other.onnx")
    data = tmp_path / "m.onnx.data"
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    report = lora_export.verify(tmp_path)
    assert f"changed: {data}" in str(report).splitlines()
    assert len(str(report).splitlines()) == 1 + len(report.failures())


def test_a_benchmark(tmp_path):
    graph = session_graphs.base(tmp_path)
    report = lora_export.run_bench(graph, [graph], seconds=0.1, narrow=1e-9)
    rows = [row for table in report.tables for row in table.rows]
    lines = str(report).splitlines()
    assert len(lines) == len(rows) == 2
    for line, row in zip(lines, rows, strict=True):
        assert f"{row.contender}  {row.latency.median_ms:.4g} ms" in line
