"""A `ParityReport` as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_export.parity.result import Localisation, ParityReport, Verdict
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
    share,
    verdict_line,
)
from lora_export.untrusted.shown import safe

# Nothing that a page like this could be made to load is allowed to load.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_SCATTERS = 12
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d1d1f; --soft: #63636b; --line: #e3e3e8;
  --card: #f6f6f8; --good: #1a7f37; --bad: #c4222f; --void: #8a6100; --error: #2563b8; --own: #8a8a94;
  --effect: #b4690e; }
@media (prefers-color-scheme: dark) { :root { --back: #151517; --text: #ececee; --soft: #a2a2ab;
  --line: #34343a; --card: #1f1f23; --good: #4cc46a; --bad: #ff6b73; --void: #e0b03c; --error: #6ea8ff;
  --own: #8f8f99; --effect: #f0a04b; } }
* { box-sizing: border-box; }
body { font: 14px/1.5 system-ui, "Liberation Sans", sans-serif; margin: 0 auto; max-width: 76rem;
  padding: 1.5rem 1.25rem 4rem; color: var(--text); background: var(--back); }
header { border-left: .5rem solid var(--good); background: var(--card); padding: 1rem 1.25rem;
  border-radius: .4rem; }
header.failed { border-color: var(--bad); }
h1 { margin: 0; font-size: 2.2rem; line-height: 1.15; letter-spacing: .02em; color: var(--good); }
.failed h1 { color: var(--bad); }
header p { margin: .3rem 0 0; font-size: 1.05rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1.2rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; padding-top: 1rem; overflow-wrap: anywhere; }
td.n { text-align: right; white-space: nowrap; } th.n { text-align: right; }
td.name { overflow-wrap: anywhere; min-width: 10rem; }
.mark { font-weight: 700; white-space: nowrap; }
.ok .mark { color: var(--good); } .void .mark { color: var(--void); } .FAIL .mark { color: var(--bad); }
.FAIL td { background: color-mix(in srgb, var(--bad) 9%, transparent); }
.why { color: var(--soft); min-width: 16rem; overflow-wrap: anywhere; } .FAIL .why { color: var(--text); }
.used { white-space: nowrap; color: var(--soft); font-size: .92em; }
.bar { display: inline-block; width: 4rem; height: .5rem; margin-right: .5rem; background: var(--line);
  border-radius: .25rem; }
.bar i { display: block; height: 100%; border-radius: .25rem; background: var(--good); }
.FAIL .bar i { background: var(--bad); }
.plots { display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: .4rem 0; } svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .92em; overflow-wrap: anywhere; }
svg text { font: 12px system-ui, "Liberation Sans", sans-serif; fill: var(--soft); stroke: var(--back);
  stroke-width: 4px; paint-order: stroke; }
.frame { fill: none; stroke: var(--line); } .grid { stroke: var(--line); }
circle { fill: var(--error); } circle.own { fill: var(--own); } circle.effect { fill: var(--effect); }
.curve { fill: none; stroke: var(--error); stroke-width: 1.6; }
.curve.own { stroke: var(--own); stroke-dasharray: 5 4; }
.curve.effect { stroke: var(--effect); stroke-width: 1; opacity: .7; }
.cross { fill: none; stroke: var(--bad); stroke-width: 2.6; }
line.culprit { stroke: var(--bad); stroke-dasharray: 2 3; }
svg text.culprit { fill: var(--bad); font-weight: 700; }
line.diagonal { stroke: var(--soft); stroke-width: 1.4; }
line.limit { stroke: var(--bad); stroke-dasharray: 6 4; } svg text.limit { fill: var(--bad); }
.points { stroke: var(--error); stroke-width: 4; stroke-linecap: round; opacity: .45; fill: none; }
.key { white-space: nowrap; margin-right: 1rem; }
.key i { display: inline-block; width: 1.1rem; height: .2rem; margin-right: .35rem; vertical-align: middle;
  background: var(--error); }
.key .own { background: var(--own); } .key .effect { background: var(--effect); }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0; }
@media (max-width: 40rem) { dl { display: block; } dt { margin-top: .4rem; } }
"""


def report_html(report: ParityReport) -> str:
    """Return the page: the verdict, what failed and where it begins, plots, and every number."""
    kind = "passed" if report.passed else "failed"
    big, _, rest = verdict_line(report).partition(": ")
    head = "".join(f"<dt>{safe(label)}</dt><dd>{safe(value)}</dd>" for label, value in facts(report))
    title = f"{big.lower()}: {report.candidate.get('path', 'candidate')}"
    body = "\n".join(part for part in _sections(report) if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f'<header class="{kind}"><h1>{safe(big)}</h1><p>{safe(rest)}</p></header>\n'
        f"<main>\n<dl>{head}</dl>\n{body}\n</main>\n</body></html>\n"
    )


def _sections(report: ParityReport) -> Iterator[str]:
    """Yield the parts of the page; "" for what there is nothing of."""
    if report.notes:
        yield _section("Notes", f"<ul>{''.join(f'<li>{safe(note)}</li>' for note in report.notes)}</ul>")
    if report.failed:
        yield _section(f"What failed ({len(report.failed)})", _verdicts(report.failed))
    if report.localisation is not None:
        yield _section("Where the error begins", _localisation(report.localisation))
    yield _section("Error and effect", _plots(report))
    yield _section(f"All verdicts ({len(report.verdicts)})", _verdicts(report.verdicts))
    count = plural(len(report.metrics), "output")
    yield _section("Metrics", _folded(count, _table(metric_rows(report.metrics), words=2)))
    yield _section("Logits", _table(logit_rows(report.metrics), words=2))
    yield _section("Generated tokens", _table(generated_rows(report.generated), words=4))
    feeds = [(str(feed.get("label", "")), _shapes(feed.get("shapes", {}))) for feed in report.feeds]
    yield _section(
        "Feeds", _folded(plural(len(feeds), "feed"), _table([("feed", "shapes"), *feeds], words=2))
    )
    versions = list(_versions(report.environment))
    yield _section("Environment", _folded("versions", _table([("what", "value"), *versions], words=2)))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{safe(title)}</h2>{body}</section>" if body else ""


def _folded(said: str, body: str) -> str:
    return f"<details><summary>{safe(said)}</summary>{body}</details>" if body else ""


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    """Return the table of verdicts, grouped by state."""
    if not verdicts:
        return ""
    heads = ("", "check", "output", "value and limit", "of the limit", "why")
    head = "".join(f'<th scope="col">{safe(text)}</th>' for text in heads)
    groups: list[str] = []
    for state, rows in by_state(verdicts).items():
        title = f'<tr><th scope="rowgroup" colspan="{len(heads)}">{safe(state)}</th></tr>'
        groups.append(f"<tbody>{title}{''.join(map(_verdict, rows))}</tbody>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>{"".join(groups)}</table></div>'


def _verdict(verdict: Verdict) -> str:
    sign = mark(verdict)
    why = verdict.why if verdict.counted else f"proves nothing: {verdict.why}".rstrip(": ")
    cells = (
        f'<td class="mark">{sign}</td><td>{safe(verdict.name)}</td>'
        f'<td class="name">{safe(verdict.output)}</td>'
        f'<td class="n">{safe(relation(verdict))}</td><td class="used">{_bar(verdict)}</td>'
        f'<td class="why">{safe(why)}</td>'
    )
    return f'<tr class="{sign}">{cells}</tr>\n'


def _bar(verdict: Verdict) -> str:
    """Return how much of its limit a value uses, as a bar."""
    used = share(verdict)
    if not verdict.limit < math.inf:
        return ""
    said = "beyond" if used == math.inf else f"{used:.0%}" if used <= 1 else f"{number(used)} ×"
    return f'<span class="bar"><i style="width:{min(used, 1):.0%}"></i></span>{said}'


def _localisation(found: Localisation) -> str:
    """Return the plot and the table of modules."""
    said = [f"Looked at with: {found.state}."]
    if found.of:
        said.append(f"{found.looked_at} of {plural(found.of, 'module')} were run with their outputs exposed.")
    said += [found.note] if found.note else []
    rows: list[tuple[str, ...]] = [("module", "error in", "error out", "PyTorch’s own", "effect", "")]
    marks = [""]
    for row in found.rows:
        begins = row.module == found.module
        marks.append("FAIL" if begins else "")
        numbers = (number(value) for value in (row.error_in, row.error_out, row.own_out, row.effect))
        rows.append((row.module, *numbers, "begins here" if begins else ("jumps" if row.jumped else "")))
    table = _table(rows, words=1, marks=marks)
    return f"<p>{safe(' '.join(said))}</p>{error_by_module(found)}{_folded('the modules as a table', table)}"


def _plots(report: ParityReport) -> str:
    drawn = [error_against_effect(report), *map(value_scatter, report.scatter[:_SCATTERS])]
    body = "".join(drawn)
    left = len(report.scatter) - _SCATTERS
    more = f"<p>{plural(left, 'plot')} more of values against values with --report.</p>" if left > 0 else ""
    return f'<div class="plots">{body}</div>{more}' if body else ""


def _table(rows: Sequence[Sequence[str]], words: int, marks: Sequence[str] = ()) -> str:
    """Return a table with its heading; the first columns are words, the others numbers."""
    if len(rows) < 2:
        return ""
    head = "".join(
        f'<th scope="col" class="{"w" if i < words else "n"}">{safe(cell)}</th>'
        for i, cell in enumerate(rows[0])
    )
    body = ""
    for place, row in enumerate(rows[1:], start=1):
        cells = "".join(
            f'<td class="{"name" if i < words else "n"}">{safe(cell)}</td>' for i, cell in enumerate(row)
        )
        body += f'<tr class="{marks[place] if marks else ""}">{cells}</tr>\n'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _versions(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in sorted(environment.items()):
        if isinstance(value, Mapping):
            yield from ((f"{name}: {part}", str(entry)) for part, entry in sorted(value.items()))
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _shapes(shapes: dict[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} [{', '.join(map(str, sizes))}]" for name, sizes in shapes.items())
