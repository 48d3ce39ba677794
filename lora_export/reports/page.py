"""Frame every HTML report: one page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_export.reports.markup import LINE_END, Markup, element, joined

# The page may load nothing, even if a name in it slipped through as markup.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
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
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
header h1 { font-size: 2.2rem; letter-spacing: .02em; }
.passed h1 { color: var(--good); } .failed h1 { color: var(--bad); }
header p { margin: .3rem 0 0; font-size: 1.05rem; overflow-wrap: anywhere; }
header p.count { font-size: 1rem; color: var(--soft); }
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
span.bar { display: inline-block; width: 4rem; height: .5rem; margin-right: .5rem; background: var(--line);
  border-radius: .25rem; }
span.bar i { display: block; height: 100%; border-radius: .25rem; background: var(--good); }
.FAIL span.bar i { background: var(--bad); }
.plots { display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: .4rem 0; } svg { width: 100%; height: auto; display: block; }
svg.small { width: 120px; height: 26px; overflow: visible; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
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
rect.bar { fill: var(--error); } line.reach, line.one { stroke: var(--soft); }
line.one { stroke-dasharray: 4 3; }
line.ratio { stroke: var(--error); stroke-width: 2; }
.points { stroke: var(--error); stroke-width: 4; stroke-linecap: round; opacity: .45; fill: none; }
.key { white-space: nowrap; margin-right: 1rem; }
.key i { display: inline-block; width: 1.1rem; height: .2rem; margin-right: .35rem; vertical-align: middle;
  background: var(--error); }
.key .own { background: var(--own); } .key .effect { background: var(--effect); }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0; }
@media (max-width: 40rem) { dl { display: block; } dt { margin-top: .4rem; } }
"""


def page(title: str, *body: Markup) -> str:
    """Return a whole page.

    Args:
        title: Text of the browser's tab.
        body: Sections of the page.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{element('title', title)}<style>{_STYLE}</style></head>\n"
        f"{element('body', *body)}\n</html>\n"
    )


def section(title: str, *body: Markup) -> Markup:
    """Return a section with its heading; nothing if its body is empty."""
    whole = joined(body)
    return element("section", element("h2", title), whole) if whole else Markup()


def folded(summary: str, body: Markup) -> Markup:
    """Return a part that opens when its summary is clicked; nothing if its body is empty."""
    return element("details", element("summary", summary), body) if body else Markup()


def table(rows: Sequence[Sequence[object]], words: int, marks: Sequence[str] = ()) -> Markup:
    """Return a table; nothing if the heading is its only row.

    Args:
        rows: Cells, the heading first.
        words: Number of columns, from the left, that are words; the others are numbers.
        marks: Class of each row of ``rows``.
    """
    if len(rows) < 2:
        return Markup()
    head = [
        element("th", cell, scope="col", class_="w" if i < words else "n") for i, cell in enumerate(rows[0])
    ]
    body: list[Markup] = []
    for place, row in enumerate(rows[1:], start=1):
        cells = [element("td", cell, class_="name" if i < words else "n") for i, cell in enumerate(row)]
        body += [element("tr", *cells, class_=marks[place] if marks else ""), LINE_END]
    return grid(head, [element("tbody", *body)])


def grid(head: Iterable[Markup], bodies: Iterable[Markup]) -> Markup:
    """Return a table of ready cells, which scrolls on a narrower screen."""
    whole = element("table", element("thead", element("tr", *head)), *bodies)
    return element("div", whole, class_="wide")


def lines(text: Iterable[str]) -> Markup:
    """Return lines as they would be printed; nothing if there are no lines."""
    # Each line is a text of its own, so that long ones are cut line by line.
    kept = [part for line in text for part in (line, LINE_END)]
    return element("pre", *kept[:-1]) if kept else Markup()
