"""assert_parity: a user's test fails with the whole report where `lora-export parity` would exit with 3."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import broken_exports as broken
import pytest
import tiny

import lora_export
from lora_export import LoraExportError, ParityReport, assert_parity, check_parity
from lora_export.parity.sentence import sentence
from lora_export.reports.parity import to_assertion as asserting
from lora_export.reports.parity.to_text import check_lines

pytestmark = pytest.mark.xdist_group("llama")
QUICK = {"samples": 2, "batches": (2,), "sequences": (5,)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a good merged graph, and one into which another adapter was merged."""
    right, wrong = (broken.adapter("llama", seed=seed) for seed in (0, 1))
    folders = [tmp_path_factory.mktemp(name) for name in ("right", "wrong")]
    graph = broken.base("llama")
    good, bad = (
        broken.export("merged", graph, {"a": adapter}, folder)
        for adapter, folder in zip((right, wrong), folders, strict=True)
    )
    return good, bad


def test_what_passes_is_the_report(exports: tuple[Path, Path]) -> None:
    given = (tiny.checkpoint("llama"), exports[0], tiny.adapter("llama"))
    report = assert_parity(*given, **QUICK)
    assert isinstance(report, ParityReport)
    assert report.passed
    wanted = check_parity(*given, **QUICK)
    assert report.verdicts == wanted.verdicts
    assert report.feeds == wanted.feeds


def test_what_differs_fails_with_the_whole_report(exports: tuple[Path, Path]) -> None:
    given = (tiny.checkpoint("llama"), exports[1], tiny.adapter("llama"))
    with pytest.raises(AssertionError) as caught:
        assert_parity(*given, **QUICK)
    report = check_parity(*given, **QUICK)
    said = str(caught.value).splitlines()
    assert said[0] == sentence(report)
    # How long it took is not the same twice.
    wanted, found = (
        [line for line in part if not line.startswith("took")] for part in (check_lines(report), said)
    )
    assert found == wanted
    # The frame that pytest shows is the user's.
    assert caught.traceback[-1].ishidden(caught)
    assert not caught.traceback[0].ishidden(caught)


def test_options_are_those_of_the_check(exports: tuple[Path, Path]) -> None:
    given = (tiny.checkpoint("llama"), exports[0], tiny.adapter("llama"))
    with pytest.raises(AssertionError, match=r"1e-12"):
        assert_parity(*given, **QUICK, tolerance=(1e-12, 0.0))
    with pytest.raises(TypeError, match="tolerence"):
        assert_parity(*given, tolerence="auto")


def test_what_proves_nothing_fails(exports: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    given = (tiny.checkpoint("llama"), exports[0], tiny.adapter("llama"))
    report = check_parity(*given, **QUICK)
    idle = tuple(dataclasses.replace(verdict, counted=False) for verdict in report.verdicts)
    empty = dataclasses.replace(report, verdicts=idle)
    monkeypatch.setattr(asserting, "check_parity", lambda *_given, **_options: empty)
    with pytest.raises(AssertionError) as caught:
        assert_parity(*given)
    assert str(caught.value).splitlines()[0] == sentence(empty)
    assert "nothing was proven" in sentence(empty)


def test_what_cannot_be_compared_is_no_difference(exports: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(LoraExportError) as caught:
        assert_parity(tiny.checkpoint("llama"), tmp_path / "missing.onnx", tiny.adapter("llama"))
    assert not isinstance(caught.value, AssertionError)


def test_names_are_public() -> None:
    for name in ("assert_parity", "check_parity", "ParityReport"):
        assert name in lora_export.__all__
        assert "parity" in getattr(lora_export, name).__module__.split(".")


@pytest.mark.slow
def test_pytest_shows_the_report_and_the_users_line(exports: tuple[Path, Path], tmp_path: Path) -> None:
    given = [str(part) for part in (tiny.checkpoint("llama"), exports[1], tiny.adapter("llama"))]
    test = tmp_path / "test_export.py"
    test.write_text(
        "import lora_export\n\n\n"
        "def test_export():\n"
        f"    lora_export.assert_parity(*{given}, localise=False)  # mine\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "# mine" in done.stdout
    assert "adapter applied" in done.stdout
    assert "to_assertion.py" not in done.stdout
    summary = next(line for line in done.stdout.splitlines() if line.startswith("FAILED "))
    assert "AssertionError: FAILED" in summary or summary.endswith("- AssertionE...")
