"""Text, JSON, JUnit and the command line of a parity report: every number is there, nothing hostile is."""

import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import onnx
import parity_reports
import pytest

from lora_export import cli
from lora_export.errors import LoraExportError, OutputError
from lora_export.parity import check, result
from lora_export.parity.result import Localisation, ModuleRow, Verdict
from lora_export.reports.files import ReportFile
from lora_export.reports.parity import (
    to_json as parity_json,
)
from lora_export.reports.parity import (
    to_junit as parity_junit,
)
from lora_export.reports.parity import (
    to_text as parity_text,
)
from lora_export.reports.parity.files import Inputs, check_outputs
from lora_export.reports.parity.words import mark, number, relation, share, verdict_line
from lora_export.untrusted.shown import printable

SCHEMA = json.loads(Path(parity_json.__file__).with_name("parity.schema.json").read_text(encoding="utf-8"))
REPORTS = {"good": parity_reports.good, "failed": parity_reports.failed, "hostile": parity_reports.hostile}


@pytest.fixture(params=REPORTS)
def report(request):
    return REPORTS[request.param]()


def words(text):
    """A text with all white space as one blank: how lines are broken does not matter."""
    return " ".join(text.split())


# Text


def test_text_says_every_failure_in_full(report):
    text = words("\n".join(parity_text.lines(report)))
    assert report.failed or report.passed
    for verdict in report.failed:
        said = (verdict.name, verdict.output, verdict.why)
        for part in (*map(printable, said), number(verdict.value), number(verdict.limit)):
            assert words(part) in text


def test_text_says_the_worst_of_what_passed():
    report = parity_reports.good()
    text = parity_text.lines(report)
    for state in parity_reports.STATES:
        errors = [v for v in report.verdicts if v.state == state and v.name == "relative error"]
        worst = errors[int(np.argmax([v.value / v.limit for v in errors]))]
        row = next(line for line in text[text.index(state) :] if "relative error" in line)
        assert f"{len(errors)} outputs, worst {worst.output} " in row
        assert f"{number(worst.value)} ≤ {number(worst.limit)}" in row


@pytest.mark.parametrize("kind", ["good", "failed"])
def test_text_keeps_its_width_on_a_terminal(kind):
    assert max(map(len, parity_text.lines(REPORTS[kind](), cut=True))) <= parity_text.WIDTH


def test_text_in_a_log_has_every_reason_in_full():
    why = "a reason " * 30 + "that ends here"
    report = parity_reports.good()
    long = replace(report, verdicts=tuple(replace(verdict, why=why) for verdict in report.verdicts))
    log = [line for line in parity_text.lines(long) if "relative error" in line]
    assert len(log) == len(parity_reports.STATES)
    assert all(line.endswith(why) for line in log)
    assert not any("that ends here" in line for line in parity_text.lines(long, cut=True))


def test_text_holds_nothing_that_a_terminal_acts_on():
    text = parity_text.lines(parity_reports.hostile())
    assert all(line.isprintable() for line in text)
    assert r"\x00\x01\x1b[31mred\x07\r\nnext\tline" in "\n".join(text)


def test_last_line_is_the_verdict():
    good, failed = parity_reports.good(), parity_reports.failed()
    assert parity_text.lines(good)[-1] == f"PASSED: {len(good.verdicts)} checks"
    begins = f"the error begins at {parity_reports.CULPRIT}"
    assert parity_text.lines(failed)[-1] == f"FAILED: 2 of {len(failed.verdicts)} checks; {begins}"
    one = good.verdicts[:1]
    assert verdict_line(replace(good, verdicts=one)) == "PASSED: 1 check"
    empty = replace(one[0], counted=False)
    assert verdict_line(replace(good, verdicts=(*one, empty))) == "PASSED: 1 check; 1 more proves nothing"
    assert (
        verdict_line(replace(good, verdicts=(empty, empty)))
        == "FAILED: nothing was proven; 2 more prove nothing"
    )
    assert verdict_line(replace(good, verdicts=())) == "FAILED: nothing was proven"
    assert verdict_line(replace(failed, localisation=None)) == f"FAILED: 2 of {len(failed.verdicts)} checks"


@pytest.mark.parametrize(("passed", "sign"), [(True, "void"), (False, "FAIL")])
def test_what_proves_nothing_says_so(passed, sign):
    verdict = Verdict(
        kind="effect",
        name="error / effect",
        state="zero",
        output="logits",
        value=math.nan,
        limit=math.inf,
        passed=passed,
        why="B is 0",
        counted=False,
    )
    text = parity_text.lines(parity_reports.good(verdicts=(*parity_reports.good().verdicts, verdict)))
    at = text.index("zero")
    said = words(" ".join(text[at + 1 : text.index("", at)]))
    assert said.startswith(f"{sign} error / effect logits nan, no limit")
    assert "proves nothing" in said
    assert "B is 0" in said


def test_text_marks_where_the_error_begins():
    text = parity_text.lines(parity_reports.failed())
    assert [line.split()[1] for line in text if line.split()[:1] == [">>"]] == [parity_reports.CULPRIT]


@pytest.mark.parametrize("begins", [0, 100, 199])
def test_a_long_table_of_modules_is_cut_around_the_culprit(begins):
    rows = tuple(
        ModuleRow(
            module=f"layers.{i}.proj",
            error_in=1e-4,
            error_out=1e-4,
            own_out=1e-4,
            effect=0.1,
            jumped=i in (begins, 50),
        )
        for i in range(200)
    )
    found = Localisation(state="json", module=rows[begins].module, rows=rows, looked_at=9, of=200)
    text = parity_text.localisation_lines(found)
    shown = re.findall(r"layers\.(\d+)\.proj  ", "\n".join(text[1:]))
    assert {str(begins), "50"} <= set(shown)
    assert len(shown) < 20
    assert f"… and {200 - len(shown)} more with --report FILE.json" in text


def test_no_module_found_is_said():
    lines = parity_text.localisation_lines(
        Localisation(state="json", module="", rows=(), note="the graph has no names")
    )
    assert [line.strip() for line in lines] == ["the graph has no names"]


def test_numbers_keep_what_matters():
    for value in np.random.default_rng(0).lognormal(0, 12, 500):
        assert float(number(float(value))) == pytest.approx(value, rel=0.05)
        assert len(number(-float(value))) <= 9
    assert [number(float(count)) for count in (7, 9900, -12345)] == ["7", "9900", "-12345"]
    assert [number(v) for v in (math.nan, math.inf, -math.inf, 0.0, None)] == ["nan", "inf", "-inf", "0", ""]


def test_share_is_worst_where_nothing_can_be_told():
    def of(value, limit):
        return share(
            Verdict(kind="error", name="", state="", output="", value=value, limit=limit, passed=True)
        )

    assert of(1.0, 4.0) == 0.25
    assert of(0.0, 0.0) == of(9.0, math.inf) == 0.0
    assert of(1.0, 0.0) == of(math.nan, 1.0) == of(math.inf, 1.0) == math.inf


@pytest.mark.parametrize(
    ("value", "limit", "passed", "said"),
    [
        (0.1, 0.2, True, "0.1 ≤ 0.2"),
        (0.3, 0.2, False, "0.3 > 0.2"),
        (0.1, 0.2, False, "0.1, limit 0.2"),
        (math.nan, 0.2, False, "nan, limit 0.2"),
        (0.3, math.inf, True, "0.3, no limit"),
    ],
)
def test_relation_says_nothing_false(value, limit, passed, said):
    assert (
        relation(Verdict(kind="error", name="", state="", output="", value=value, limit=limit, passed=passed))
        == said
    )


# JSON


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def schema_says(data, validator=jsonschema.Draft202012Validator(SCHEMA)):  # noqa: B008
    return validator.is_valid(data)


def test_json_is_strict_and_fits_its_schema(report):
    text = parity_json.report_json(report)
    data = json.loads(text, parse_constant=refuse)
    assert data == json.loads(json.dumps(report.as_dict()))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(data, SCHEMA, jsonschema.Draft202012Validator)
    assert text == parity_json.report_json(report)
    assert list(data) == sorted(data)


def test_json_is_read_back_with_the_same_numbers(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(parity_json.report_json(report), encoding="utf-8")
    found = parity_json.read_report(path)
    assert found.passed is report.passed
    # NaN is not equal to itself; as a text it is.
    assert found.as_dict() == report.as_dict()
    assert type(found.verdicts[0].value) is float
    assert parity_json.report_json(found) == path.read_text(encoding="utf-8")


def test_schema_knows_every_field_and_no_other():
    schema = SCHEMA
    places = {
        result.ParityReport: schema,
        result.Verdict: schema["$defs"]["verdict"],
        result.OutputMetrics: schema["$defs"]["metrics"],
        result.Localisation: schema["$defs"]["localisation"],
        result.ModuleRow: schema["$defs"]["localisation"]["properties"]["rows"]["items"],
        result.Generated: schema["properties"]["generated"]["items"],
        result.Scatter: schema["properties"]["scatter"]["items"],
    }
    for kind, rule in places.items():
        names = {field.name for field in dataclasses.fields(kind)}
        names |= {"passed"} if kind is result.ParityReport else set()
        # Reports of older versions don't have it.
        new = {"positions", "applied"} if kind is result.OutputMetrics else set()
        assert set(rule["properties"]) == set(rule["required"]) | new == names
        assert rule["additionalProperties"] is False
    assert schema["properties"]["format"]["const"] == result.FORMAT


def small():
    """A report's data with every part, but few of each."""
    data = json.loads(parity_json.report_json(parity_reports.failed()))
    for key in ("verdicts", "metrics", "feeds", "adapters", "generated", "scatter"):
        data[key] = data[key][-1:]
    data["localisation"]["rows"] = [r for r in data["localisation"]["rows"] if r["jumped"]]
    for values in (data["scatter"][0], data["generated"][0]):
        for key in ("reference", "candidate"):
            values[key] = values[key][:3]
    data["passed"] = all(row["passed"] for row in data["verdicts"])
    return data


def mutants(data):
    """Yield (place, document): every key gone, a key more everywhere, every value of every other type."""

    def walk(node, place):
        for key in list(node if isinstance(node, dict) else range(len(node))):
            at = (*place, key)
            if isinstance(node, dict):
                yield at, "gone", None
            for other in ("text", "nan", None, True, -1, 7, 1.5, [], {}, [None], {"odd": [1]}):
                yield at, "set", other
            if isinstance(node[key], dict | list):
                yield from walk(node[key], at)
        if isinstance(node, dict):
            yield (*place, "odd"), "set", 1

    for place, what, value in walk(data, ()):
        copied = copy.deepcopy(data)
        parent = copied
        for key in place[:-1]:
            parent = parent[key]
        if what == "gone":
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
        yield f"{place} {what} {value!r}", copied


def test_what_older_versions_do_not_say_may_be_missing():
    data = small()
    data["feeds"][0]["sha256"] = "ab" * 32
    data["metrics"][0]["positions"] = 7
    assert schema_says(data)
    result.ParityReport.from_json(data, "report")
    for where, key, bad in (("feeds", "sha256", "ab"), ("metrics", "positions", -1)):
        damaged = copy.deepcopy(data)
        damaged[where][0][key] = bad
        assert not schema_says(damaged)
        assert f"{where}[0].{key}" in our_word(damaged)
        del data[where][0][key]
    assert schema_says(data)
    result.ParityReport.from_json(data, "report")


CONTRADICTIONS = ("its verdicts say", "values against", "equal tokens of fewer", "has no row")


def our_word(document):
    """What `from_json` says against a document; "" where it takes it."""
    try:
        result.ParityReport.from_json(document, "report")
    except LoraExportError as error:
        return str(error)
    return ""


def test_every_damage_is_refused_as_the_schema_refuses_it():
    said = Counter()
    assert schema_says(small())
    result.ParityReport.from_json(small(), "report")
    for what, document in mutants(small()):
        wanted = schema_says(document)
        seen = our_word(document)
        if wanted:
            assert not seen or any(part in seen for part in CONTRADICTIONS), f"{what}: {seen}"
        else:
            assert seen, what
        said["refused" if not wanted else "contradicts" if seen else "good"] += 1
    assert min(said["good"], said["contradicts"], said["refused"]) > 5, said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(passed=not data["passed"]), "but its verdicts say"),
        (lambda data: data["scatter"][0]["reference"].pop(), "2 values against 3"),
        (lambda data: data["generated"][0].update(equal=9), "9 equal tokens of fewer"),
        (lambda data: data["localisation"].update(module="other"), "'other' has no row"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(change, said):
    data = small()
    change(data)
    assert schema_says(data)
    with pytest.raises(LoraExportError, match=said):
        result.ParityReport.from_json(data, "report")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "can't be read as JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1, 2]", "wanted an object"),
        (b"{}", "format is null"),
        (b'{"format": 2}', "format is 2, this version reads 1"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": 1, "format": 1}', "the key 'format' occurs twice"),
        (b"[" * 200_000, "nested deeper than"),
        (b'{"format": 1}', "verdicts: is missing"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(content, said, tmp_path):
    path = tmp_path / "old.json"
    path.write_bytes(content)
    with pytest.raises(LoraExportError) as caught:
        parity_json.read_report(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_half_written_file_and_none_are_refused(tmp_path):
    text = parity_json.report_json(parity_reports.good())
    path = tmp_path / "old.json"
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(LoraExportError, match="can't be read as JSON"):
        parity_json.read_report(path)
    with pytest.raises(LoraExportError, match="cannot read"):
        parity_json.read_report(tmp_path / "none.json")


def test_all_problems_come_at_once_but_not_thousands():
    data = small()
    del data["notes"], data["tolerance"]
    data["seconds"] = -1
    with pytest.raises(LoraExportError) as caught:
        result.ParityReport.from_json(data, "report")
    assert {p.partition(":")[0] for p in caught.value.problems} == {"notes", "tolerance", "seconds"}
    data["verdicts"] = [{}] * 1000
    with pytest.raises(LoraExportError) as caught:
        result.ParityReport.from_json(data, "report")
    assert len(caught.value.problems) < 30
    assert "more" in caught.value.problems[-1]


# JUnit

# What XML 1.0 may hold; expat alone lets U+FFFE through.
LEGAL = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")
# JUnit.xsd: children of a suite come in this order.
ORDER = ("properties", "testcase", "system-out", "system-err")
COUNTS = ("tests", "failures", "errors", "skipped")


def parsed(report):
    text = parity_junit.junit_xml(report)
    assert LEGAL.fullmatch(text)
    return ElementTree.fromstring(text.encode("utf-8"))


def outcome(case):
    assert set(case.attrib) == {"classname", "name", "time"}
    assert all(case.attrib.values())
    children = [child.tag for child in case]
    assert children in ([], ["failure"], ["skipped"])
    return children[0] if children else "passed"


def test_junit_has_the_structure_of_its_schema(report):
    root = parsed(report)
    assert root.tag == "testsuites"
    names = Counter((case.get("classname"), case.get("name")) for case in root.iter("testcase"))
    assert set(names.values()) == {1}
    for suite in root:
        assert suite.tag == "testsuite"
        assert suite.get("name")
        places = [ORDER.index(child.tag) for child in suite]
        assert places == sorted(places)
        outcomes = Counter(map(outcome, suite.iter("testcase")))
        counted = (sum(outcomes.values()), outcomes["failure"], 0, outcomes["skipped"])
        assert tuple(int(suite.get(key)) for key in COUNTS) == counted
        for row in suite.iter("property"):
            assert set(row.attrib) == {"name", "value"}
    for element in root.iter():
        if "time" in element.attrib:
            assert re.fullmatch(r"\d+\.\d{3}", element.get("time"))
    assert tuple(int(root.get(key)) for key in COUNTS) == tuple(
        sum(int(suite.get(key)) for suite in root) for key in COUNTS
    )
    assert float(root.get("time")) == pytest.approx(report.seconds, abs=1e-3)


def test_junit_has_one_case_for_each_verdict(report):
    root = parsed(report)
    wanted = Counter({"ok": "passed", "void": "skipped", "FAIL": "failure"}[mark(v)] for v in report.verdicts)
    assert Counter(outcome(case) for case in root.iter("testcase")) == wanted
    for suite in root:
        verdicts = [v for v in report.verdicts if printable(v.state) == suite.get("name")]
        for verdict, case in zip(verdicts, suite.iter("testcase"), strict=True):
            assert case.get("name").startswith(printable(verdict.name))
            failure = case.find("failure")
            if failure is not None:
                assert failure.get("type") == verdict.kind
                for part in (relation(verdict), printable(verdict.why)):
                    assert part in failure.text
                assert failure.get("message").startswith("FAILED: ")


def test_junit_failures_say_where_the_error_begins():
    failures = list(parsed(parity_reports.failed()).iter("failure"))
    assert len(failures) == 2
    assert all(parity_reports.CULPRIT in failure.text for failure in failures)


def test_junit_has_the_notes(report):
    for suite in parsed(report):
        text = words(suite.find("system-out").text)
        for note in report.notes:
            assert words(f"note: {printable(note)}") in text
    empty = parsed(replace(report, verdicts=()))
    assert words(f"note: {printable(report.notes[0])}") in words(empty.find(".//system-out").text)


@pytest.mark.parametrize("counted", [True, False])
def test_junit_is_not_green_where_nothing_was_proven(counted):
    verdicts = () if counted else (replace(parity_reports.good().verdicts[0], counted=False),)
    root = parsed(parity_reports.good(verdicts=verdicts))
    assert root.get("failures") == "1"
    assert "nothing was proven" in root.find(".//failure").get("message")


def test_junit_of_the_same_report_is_the_same():
    assert parity_junit.junit_xml(parity_reports.failed()) == parity_junit.junit_xml(parity_reports.failed())


def test_junit_cases_of_one_name_are_told_apart():
    verdict = parity_reports.good().verdicts[0]
    clash = replace(verdict, name=f"{verdict.name} [{verdict.output}] #2", output="")
    root = parsed(parity_reports.good(verdicts=(clash, verdict, verdict, verdict)))
    names = [case.get("name") for case in root.iter("testcase")]
    assert len(set(names)) == 4


# The command line


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
    report = REPORTS[kind]()
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
    report = REPORTS[kind]()
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
    inputs = Inputs(candidate=tmp_path / "m.onnx", reference=tmp_path / "hf")
    with pytest.raises(OutputError) as found:
        check_outputs([ReportFile("--html", tmp_path / "weights.bin", "html")], True, inputs)
    assert "data of the candidate" in found.value.problems[0]
    check_outputs([ReportFile("--html", tmp_path / "other.bin", "html")], True, inputs)
