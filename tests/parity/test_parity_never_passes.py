"""What is compared and proves nothing, or differs, never passes; reports are written whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import broken_exports as broken
import numpy as np
import onnx
import pytest
import tiny
from parity_bad import (
    A,
    X,
    arguments,
    base,
    changed,
    contents,
    feeds,
    merged,
    outputs,
    saved,
    stored,
    swapped,
)
from session_graphs import P, Q

from lora_export import Adapter, LoraExportError, bank_onnx, load_adapter, merge_onnx
from lora_export.cli import _run
from lora_export.parity import check
from lora_export.parity.check import check_parity
from lora_export.reports.parity import to_html

llama = pytest.mark.xdist_group("parity-llama")


SIDES = ("candidate", "reference")


@pytest.mark.parametrize("tolerance", ["auto", "1e9,1e9"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["graph", "saved"])
@pytest.mark.parametrize("side", [("candidate",), ("reference",), SIDES], ids=" and ".join)
def test_values_that_are_no_numbers_never_pass(side, kind, value, tolerance, tmp_path, capsys):
    graphs = {
        name: base(tmp_path, f"{name}.onnx", **(changed("q.weight", value) if name in side else {}))
        for name in SIDES
    }
    given: dict[str, Any] = {**graphs, "tolerance": tolerance}
    if kind == "saved":
        right = X @ P.T @ Q.T
        right[1, 1] = value if "reference" in side else right[1, 1]
        given |= {"reference": saved(tmp_path, y=right), "feeds": feeds(tmp_path)}
    report = check_parity(**given)
    assert not report.passed
    (verdict,) = [v for v in report.failed if v.kind == "finite" and not v.name.partition(":")[2]]
    for name in side:
        assert f"y of the {name}" in verdict.why
    assert _run([*arguments(given), *outputs(tmp_path)], False) == 3
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is False
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert suite.findall(".//failure")


def without_effect(given: Adapter) -> Adapter:
    return broken.not_applied(given)


@pytest.mark.parametrize("mode", ["merged", "swap", "bank"])
def test_adapters_without_effect_are_said_and_do_not_pass(mode, tmp_path, capsys):
    empty = stored(tmp_path, without_effect(A), "empty")
    adapters = {"empty": empty}
    if mode == "merged":
        candidate, reference = merged(tmp_path, empty), base(tmp_path, "other.onnx")
        given = {
            "reference": broken.edited(candidate, tmp_path / "m.onnx", lambda model: None),
            "base": reference,
        }
    elif mode == "swap":
        candidate, given = swapped(tmp_path), {}
    else:
        bank_onnx(base(tmp_path), adapters, tmp_path / "bank.onnx")
        candidate, given = tmp_path / "bank.onnx", {}
    if not given:
        given = {"reference": broken.edited(candidate, tmp_path / "other.onnx", lambda model: None)}
    given |= {"candidate": candidate, "adapters": adapters}
    report = check_parity(**given, localise=False)
    (failed,) = report.failed
    assert (failed.kind, failed.state, failed.counted) == ("effect", "empty", False)
    assert "B = 0" in failed.why
    assert _run(arguments(given), False) == 3
    assert "B = 0" in capsys.readouterr().out


def test_an_adapter_without_effect_beside_another_is_said_and_passes(tmp_path, capsys):
    adapters = {"empty": stored(tmp_path, without_effect(A), "empty"), "a": stored(tmp_path)}
    candidate = swapped(tmp_path)
    given = {
        "reference": broken.edited(candidate, tmp_path / "other.onnx", lambda model: None),
        "candidate": candidate,
        "adapters": adapters,
    }
    assert check_parity(**given).passed
    assert _run(arguments(given), False) == 0
    assert "B = 0" in capsys.readouterr().out


@pytest.mark.parametrize("tolerance", ["auto", "1e9,1e9"])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_a_candidate_without_its_adapter_or_with_twice_of_it_is_3(weight, tolerance, tmp_path, capsys):
    path = stored(tmp_path)
    merge_onnx(base(tmp_path), path, tmp_path / "right.onnx")
    merge_onnx(base(tmp_path), path, tmp_path / "wrong.onnx", weights=[weight or 1e-9])
    (tmp_path / "wrong.lora.json").unlink()
    given = {
        "reference": tmp_path / "right.onnx",
        "base": tmp_path / "base.onnx",
        "candidate": tmp_path / "wrong.onnx",
        "adapters": {"a": path},
        "tolerance": tolerance,
    }
    report = check_parity(**given)
    assert {"adapter applied", "error / effect"} <= {verdict.name for verdict in report.failed}
    assert _run(arguments(given), False) == 3
    assert "adapter applied" in capsys.readouterr().out


@llama
def test_a_checkpoint_without_the_adapters_modules(tmp_path, capsys):
    given = {
        "reference": tiny.checkpoint("llama"),
        "candidate": broken.base("llama"),
        "adapters": {"x": tiny.adapter("bert")},
    }
    with pytest.raises(LoraExportError) as caught:
        check_parity(**given)
    # Each of them is named, not the first alone.
    modules = load_adapter(tiny.adapter("bert")).modules.values()
    assert all(any(module.path in line for line in caught.value.problems) for module in modules)
    assert _run(arguments(given), False) == 1
    assert "Traceback" not in capsys.readouterr().err


@llama
def test_a_checkpoint_of_another_model(tmp_path):
    with pytest.raises(LoraExportError, match=r"different shapes|don't fit"):
        check_parity(tiny.checkpoint("bert"), broken.base("llama"))


@llama
@pytest.mark.parametrize("rows", [60, 130])
def test_a_checkpoint_of_another_vocabulary(rows, tmp_path):
    """The checkpoint has 100 tokens."""

    def resized(model: onnx.ModelProto) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = broken.constant(model, name)
            values = onnx.numpy_helper.to_array(tensor)
            axis = values.shape.index(tiny.VOCAB)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(
                    np.resize(values, [rows if i == axis else size for i, size in enumerate(values.shape)]),
                    name,
                )
            )
        del model.graph.value_info[:]
        model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = rows

    candidate = broken.edited(broken.base("llama"), tmp_path / "other.onnx", resized)
    with pytest.raises(LoraExportError, match=r"different shapes|could not run"):
        check_parity(tiny.checkpoint("llama"), candidate)


@pytest.fixture
def good(tmp_path):
    """The command line of a check that passes."""
    models = tmp_path / "models"
    candidate = swapped(models)
    return arguments(
        {
            "reference": broken.edited(candidate, models / "other.onnx", lambda model: None),
            "candidate": candidate,
            "adapters": {"a": stored(models)},
        }
    )


def test_a_check_that_passes_is_0_and_writes_its_reports(good, tmp_path, capsys):
    assert _run([*good, *outputs(tmp_path)], False) == 0
    assert {path.name for path in tmp_path.glob("r.*")} == {"r.json", "r.xml", "r.html"}
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is True
    assert capsys.readouterr().out


def test_json_on_stdout_is_the_report(good, capsys):
    assert _run([*good, "--json"], False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert {verdict["state"] for verdict in found["verdicts"]} >= {"no adapter", "a"}


@pytest.fixture
def not_run(monkeypatch):
    """What is wrong with outputs is found before anything is run."""

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the check was run")

    monkeypatch.setattr(check, "check_parity", run)


def refused(line: list[str], folder: Path, capsys: Any, said: str) -> None:
    before = contents(folder)
    assert _run(line, False) == 1
    printed = capsys.readouterr()
    assert re.search(said, printed.err)
    assert "Traceback" not in printed.err
    assert contents(folder) == before


def test_existing_reports_are_refused_before_the_run(good, not_run, tmp_path, capsys):
    for name in ("r.json", "r.html"):
        (tmp_path / name).write_text("old")
    refused([*good, *outputs(tmp_path)], tmp_path, capsys, r"(?s)r\.json exists.*r\.html exists")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--report=F/x", "--junit=F/x"], "--report|--json and --junit are both"),
        (["--report=F"], "is a folder"),
        (["--report=F/old.json", "--baseline=F/old.json", "--force"], "is the baseline itself"),
        (["--html=F/./old.json", "--baseline=F/old.json", "--force"], "is the baseline itself"),
        (["--baseline=F/no.json"], "no.json"),
        (["--baseline=F/old.json"], "old.json"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_run(
    options, said, good, not_run, tmp_path, capsys
):
    (tmp_path / "old.json").write_text('{"no": "report"}')
    line = [option.replace("F/", f"{tmp_path}/").replace("=F", f"={tmp_path}") for option in options]
    refused([*good, *line], tmp_path, capsys, said)


def test_reports_below_a_file_are_refused(good, tmp_path, capsys):
    (tmp_path / "file").write_text("old")
    refused(
        [*good, f"--report={tmp_path}/r.json", f"--html={tmp_path}/file/r.html"], tmp_path, capsys, "file"
    )


def test_folders_of_reports_are_made(good, tmp_path):
    assert _run([*good, f"--report={tmp_path}/new/er/r.json"], False) == 0
    assert json.loads((tmp_path / "new" / "er" / "r.json").read_text())["passed"] is True


def test_force_replaces_reports(good, tmp_path):
    for name in ("r.json", "r.xml", "r.html"):
        (tmp_path / name).write_text("old")
    assert _run([*good, *outputs(tmp_path), "--force"], False) == 0
    assert all((tmp_path / name).read_text() != "old" for name in ("r.json", "r.xml", "r.html"))


@pytest.mark.parametrize("old", [True, False])
def test_all_reports_appear_or_none(old, good, tmp_path, capsys, monkeypatch):
    def fail(report: Any) -> str:
        raise OSError(28, "No space left on device")

    if old:
        for name in ("r.json", "r.xml", "r.html"):
            (tmp_path / name).write_text("old")
    monkeypatch.setattr(to_html, "report_html", fail)  # the last that is written
    refused([*good, *outputs(tmp_path), *["--force"] * old], tmp_path, capsys, "No space left")


def test_a_baseline_is_read_and_kept(good, tmp_path, capsys):
    baseline = tmp_path / "old.json"
    assert _run([*good, f"--report={baseline}"], False) == 0
    before = baseline.read_bytes()
    assert _run([*good, f"--baseline={baseline}", f"--report={tmp_path}/new.json"], False) == 0
    assert baseline.read_bytes() == before
    # Where the check of then is not among those of now, the gate has a hole.
    data = json.loads(before)
    data["verdicts"] += [{**data["verdicts"][0], "name": "that is gone", "state": "a"}]
    baseline.write_text(json.dumps(data))
    assert _run([*good, f"--baseline={baseline}"], False) == 3
    assert "that is gone" in capsys.readouterr().err


def test_required_options_are_2(capsys):
    for line in (["parity"], ["parity", "--reference=x"], ["parity", "--candidate=x"]):
        assert _run(line, False) == 2
        assert "Traceback" not in capsys.readouterr().err
