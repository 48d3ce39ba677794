"""A parity report as JSON: strict, as its schema says, and read back with the same numbers."""

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path

import jsonschema
import parity_reports
import pytest

from lora_export.errors import LoraExportError
from lora_export.parity import result
from lora_export.reports.parity import to_json as parity_json

SCHEMA = json.loads(Path(parity_json.__file__).with_name("parity.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(params=parity_reports.REPORTS)
def report(request):
    return parity_reports.REPORTS[request.param]()


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
