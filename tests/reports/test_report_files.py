"""Reports by the ending of their file: every form of every result, refusals, and names that stay text."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import parity_reports
import pytest
import session_graphs
from markdown_it import MarkdownIt

from lora_export import cli
from lora_export.adapter import Adapter, LoraModule
from lora_export.formats import save_adapter
from lora_export.parity import check
from lora_export.reports import PICTURES, REPORTS
from lora_export.reports.files import content
from lora_export.reports.markdown import text
from lora_export.reports.markup import Markup, element
from lora_export.untrusted.shown import printable

ROOT = Path(__file__).resolve().parents[2]
CASES = [(kind, ending) for kind, known in REPORTS.items() for ending in known]


@dataclass
class Place:
    """Files for each verb, and its command line."""

    folder: Path
    lines: dict[str, list[str]] = field(default_factory=dict)

    def run(self, kind: str, *options: object) -> int:
        return int(cli._run([*self.lines[kind], *map(str, options)], False))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(check, "check_parity", lambda *_, **__: parity_reports.failed())
    graph = session_graphs.base(tmp_path)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4), (6, 2)))
    modules = {"q<b>": LoraModule("q<b>", "linear", a, b, alpha=8, rank=2)}
    adapter = save_adapter(Adapter("sql", "", "peft", modules), tmp_path / "sql")
    return Place(
        tmp_path,
        {
            "parity": ["parity", "--reference", str(graph), "--candidate", str(graph)],
            "bench": ["bench", str(graph), "--seconds", "0.05", "--quiet"],
            "adapter": ["inspect", str(adapter)],
        },
    )


def is_sound(ending: str, data: bytes) -> bool:
    """Whether a file is what its ending says, by a parser that is not ours."""
    if ending == "json":
        return isinstance(json.loads(data), dict)
    if ending in ("xml", "svg"):
        return bool(ElementTree.fromstring(data).tag)
    if ending == "png":
        return data.startswith(b"\x89PNG")
    written = data.decode("utf-8")
    if ending == "html":
        return written.startswith("<!doctype html>") and written.rstrip().endswith("</html>")
    if ending == "md":
        return {"heading_open", "table_open"} <= {t.type for t in MarkdownIt().enable("table").parse(written)}
    return ending == "txt" and written.endswith("\n") and len(written) > 100


@pytest.mark.parametrize("kind", REPORTS)
def test_every_form_of_report_at_once(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    files = {ending: place.folder / "out" / f"report.{ending}" for ending in REPORTS[kind]}
    options = [word for file in files.values() for word in ("--report", file)]
    assert place.run(kind, *options) == (3 if kind == "parity" else 0), capsys.readouterr().err
    for ending, file in files.items():
        assert is_sound(ending, file.read_bytes()), file
    assert {file.name for file in files["json"].parent.iterdir()} == {file.name for file in files.values()}


def test_the_check_of_a_form_sees_another(place: Place) -> None:
    report = parity_reports.failed()
    made = {ending: content("parity", report, ending) for ending in REPORTS["parity"]}
    for ending in made:
        for other, data in made.items():
            try:
                sound = is_sound(ending, data)
            except (ValueError, SyntaxError):
                sound = False
            assert sound == (ending == other) or ending == "txt"


@pytest.mark.parametrize(("kind", "ending"), CASES)
def test_every_entry_of_the_registry_is_there(kind: str, ending: str) -> None:
    module, _, attribute = REPORTS[kind][ending].partition(":")
    assert callable(getattr(import_module(module), attribute))


@pytest.mark.parametrize("kind", REPORTS)
@pytest.mark.parametrize(
    ("name", "said"), [("r.gif", "ends in .gif"), ("r", "has no ending"), ("r.json.gz", "ends in .gz")]
)
def test_an_unknown_ending_is_refused_with_those_that_are_known(
    kind: str, name: str, said: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(check, "check_parity", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr("lora_export.bench.run.carry_out", lambda *_, **__: pytest.fail("it was run"))
    assert place.run(kind, "--report", place.folder / name, "--report", place.folder / "good.json") in (1, 2)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{place.folder / name} {said}" in printed
    assert all(f".{ending}" in printed for ending in REPORTS[kind])
    assert "Traceback" not in printed
    assert not (place.folder / "good.json").exists()


@pytest.mark.parametrize(
    ("kind", "option", "ending"),
    [
        *(("parity", "--junit", "xml"), ("parity", "--html", "html")),
        *(("adapter", "--plot", ending) for ending in ("html", *PICTURES)),
    ],
)
def test_old_options_mean_the_same(kind: str, option: str, ending: str, place: Place) -> None:
    # What --plot draws is told by its ending; the others take any name.
    old = place.folder / (f"old.{ending}" if option == "--plot" else "old.any")
    new = place.folder / f"NEW.{ending.upper()}"
    place.run(kind, option, old, "--report", new)
    assert old.read_bytes() == new.read_bytes()
    assert is_sound(ending, old.read_bytes())


@pytest.mark.parametrize("kind", ["bench", "adapter"])
def test_a_picture_without_matplotlib_says_what_to_do(
    kind: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert place.run(kind, "--report", place.folder / "a.png") == 1
    said = capsys.readouterr().err
    assert "lora-export[plot]" in said
    assert ".html" in said


# --- names stay text ---------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.said = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.said += data


MARKS = (
    "<b>x</b>",
    "[a](b)",
    "![a](b)",
    "`x`",
    "*x*",
    "_x_",
    "~~x~~",
    "| x |",
    "a\\|b",
    "<http://x.y>",
    "&amp;",
)
PLAIN = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "code"}


@pytest.mark.parametrize("name", [*MARKS, *parity_reports.HOSTILE])
def test_names_are_nothing_but_text_in_markdown(name: str) -> None:
    rendered = Tags(
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text(name))
    )
    assert rendered.tags <= {"p"}
    assert rendered.said.strip() == printable(name)


def test_a_hostile_report_makes_no_elements_in_markdown() -> None:
    written = content("parity", parity_reports.hostile(), "md").decode("utf-8")
    page = Tags(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(written))
    assert page.tags <= PLAIN
    for name in parity_reports.HOSTILE:
        assert printable(name) in page.said


@pytest.mark.parametrize("name", [*MARKS, *parity_reports.HOSTILE])
def test_what_is_put_into_an_element_is_text(name: str) -> None:
    made = element("p", name, element("i", name), title=name, class_="x")
    page = Tags(made)
    assert page.tags == {"p", "i"}
    assert page.said == printable(name) * 2
    assert ElementTree.fromstring(made).get("title") == printable(name)
    assert element("p", Markup("<i></i>"), 1.25, y=2.0, x=None) == '<p y="2.0"><i></i>1.2</p>'


def test_markup_is_escaped_in_one_place() -> None:
    """Whoever else imports what escapes has found a way past `element`."""
    found = {
        path.name
        for path in (ROOT / "lora_export").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and (node.module == "html" or any(alias.name == "safe" for alias in node.names))
    }
    assert found == {"markup.py", "shown.py"}
