"""Write a `ParityReport` as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_export.parity.result import Localisation, ParityReport, Verdict
from lora_export.parity.sentence import sentence
from lora_export.reports.markup import LINE_END, Markup, element, joined
from lora_export.reports.page import folded, grid, page, section, table
from lora_export.reports.parity.plots import error_against_effect, error_by_module, value_scatter
from lora_export.reports.parity.words import (
    by_state,
    facts,
    generated_rows,
    logit_rows,
    mark,
    metric_rows,
    number,
    plural,
    relation,
    share_of_limit,
    verdict_line,
)

_SCATTERS = 12


def report_html(report: ParityReport) -> str:
    """Return the page: the verdict, the failures and where the error begins, plots, and all numbers."""
    big, _, rest = sentence(report).partition(": ")
    _, _, count = verdict_line(report).partition(": ")
    head = [element(*entry) for label, value in facts(report) for entry in (("dt", label), ("dd", value))]
    return page(
        f"{big.lower()}: {report.candidate.get('path', 'candidate')}",
        element(
            "header",
            element("h1", big),
            element("p", rest),
            element("p", count, class_="count"),
            class_="passed" if report.passed else "failed",
        ),
        element("main", element("dl", *head), *_sections(report)),
    )


def _sections(report: ParityReport) -> Iterator[Markup]:
    """Yield the parts of the page."""
    if report.notes:
        yield section("Notes", element("ul", *(element("li", note) for note in report.notes)))
    if report.failed:
        yield section(f"What failed ({len(report.failed)})", _verdicts(report.failed))
    if report.localisation is not None:
        yield section("Where the error begins", _localisation(report.localisation))
    yield section("Error and effect", _plots(report))
    yield section(f"All verdicts ({len(report.verdicts)})", _verdicts(report.verdicts))
    count = plural(len(report.metrics), "output")
    yield section("Metrics", folded(count, table(metric_rows(report.metrics), words=2)))
    yield section("Logits", table(logit_rows(report.metrics), words=2))
    yield section("Generated tokens", table(generated_rows(report.generated), words=4))
    feeds = [(str(feed.get("label", "")), _shapes(feed.get("shapes", {}))) for feed in report.feeds]
    yield section("Feeds", folded(plural(len(feeds), "feed"), table([("feed", "shapes"), *feeds], words=2)))
    versions = list(_versions(report.environment))
    yield section("Environment", folded("versions", table([("what", "value"), *versions], words=2)))


def _verdicts(verdicts: Sequence[Verdict]) -> Markup:
    """Return the table of verdicts, grouped by state."""
    if not verdicts:
        return Markup()
    heads = ("", "check", "output", "value and limit", "of the limit", "why")
    groups: list[Markup] = []
    for state, rows in by_state(verdicts).items():
        title = element("tr", element("th", state, scope="rowgroup", colspan=len(heads)))
        groups.append(element("tbody", title, *map(_verdict, rows)))
    return grid([element("th", text, scope="col") for text in heads], groups)


def _verdict(verdict: Verdict) -> Markup:
    sign = mark(verdict)
    why = verdict.why if verdict.counted else f"proves nothing: {verdict.why}".rstrip(": ")
    cells = (
        element("td", sign, class_="mark"),
        element("td", verdict.name),
        element("td", verdict.output, class_="name"),
        element("td", relation(verdict), class_="n"),
        element("td", _bar(verdict), class_="used"),
        element("td", why, class_="why"),
    )
    return joined([element("tr", *cells, class_=sign), LINE_END])


def _bar(verdict: Verdict) -> Markup:
    """Return the share of its limit that a value uses, as a bar."""
    used = share_of_limit(verdict)
    if not verdict.limit < math.inf:
        return Markup()
    percent = "beyond" if used == math.inf else f"{used:.0%}" if used <= 1 else f"{number(used)} ×"
    return joined([element("span", element("i", style=f"width:{min(used, 1):.0%}"), class_="bar"), percent])


def _localisation(found: Localisation) -> Markup:
    """Return the plot and the table of modules."""
    sentences = [f"Run with: {found.state}."]
    if found.of:
        sentences.append(
            f"{found.looked_at} of {plural(found.of, 'module')} were run with their outputs exposed."
        )
    sentences += [found.note] if found.note else []
    rows: list[tuple[str, ...]] = [("module", "error in", "error out", "PyTorch’s own", "effect", "")]
    marks = [""]
    for row in found.rows:
        begins = row.module == found.module
        marks.append("FAIL" if begins else "")
        numbers = (number(value) for value in (row.error_in, row.error_out, row.own_out, row.effect))
        rows.append((row.module, *numbers, "begins here" if begins else ("jumps" if row.jumped else "")))
    modules = folded("the modules as a table", table(rows, words=1, marks=marks))
    return joined([element("p", " ".join(sentences)), error_by_module(found), modules])


def _plots(report: ParityReport) -> Markup:
    body = joined([error_against_effect(report), *map(value_scatter, report.scatter[:_SCATTERS])])
    if not body:
        return body
    left = len(report.scatter) - _SCATTERS
    more = f"{plural(left, 'plot')} more of values against values with --report FILE.json."
    return joined([element("div", body, class_="plots"), *([element("p", more)] if left > 0 else [])])


def _versions(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in sorted(environment.items()):
        if isinstance(value, Mapping):
            yield from ((f"{name}: {part}", str(entry)) for part, entry in sorted(value.items()))
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _shapes(shapes: dict[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} [{', '.join(map(str, sizes))}]" for name, sizes in shapes.items())
