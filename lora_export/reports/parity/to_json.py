"""A `ParityReport` as JSON, and back as checked data. What the data must be is `parity.schema.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from lora_export.errors import InternalError, LoraExportError
from lora_export.parity.result import FORMAT, ParityReport
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import seen
from lora_export.untrusted.shown import limited

_HINT = "write a report: the same check without --baseline, with --report FILE"
# A damaged report can break a rule once for every verdict.
_NAMED, _MOST = 20, 1000
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def report_json(report: ParityReport) -> str:
    """Return the report as one JSON object for any strict parser; the same report gives the same text."""
    text = json.dumps(report.as_dict(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # Paths that are no UTF-8 hold lone surrogates, which a file can't: they become JSON's own escapes.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the report."""
    text = (files(__package__) / "parity.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a report that `report_json` wrote.

    Raises:
        LoraExportError: The file can't be read, is no JSON, or is not a whole report of this format.
    """
    path = Path(path)
    # It has the texts nan, inf and -inf, and paths that are not UTF-8.
    data = read_json(path, hint=_HINT, finite=True, surrogates=True)
    check_report(data, str(path))
    return dict(data)


def check_report(data: object, name: str) -> None:
    """Check that data is a whole report: `parity.schema.json`, and what no schema can say.

    Args:
        data: What was read.
        name: What to call it in the error.

    Raises:
        LoraExportError: It is not; with every rule that it breaks.
    """
    if isinstance(data, dict) and repr(data.get("format")) != repr(FORMAT):
        seen = json.dumps(data.get("format"), default=str)[:60]
        raise LoraExportError(f"{name}: the report's format is {seen}, this version reads {FORMAT}", _HINT)
    problems = list(islice(_broken(data, _schema(), ""), _MOST))
    if not problems and isinstance(data, dict):
        problems = list(_contradictions(data))
    if problems:
        listed = limited(problems, most=_NAMED)
        raise LoraExportError(f"{name}: not a report of lora-export parity, or a damaged one", _HINT, listed)


@cache
def _schema() -> dict[str, Any]:
    return schema()


def _broken(data: Any, rule: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield which rules of a schema the data breaks, each with its place.

    Only the keywords that our schema uses are known; another one is a defect of ours, never silent.
    """
    if reference := rule.get("$ref"):
        rule = _schema()["$defs"][reference.removeprefix("#/$defs/")]
    place = where or "the report"
    if "anyOf" in rule:
        tries = [list(islice(_broken(data, option, where), _MOST)) for option in rule["anyOf"]]
        if all(tries):
            # What comes nearest to the data says most: the alternative that is broken deepest inside.
            yield from max(tries, key=lambda problems: max(map(len, problems)))
        return
    if "type" in rule and not _is(data, rule["type"]):
        yield f"{place}: {seen(data)}, wanted: {_or(rule['type'])}"
        return
    if "enum" in rule and data not in rule["enum"]:
        yield f"{place}: {seen(data)}, wanted one of: {', '.join(rule['enum'])}"
    for keyword, bound in rule.items():
        if keyword in _CHECKS:
            if not _CHECKS[keyword](data, bound):
                yield f"{place}: {seen(data)} breaks {keyword} {bound}"
        elif keyword not in _KNOWN:
            raise InternalError(f"parity.schema.json uses {keyword!r}, which parity_json does not check")
    if isinstance(data, list) and "items" in rule:
        for i, entry in enumerate(data):
            yield from _broken(entry, rule["items"], f"{where}[{i}]")
    if isinstance(data, dict):
        yield from _broken_object(data, rule, where)


def _broken_object(data: dict[str, Any], rule: Mapping[str, Any], where: str) -> Iterator[str]:
    properties, others = rule.get("properties", {}), rule.get("additionalProperties", True)
    dot = f"{where}." if where else ""
    yield from (f"{dot}{key}: is missing" for key in rule.get("required", ()) if key not in data)
    for key, value in data.items():
        if key in properties:
            yield from _broken(value, properties[key], f"{dot}{key}")
        elif others is False:
            yield f"{dot}{key}: is not known"
        elif isinstance(others, Mapping):
            yield from _broken(value, others, f"{dot}{key}")


def _contradictions(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what one part of a report says against another."""
    verdicts = data["verdicts"]
    passed = all(row["passed"] for row in verdicts) and any(row["counted"] for row in verdicts)
    if data["passed"] != passed:
        yield f"passed: {data['passed']}, but its verdicts say {passed}"
    for i, plot in enumerate(data["scatter"]):
        if len(plot["reference"]) != len(plot["candidate"]):
            yield f"scatter[{i}]: {len(plot['reference'])} values against {len(plot['candidate'])}"
    for i, run in enumerate(data["generated"]):
        if run["equal"] > min(len(run["reference"]), len(run["candidate"])):
            yield f"generated[{i}]: {run['equal']} equal tokens of fewer"
    found = data["localisation"]
    if (
        found
        and found["module"]
        and found["rows"]
        and found["module"] not in {r["module"] for r in found["rows"]}
    ):
        yield f"localisation.module: {found['module']!r} has no row"


_KNOWN = {"$schema", "$id", "$defs", "$ref", "title", "description", "type", "const", "enum", "items"} | {
    "properties",
    "required",
    "additionalProperties",
}
_CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda data, bound: data >= bound,
    "minLength": lambda data, bound: len(data) >= bound,
    "maxItems": lambda data, bound: len(data) <= bound,
    "pattern": lambda data, bound: re.search(bound, data) is not None,
}


def _is(data: object, wanted: str | list[str]) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    # True is an int in Python and no number in JSON.
    return any(
        isinstance(data, _TYPES[name]) and (name == "boolean" or not isinstance(data, bool)) for name in names
    )


def _or(wanted: str | list[str]) -> str:
    return wanted if isinstance(wanted, str) else " or ".join(wanted)
