"""The page of a parity report: safe with any name, readable offline, plots where they belong, in Chromium."""

import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import parity_reports
import pytest

from lora_export.parity.result import Localisation, ModuleRow, Scatter
from lora_export.reports.parity.plots import error_against_effect, error_by_module, value_scatter
from lora_export.reports.parity.to_html import report_html
from lora_export.reports.parity.words import mark, number, verdict_line
from lora_export.untrusted.shown import printable

REPORTS = {"good": parity_reports.good, "failed": parity_reports.failed, "hostile": parity_reports.hostile}
VOID = {"meta", "link", "img", "br", "hr", "input", "base"}
LOADING_TAGS = {
    "script",
    "link",
    "img",
    "image",
    "iframe",
    "object",
    "embed",
    "base",
    "use",
    "form",
    "video",
    "a",
}
LOADING_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


@pytest.fixture(params=REPORTS)
def report(request):
    return REPORTS[request.param]()


class Page(HTMLParser):
    """A page's elements, texts of its table cells, and what is wrong with it."""

    def __init__(self, html):
        super().__init__()
        self.wrong, self.open, self.rows, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        self.wrong += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        names = {name for name, _ in attrs}
        loading = names & LOADING_ATTRIBUTES or {name for name in names if name.startswith("on")}
        if tag in LOADING_TAGS or loading:
            self.wrong.append(f"<{tag} {attrs}>")
        if tag == "tr":
            self.rows.append((dict(attrs).get("class"), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.texts.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][1][-1] += data


def svgs(html):
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_the_page_is_whole_and_loads_nothing(report):
    html = report_html(report)
    page = Page(html)
    assert not page.wrong
    assert not re.search(r"url\(|@import|https?:", re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1])
    assert html.count("<style>") == html.count("</style>") == 1
    assert all(char.isprintable() or char == "\n" for char in html)
    assert not [said for said in page.texts if said.strip() == r"\n"]
    html.encode("utf-8")


@pytest.mark.parametrize("text", [parity_reports.HOSTILE[0], parity_reports.HOSTILE[1], "<b>", "</td>"])
def test_the_check_of_the_page_sees_what_is_not_escaped(text):
    html = report_html(parity_reports.good(notes=("A NOTE",)))
    assert Page(html.replace("A NOTE", text)).wrong


def test_the_page_shows_every_verdict(report):
    page = Page(report_html(report))
    wanted = sorted(
        (mark(v), printable(v.name), printable(v.output)) for v in (*report.verdicts, *report.failed)
    )
    shown = [
        tuple(cells[:3]) for kind, cells in page.rows if kind in ("ok", "void", "FAIL") and cells[0] == kind
    ]
    assert sorted(shown) == wanted
    text = "".join(page.texts)
    for verdict in report.verdicts:
        assert number(verdict.value) in text
        assert printable(verdict.why) in text
    big, _, rest = verdict_line(report).partition(": ")
    assert big in page.texts
    assert rest in page.texts


def test_hostile_names_are_shown_as_they_are():
    text = "".join(Page(report_html(parity_reports.hostile())).texts)
    for name in parity_reports.HOSTILE:
        assert printable(name) in text


def test_plots_are_xml_with_words_for_who_cant_see(report):
    html = report_html(report)
    drawn = svgs(html)
    assert len(drawn) >= 3
    for svg in drawn:
        assert svg.get("role") == "img"
        assert len(svg.get("aria-label")) > 20
        for point in (*svg.iter("circle"), *(p for p in svg.iter("path") if "cross" in p.get("class"))):
            assert point.find("title").text
        for element in svg.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
                assert math.isfinite(float(element.get(name, "0")))
            numbers = re.findall(r"[a-z]*nan|inf|-?\d[\d.e+-]*", element.get("d", ""))
            assert all(math.isfinite(float(value)) for value in numbers)


def axis(svg, anchor, pixel, shift):
    """The map from a value to a pixel as the tick labels of a plot say it: (logarithmic?, function)."""
    ticks = [t for t in svg.iter("text") if t.get("class") == "tick" and t.get("text-anchor") == anchor]
    log = "e" in ticks[0].text
    values = [math.log10(float(t.text)) if log else float(t.text) for t in ticks]
    pixels = [float(t.get(pixel)) - shift for t in ticks]
    slope, start = np.polyfit(values, pixels, 1)
    np.testing.assert_allclose(np.multiply(slope, values) + start, pixels, atol=0.11)
    return lambda value: start + slope * (math.log10(value) if log else value)


def centre(point):
    """Where a point of a plot is: a circle, or a cross of two strokes."""
    if point.tag == "circle":
        return float(point.get("cx")), float(point.get("cy"))
    return tuple(np.reshape(re.findall(r"-?[\d.]+", point.get("d")), (-1, 2)).astype(float).mean(axis=0))


def titled(svg):
    return {
        point.find("title").text: centre(point) for point in svg.iter() if point.find("title") is not None
    }


def test_errors_of_modules_lie_where_the_axis_says():
    found = parity_reports.failed().localisation
    (svg,) = svgs(error_by_module(found))
    y, points = axis(svg, "end", "y", 4), titled(svg)
    across = []
    for row in found.rows:
        at = {t.split(": ")[1][:7]: p for t, p in points.items() if t.startswith(f"{row.module}: ")}
        assert at["error o"][1] == pytest.approx(y(row.error_out), abs=0.2)
        assert at["effect "][1] == pytest.approx(y(row.effect), abs=0.2)
        assert at["PyTorch"][1] == pytest.approx(y(row.own_out), abs=0.2)
        across.append(at["error o"][0])
    assert np.ptp(np.diff(across)) < 0.21
    assert min(np.diff(across)) > 0
    (line,) = [e for e in svg.iter("line") if e.get("class") == "culprit"]
    names = [row.module for row in found.rows]
    assert float(line.get("x1")) == pytest.approx(across[names.index(parity_reports.CULPRIT)], abs=0.11)
    (name,) = [e.text for e in svg.iter("text") if e.get("class") == "culprit"]
    assert name == parity_reports.CULPRIT
    (bad,) = [t for t, _ in points.items() if "jumps here" in t]
    assert bad.startswith(parity_reports.CULPRIT)


def test_error_against_effect_lies_where_the_axes_say():
    report = parity_reports.failed()
    (svg,) = svgs(error_against_effect(report))
    x, y, points = axis(svg, "middle", "x", 0), axis(svg, "end", "y", 4), titled(svg)
    rows = [row for row in report.metrics if row.effect is not None]
    assert len(points) == len(rows)
    for row in rows:
        ((title, place),) = [p for p in points.items() if p[0].startswith(f"{row.state}, {row.output}: ")]
        assert place == pytest.approx((x(row.effect), y(row.relative)), abs=0.2)
        assert ("FAILED" in title) == (row.state == "pirate" and row.output == "logits")
    for kind, ratio in (("diagonal", 1.0), ("limit", 0.1)):
        (line,) = [e for e in svg.iter("line") if e.get("class") == kind]
        slope = (y(100) - y(1)) / (x(100) - x(1))
        for end in ("1", "2"):
            px, py = float(line.get(f"x{end}")), float(line.get(f"y{end}"))
            assert py == pytest.approx(y(ratio) + slope * (px - x(1)), abs=0.5)


def test_values_lie_where_the_axes_say():
    values = np.random.default_rng(0).normal(3, 20, (2, 50))
    (svg,) = svgs(value_scatter(Scatter("json", "logits", *map(tuple, values.tolist()))))
    x, y = axis(svg, "middle", "x", 0), axis(svg, "end", "y", 4)
    (path,) = [e for e in svg.iter("path") if e.get("class") == "points"]
    drawn = np.reshape(re.findall(r"-?[\d.]+(?=[ h])", path.get("d")), (-1, 2)).astype(float)
    np.testing.assert_allclose(drawn, [(x(a), y(b)) for a, b in values.T], atol=0.2)


@pytest.mark.parametrize("scale", [0.0, 1e-320, 1e-12, 1.0, 1e12, 1e290])
def test_values_of_any_size_are_drawn_within_the_frame(scale):
    values = tuple((np.linspace(-1, 1, 9) * scale).tolist())
    (svg,) = svgs(value_scatter(Scatter("json", "logits", values, values)))
    (path,) = [e for e in svg.iter("path") if e.get("class") == "points"]
    drawn = np.reshape(re.findall(r"-?[\d.]+(?=[ h])", path.get("d")), (-1, 2)).astype(float)
    assert drawn.min() >= 0
    assert drawn.max() <= 480


def test_what_is_no_number_is_counted_not_drawn():
    odd = (math.nan, math.inf, -math.inf, 1.0, 2.0)
    html = value_scatter(Scatter("json", "logits", odd, (1.0, 1.0, 1.0, 1.0, math.nan)))
    assert "1 value;" in html
    assert html.count("not finite: 4") == 2  # the caption, and the words for who can't see
    assert value_scatter(Scatter("json", "logits", (math.nan,), (1.0,))) == ""
    rows = tuple(
        ModuleRow(
            module=f"layers.{i}.proj", error_in=value, error_out=value, own_out=math.nan, effect=math.nan
        )
        for i, value in enumerate(odd)
    )
    html = error_by_module(Localisation(state="json", module="layers.1.proj", rows=rows))
    assert "not finite: 3" in html
    assert len(titled(svgs(html)[0])) == 2
    assert error_by_module(Localisation(state="json", module="", rows=rows[:1])) == ""


def test_effects_without_a_place_are_counted():
    report = parity_reports.good()
    rows = [row for row in report.metrics if row.effect is not None][:4]
    odd = (
        replace(rows[0], effect=0.0),
        replace(rows[1], relative=math.nan),
        rows[2],
        replace(rows[3], relative=0.0),
    )
    html = error_against_effect(replace(report, metrics=odd))
    assert len(titled(svgs(html)[0])) == 2
    assert "not finite" in html
    assert error_against_effect(replace(report, metrics=odd[:2])) == ""


def test_plots_that_are_left_out_are_said():
    report = parity_reports.good()
    page = Page(report_html(replace(report, scatter=report.scatter[:1] * 15)))
    assert "3 plots more of values against values with --report FILE.json." in page.texts


def test_a_report_of_nothing_has_a_page():
    report = parity_reports.good(
        verdicts=(), metrics=(), generated=(), scatter=(), notes=(), feeds=(), adapters=()
    )
    page = Page(report_html(report))
    assert not page.wrong
    assert "FAILED" in page.texts


# In a browser


@pytest.fixture(scope="module")
def browser():
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium-headless-shell")
    return path


def browse(browser, page, *options):
    """Open a page without a network, as a new user; return (what was printed, what the console said)."""
    command = [
        browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=2000",
        f"--user-data-dir={page.parent / 'profile'}", *(["--no-sandbox"] if os.geteuid() == 0 else []),
        *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("kind", REPORTS)
def test_a_browser_shows_the_page(kind, browser, tmp_path):
    from PIL import Image

    report = REPORTS[kind]()
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(report_html(report), encoding="utf-8")
    dom, console = browse(browser, page, "--dump-dom")
    assert console == []
    seen = Page(dom)
    assert not seen.wrong
    assert verdict_line(report).partition(": ")[0] in seen.texts
    assert "<title>owned" not in dom
    rows = [cells for mark_, cells in seen.rows if mark_ in ("ok", "void", "FAIL") and cells[0] == mark_]
    assert len(rows) == len(report.verdicts) + len(report.failed)
    browse(browser, page, f"--screenshot={shot}", "--window-size=1280,2400")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(np.uint32) @ np.array(
        [65536, 256, 1], np.uint32
    )
    assert pixels.shape == (2400, 1280)
    colours, counts = np.unique(pixels, return_counts=True)
    assert counts.max() / pixels.size < 0.99
    assert len(colours) > 50
    # The heading has the colour of the verdict, green or red as the page's CSS says, and not the other.
    good, bad = (int((pixels[:140] == colour).sum()) for colour in (0x1A7F37, 0xC4222F))
    assert (good > 500, bad > 500) == (report.passed, not report.passed)


def test_a_page_that_does_run_something_is_seen(browser, tmp_path):
    page = tmp_path / "bad.html"
    html = "<title>x</title><script>document.title='owned'; console.error('ran')</script>"
    page.write_text(html, encoding="utf-8")
    dom, console = browse(browser, page, "--dump-dom")
    assert "<title>owned" in dom
    assert len(console) == 1


def test_the_page_itself_lets_nothing_run(browser, tmp_path):
    page = tmp_path / "bad.html"
    html = report_html(parity_reports.good(notes=("A NOTE",)))
    page.write_text(html.replace("A NOTE", "<script>document.title='owned'</script>"), encoding="utf-8")
    dom, console = browse(browser, page, "--dump-dom")
    assert "<title>owned" not in dom
    assert "Content Security Policy" in console[0]
