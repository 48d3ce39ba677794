"""The command line's parity reports: none replaces what the check reads, and the verdict is never lost."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import parity_reports
import pytest
from parity_reports import words

from lora_export import cli
from lora_export.errors import OutputError
from lora_export.parity import check
from lora_export.reports.files import ReportFile
from lora_export.reports.parity import to_json as parity_json
from lora_export.reports.parity import to_text as parity_text
from lora_export.reports.parity.files import ReadFiles, check_outputs
from lora_export.reports.parity.words import verdict_line


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Files as a check reads them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in (
        *(
            "out/model.onnx",
            "out/model.onnx.data",
            "out/model.lora.json",
            "out/old.onnx",
            "out/old.onnx.data",
        ),
        *("out/e.engine", "out/e.json", "out/base.onnx", "hf/config.json", "hf/sub/model.safetensors"),
        *("lora/adapter_model.safetensors", "lora/adapter_config.json", "one/a.safetensors"),
        *("one/adapter_config.json", "feeds.npz", "was.json"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.onnx").symlink_to(tmp_path / "out" / "model.onnx")
    return tmp_path


@pytest.fixture
def checked(monkeypatch):
    """Let the check find what it is told, at once; return what tells it, and whether it was run."""
    runs = []

    def tell(report):
        def check_parity(*given, **options):
            runs.append(options)
            return report

        monkeypatch.setattr(check, "check_parity", check_parity)
        return runs

    return tell


GIVEN = ("parity", "--reference=hf", "--candidate=out/model.onnx")
READ = {
    "the candidate": ((), "out/model.onnx", "the candidate itself"),
    "its data": ((), "out/model.onnx.data", "a file of the candidate"),
    "its data to be": ((), "out/model.onnx.data1", "a file of the candidate"),
    "its manifest": ((), "out/model.lora.json", "a file of the candidate"),
    "by a way round": ((), "lora/../out/model.onnx", "the candidate itself"),
    "by a link": ((), "linked/model.onnx", "the candidate itself"),
    "through a link": (("--candidate=linked/model.onnx",), "out/model.onnx", "the candidate itself"),
    "the link": (("--candidate=linked/model.onnx",), "linked/model.onnx", "the candidate itself"),
    "an engine's record": (("--candidate=out/e.engine",), "out/e.json", "a file of the candidate"),
    "the checkpoint": ((), "hf/config.json", "a file of the reference"),
    "below the checkpoint": ((), "hf/sub/model.safetensors", "a file of the reference"),
    "the reference": (("--reference=out/old.onnx",), "out/old.onnx", "the reference itself"),
    "its own data": (("--reference=out/old.onnx",), "out/old.onnx.data", "a file of the reference"),
    "the base": (("--base=out/base.onnx",), "out/base.onnx", "the graph of --base itself"),
    "the feeds": (("--feeds=feeds.npz",), "feeds.npz", "the file of --feeds itself"),
    "the adapter": (("--adapter=lora",), "lora/adapter_model.safetensors", "a file of the adapter"),
    "its config": (("--adapter=a=lora",), "lora/adapter_config.json", "a file of the adapter"),
    "an adapter's file": (("--adapter=one/a.safetensors",), "one/a.safetensors", "the adapter itself"),
    "a named one": (("--adapter=x=one/a.safetensors",), "one/a.safetensors", "the adapter itself"),
    "the config beside it": (
        ("--adapter=one/a.safetensors",),
        "one/adapter_config.json",
        "a file of the adapter",
    ),
    "the baseline": (("--baseline=was.json",), "was.json", "the baseline itself"),
}


@pytest.mark.parametrize("option", ["--report", "--junit", "--html"])
@pytest.mark.parametrize("name", READ)
def test_reports_never_replace_what_the_check_reads(name, option, model, checked, capsys):
    runs = checked(parity_reports.good())
    options, path, said = READ[name]
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    for force in ((), ("--force",)):
        assert cli._run([*GIVEN, *options, f"{option}={path}", *force], False) == 1
        err = words(capsys.readouterr().err)
        assert f"{option} {path} is {said}" in err
        assert "--json" not in err
        assert "--force replaces it" not in err
    assert not runs
    assert {file: file.read_bytes() for file in model.rglob("*") if file.is_file()} == before


def test_all_that_would_be_replaced_is_said_at_once(model, checked, capsys):
    checked(parity_reports.good())
    line = ["--report=out/model.onnx", "--junit=hf/config.json", "--html=feeds.npz", "--feeds=feeds.npz"]
    assert cli._run([*GIVEN, *line, "--force"], False) == 1
    err = capsys.readouterr().err
    assert all(f"{option} " in err for option in ("--report", "--junit", "--html"))
    assert cli._run([*GIVEN, "--report=new", "--junit=new"], False) == 1
    assert "--report and --junit are both new" in capsys.readouterr().err


def test_reports_may_lie_beside_what_the_check_reads(model, checked):
    checked(parity_reports.good())
    line = ["--report=out/parity.json", "--junit=hf/new.xml", "--html=lora/new.html"]
    assert cli._run([*GIVEN, *line], False) == 0
    assert (model / "out" / "parity.json").exists()
    assert cli._run([*GIVEN, line[0], "--junit=feeds.npz.xml", "--feeds=feeds.npz", "--force"], False) == 0


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(model, checked, capsys, monkeypatch):
    runs = checked(parity_reports.good())
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert cli._run([*GIVEN, "--report=new/er/r.json"], False) == 1
    err = words(capsys.readouterr().err)
    assert f"--report new/er/r.json can't be written: you may not write to {model}" in err
    assert not runs


UNWRITABLE = "--report=/proc/lora-export-parity.json"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("kind", ["good", "failed"])
def test_the_verdict_is_not_lost_with_a_report(kind, as_json, model, checked, capsys, monkeypatch):
    report = parity_reports.REPORTS[kind]()
    checked(report)
    monkeypatch.setattr(os, "access", lambda path, mode: True)  # as for root
    (model / "was.json").write_text(parity_json.report_json(report))
    line = [*GIVEN, UNWRITABLE, "--baseline=was.json", *(["--json"] if as_json else [])]
    assert cli._run(line, False) == (1 if report.passed else 3)
    printed = capsys.readouterr()
    if as_json:
        assert json.loads(printed.out)["passed"] is report.passed
    else:
        assert printed.out.splitlines()[-1] == verdict_line(report)
    assert "Error: " in printed.err
    assert "/proc/lora-export-parity.json" in printed.err
    assert "hint: " in printed.err
    # Nor is the comparison.
    assert "nothing is worse than the baseline" in printed.err


@pytest.mark.parametrize("kind", ["good", "failed"])
def test_the_verdict_is_not_lost_with_a_baseline(kind, model, checked, capsys):
    report = parity_reports.REPORTS[kind]()
    checked(report)
    other = replace(parity_reports.good(), tolerance="1,1")
    (model / "was.json").write_text(parity_json.report_json(other))
    line = [*GIVEN, "--baseline=was.json", "--report=r.json"]
    assert cli._run(line, False) == (1 if report.passed else 3)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == verdict_line(report)
    assert "the baseline can't be compared" in printed.err
    assert "hint: " in printed.err
    assert parity_json.read_report("r.json").passed is report.passed


def test_what_is_worse_is_3_where_a_report_cannot_be_written_too(model, checked, capsys, monkeypatch):
    good = parity_reports.good()
    checked(good)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    gone = replace(good.verdicts[0], name="that is gone")
    (model / "was.json").write_text(parity_json.report_json(replace(good, verdicts=(*good.verdicts, gone))))
    assert cli._run([*GIVEN, UNWRITABLE, "--baseline=was.json"], False) == 3
    err = capsys.readouterr().err
    assert "that is gone" in err
    assert "Error: " in err


@pytest.mark.parametrize("notes", [(), ("the base was not checked", "a long note " * 20)])
def test_quiet_keeps_notes(notes, model, checked, capsys):
    report = parity_reports.good(notes=notes)
    checked(report)
    assert cli._run([*GIVEN, "--quiet"], False) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == verdict_line(report)
    assert words(" ".join(out[:-1])) == words(" ".join(f"note: {note}" for note in notes))
    assert max(map(len, out)) <= parity_text.WIDTH


@pytest.mark.parametrize("terminal", [False, True])
def test_reasons_are_cut_on_a_terminal_only(terminal, model, checked, capsys, monkeypatch):
    report = parity_reports.good()
    why = "a reason " * 30 + "that ends here"
    checked(replace(report, verdicts=tuple(replace(verdict, why=why) for verdict in report.verdicts)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert cli._run([*GIVEN], False) == 0
    assert ("that ends here" in capsys.readouterr().out) != terminal


@pytest.mark.parametrize(
    "option",
    ["--weight=nan", "--weight=inf", "--weight=-inf", "--seed=-1", "--samples=0", "--samples=-3"],
)
def test_numbers_that_mean_nothing_are_a_usage_error(option, model, checked, capsys):
    runs = checked(parity_reports.good())
    assert cli._run([*GIVEN, "--weight=0.5", option], False) == 2
    assert option.partition("=")[0] in capsys.readouterr().err
    assert not runs
    assert cli._run([*GIVEN, "--weight=-0.5", "--weight=0", "--seed=0", "--samples=1"], False) == 0
    assert runs[0]["weights"] == (-0.5, 0.0)


def test_a_reader_that_has_gone_takes_neither_reports_nor_the_exit_code(model):
    """As with ``| head -1``."""
    script = (
        "import sys, parity_reports\n"
        "from lora_export import cli\n"
        "from lora_export.parity import check\n"
        "check.check_parity = lambda *given, **options: parity_reports.failed()\n"
        "sys.stdin.readline()\n"
        f"cli.main([*{GIVEN}, '--report=r.json'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=model,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    err = process.stderr.read()
    assert process.wait() == 3, err
    assert b"BrokenPipe" not in err
    assert (model / "r.json").exists()


def test_a_report_never_replaces_a_graphs_data_whatever_its_name(tmp_path):
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [400])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [400])],
            [onnx.numpy_helper.from_array(np.ones(400, np.float32), "w")],
        )
    )
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    inputs = ReadFiles(candidate=tmp_path / "m.onnx", reference=tmp_path / "hf")
    with pytest.raises(OutputError) as found:
        check_outputs([ReportFile("--html", tmp_path / "weights.bin", "html")], True, inputs)
    assert "data of the candidate" in found.value.problems[0]
    check_outputs([ReportFile("--html", tmp_path / "other.bin", "html")], True, inputs)
