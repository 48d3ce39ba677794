"""Names of strangers on a terminal, in a log, HTML, JUnit and GitHub: nothing but text, and not long."""

from __future__ import annotations

import ast
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import parity_reports
import pytest
from harmless import ACTING, is_harmless
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from lora_export.cli import main
from lora_export.commands.printing import print_json, print_lines
from lora_export.engines.record import Profile
from lora_export.errors import AdapterError, GraphError
from lora_export.modes.quantize_onnx import quantize_onnx
from lora_export.reports.engine import profile_lines
from lora_export.reports.parity.to_html import report_html
from lora_export.reports.parity.to_junit import junit_xml
from lora_export.reports.parity.to_text import check_lines as parity_lines
from lora_export.reports.parity.to_text import report_text
from lora_export.untrusted.shown import MAX_LINE, MAX_LISTED, command, safe, shown

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "escape": "a\x1b[31mred\x1b]0;title\x07",
    "carriage return": "a\rError: all is well",
    "newline": "a\nError: disk full\nhint: rm -rf /",
    "direction": "a\u202egnp.exe\u2066",
    "C1": "a\x9b31m\x85b",
    "line separator": "a\u2028Error: x",
    "GitHub": "::error::owned",
    "GitHub, indented": "  ::add-mask::x",
    "GitHub, older": "a ##[error]owned",
    "Azure": "##vso[task.setvariable variable=x]y",
    "markup": "<script>alert(1)</script>\"'&",
    "rich": "[bold red]x[/bold red][/]",
    "braces": "{task.description}{0}",
    "dollars": "$\\frac{$",
    "long": "x" * 200_000,
    "very long": "x" * 1_000_000,
}
# What GitHub and Azure obey, in a line or at its beginning.
COMMAND = re.compile(r"##\w*\[|^\s*::\w", re.MULTILINE)
# No format reads a name with a line break, and a header of names alone is refused.
REFUSED = ("newline", "very long")


def run(arguments: list[object]) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", NAMES)
def test_shown_is_one_harmless_line(name: str) -> None:
    assert is_harmless(shown(NAMES[name]))
    assert is_harmless(f"  {shown(NAMES[name])}")
    assert "<script" not in safe(NAMES[name])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=60), st.text(max_size=40))
def test_any_text_is_one_harmless_line_and_plain_text_stays(text: str, plain: str) -> None:
    assert is_harmless(shown(text))
    assert "\n" not in shown(text)
    if plain.isprintable() and ":" not in plain and "#" not in plain:
        assert shown(plain) == plain


def adapter(folder: Path, name: str, modules: int = 1, rows: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for i in range(modules):
        path = f"base_model.model.{name}" + (f".{i}" if modules > 1 else "")
        tensors[f"{path}.lora_A.weight"] = np.ones((rows, 8), np.float32)
        tensors[f"{path}.lora_B.weight"] = np.ones((8, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def graph(path: Path, name: str) -> Path:
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), f"{name}.weight")
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", weight.name], ["y"], name=f"/{name}/MatMul")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("word", ["a\nb", "a\x1b[31m", "a" * 3000])
def test_a_command_is_whole_or_not_there(word: str) -> None:
    assert command(["lora-export", "inspect", word]) == ""
    assert command(["lora-export", "inspect", "a b"]) == "lora-export inspect 'a b'"


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_prints_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = adapter(tmp_path / "good", NAMES[name]), adapter(tmp_path / "bad", NAMES[name], rows=3)
    base, other = graph(tmp_path / "m.onnx", NAMES[name]), graph(tmp_path / "o.onnx", "other")
    out = tmp_path / "out.onnx"
    checkpoint = tmp_path / "base"
    checkpoint.mkdir()
    save_file({f"{NAMES[name]}.weight": np.ones((9, 8), np.float32)}, checkpoint / "model.safetensors")
    codes = []
    for arguments in (
        ["inspect", good],
        ["inspect", bad],
        ["merge-onnx", "--base", base, "--adapter", good, "-o", out, "--dry-run"],
        ["merge-onnx", "--base", other, "--adapter", good, "-o", out],
        ["merge-onnx", "--base", base, "--adapter", bad, "-o", out],
        ["swap-onnx", "--base", base, "--adapter", good, "-o", out, "--dry-run"],
        ["merge", "--base", checkpoint, "--adapter", good, "-o", tmp_path / "merged"],
        ["merge-onnx", "--base", tmp_path / f"no{NAMES[name][:50]}", "--adapter", good, "-o", out],
        ["merge-onnx", f"--{NAMES[name][:50]}"],
    ):
        codes.append(run(list(arguments)))
        said = capsys.readouterr()
        assert is_harmless(said.out), said.out[:500]
        assert is_harmless(said.err), said.err[:500]
        assert len(said.out) + len(said.err) < 60_000
    assert 4 not in codes, codes
    assert codes[1] == codes[3] == codes[4] == codes[6] == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_json_is_exact_and_harmless(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, base = adapter(tmp_path / "good", NAMES[name]), graph(tmp_path / "m.onnx", NAMES[name])
    assert run(["inspect", good, "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["modules"][0]["module"] == NAMES[name]
    merge = [
        "merge-onnx",
        "--base",
        base,
        "--adapter",
        good,
        "-o",
        tmp_path / "o.onnx",
        "--dry-run",
        "--json",
    ]
    code = run(list(merge))
    more = capsys.readouterr().out
    if code == 0:
        assert any(row["parameter"] == f"{NAMES[name]}.weight" for row in json.loads(more)["plan"]["rows"])
    for said in (text, more):
        assert not ACTING.search(said)
        assert not re.search(r"##(\w+)?\[", said)


@pytest.mark.parametrize(
    "data", [{"a\u202e\x9b": "\ud800 😀 é ##[x] \u2028"}, ["\x00\x1f\x7f", "ü", 1.5, None, "\U000e0001"]]
)
def test_printed_json_is_the_same_data(data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    print_json(json.dumps(data, ensure_ascii=False))
    text = capsys.readouterr().out
    assert json.loads(text) == data
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("count", [MAX_LISTED, 100_000])
def test_thousands_of_problems_are_cut_and_counted(
    count: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_export.commands import inspect as verb

    def refuse(*_: Any) -> Any:
        raise AdapterError("many are wrong", "mend them", [f"problem {i}" for i in range(count)])

    monkeypatch.setattr(verb, "load_all", refuse)
    assert run(["inspect", "x"]) == 1
    lines = capsys.readouterr().err.strip().split("\n")
    assert lines[0] == "Error: many are wrong"
    assert lines[-1] == "hint: mend them"
    listed = lines[1:-1]
    if count == MAX_LISTED:
        assert listed == [f"  problem {i}" for i in range(count)]
    else:
        assert listed[-1] == f"  … and {count - MAX_LISTED} more"
        assert len(listed) == MAX_LISTED + 1


def test_many_modules_with_long_names_stay_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table is as wide as its widest cell: one name of a megabyte must not widen all rows."""
    many = adapter(tmp_path / "a", "m" * 5_000, modules=60)
    assert run(["inspect", many]) == 0
    assert len(capsys.readouterr().out) < 60 * 3 * MAX_LINE


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(key.startswith("on") for key, _ in attrs)


@pytest.mark.parametrize("name", NAMES)
def test_reports_of_parity(name: str) -> None:
    report = parity_reports.named(NAMES[name])
    assert is_harmless("\n".join(shown(line) for line in parity_lines(report)))
    page, junit = report_html(report), junit_xml(report)
    for text in (page, junit, report_text(report)):
        assert not ACTING.search(text.replace("\n", ""))
        assert len(text) < 5_000_000
        # A CI step may print the file.
        assert not COMMAND.search(text)
    tags = _Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    root = ElementTree.fromstring(junit)
    plain = ElementTree.fromstring(junit_xml(parity_reports.named("plain")))
    assert [node.tag for node in root.iter()] == [node.tag for node in plain.iter()]


@pytest.mark.parametrize("ending", ["html", "svg", "png"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_pictures_of_an_adapter(
    name: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ending != "html":
        pytest.importorskip("matplotlib")
    plot = tmp_path / f"p.{ending}"
    assert run(["inspect", adapter(tmp_path / "good", NAMES[name]), "--plot", plot]) == 0
    if ending != "png":
        text = plot.read_text(encoding="utf-8")
        assert "<script" not in text
        assert not ACTING.search(text.replace("\n", ""))
        assert len(text) < 1_000_000
    capsys.readouterr()


def test_progress_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_export.progress import stage_progress

    for name in NAMES.values():
        with stage_progress() as say:
            assert say is not None
            say(name, 0.5)
    assert is_harmless(capsys.readouterr().err)


@pytest.mark.parametrize("name", NAMES)
def test_progress_on_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich import console

    from lora_export import progress

    stream = io.StringIO()
    real = console.Console
    monkeypatch.setattr(console, "Console", lambda **_: real(file=stream, force_terminal=True, width=200))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.stage_progress() as say, progress.byte_progress(f"writing {NAMES[name]}") as add:
        assert say is not None
        assert add is not None
        say(NAMES[name], 0.5)
        add(10)
    assert "\x07" not in stream.getvalue()


EMOJI = ":smile:.:boom:"


@pytest.mark.parametrize("stage", [True, False])
def test_progress_writes_words_between_colons(stage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from lora_export import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(progress.sys, "stderr", stream)
    if stage:
        with progress.stage_progress() as say:
            assert say is not None
            say(EMOJI, 0.5)
    else:
        with progress.byte_progress(EMOJI) as add:
            assert add is not None
            add(10)
    assert EMOJI in stream.getvalue()


def test_no_console_makes_pictures_of_words() -> None:
    """By default, rich's prints ``:smile:`` as a face: a name would be shown as another."""
    calls = [
        (path, node)
        for path in (ROOT / "lora_export").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Console"
    ]
    assert calls
    assert not [
        f"{path.name}:{node.lineno}" for path, node in calls if "emoji=False" not in ast.unparse(node)
    ]


def test_verbs_print_through_one_module() -> None:
    """No verb writes to the terminal by other means."""
    wrong = []
    paths = [*(ROOT / "lora_export" / "commands").glob("*.py"), ROOT / "lora_export" / "cli.py"]
    for path in paths:
        if path.name == "printing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("click.echo", "click.secho", "print", "sys.stdout.write", "sys.stderr.write"):
                    first = node.args[0] if node.args else None
                    if not isinstance(first, ast.Constant):
                        wrong.append(f"{path.name}:{node.lineno} {called}")
    assert not wrong


def test_lines_are_printed_each_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines(["a\nb", "c"])
    assert capsys.readouterr().out == "a\\nb\nc\n"


@pytest.mark.parametrize("name", ["-x", "--help", "a b", "$(id)", "plain"])
def test_a_printed_command_is_read_as_it_was_meant(name: str) -> None:
    """A shell gives each word back, and none that is a path is read as an option."""
    words = shlex.split(command(["lora-export", "verify", Path(name), "--rank", "-1"]))
    assert words[:2] == ["lora-export", "verify"]
    assert words[3:] == ["--rank", "-1"]
    assert Path(words[2]) == Path(name)
    assert not words[2].startswith("-")


def test_a_command_in_a_hint_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a b").mkdir()
    with pytest.raises(GraphError) as caught:
        quantize_onnx(Path("-a b"), Path("o.onnx"), to="int8")
    words = shlex.split(caught.value.hint.partition(": ")[2])
    assert words[1:3] == ["capture-onnx", "./-a b"]


def test_of_many_profiles_the_first_are_printed() -> None:
    shape = ((1, 1), (1, 2), (1, 4))
    lines = profile_lines([Profile(f"p{number}", {"ids": shape}) for number in range(8000)])
    assert len(lines) < 100
    assert lines[-1] == "… and 7992 more profiles"
