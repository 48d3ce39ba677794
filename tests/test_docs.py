"""What README, CONTRIBUTING, SECURITY and docs/ say can be typed, is there, and is in step with the code."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

import lora_export
from lora_export.cli import root
from lora_export.commands import COMMANDS
from lora_export.graph.captured import DIMS_KEY, MODEL_KEY
from lora_export.graph.data_identity import KEY as DATA_KEY

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *DOCS]
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "developers" / "architecture.md"
OURS = "https://github.com/lora-export/lora-export/"
README_BYTES = 6 * 1024
# Options of pip, mkdocs and ruff that a page may name.
FOREIGN = {"--check", "--index-url", "--no-deps", "--strict"}
METADATA = {DATA_KEY, DIMS_KEY, MODEL_KEY}
# Folders of the repository: a path that begins with one is a path of ours.
FOLDERS = ("docs/", "lora_export/", "recipes/", "tests/", "tools/")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return each fenced block's language and text; blocks in lists are indented."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", text_of(page), re.S | re.M)
    return [(language, dedent(text)) for _, language, text in found]


def prose(page: Path) -> str:
    return re.sub(r"^( *)```\w+\n.*?^\1```$", "", text_of(page), flags=re.S | re.M)


def inline(page: Path) -> list[str]:
    """Return what stands between backticks outside of blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def shell_lines(page: Path) -> Iterator[str]:
    for language, text in blocks(page):
        if language == "console":
            yield from (line for line in text.splitlines() if line.strip())


def examples(page: Path) -> Iterator[str]:
    """Yield the commands under "Example:" of each verb's help."""
    for language, text in blocks(page):
        if language == "text" and "Usage: " in text:
            yield from (line.strip() for line in text.splitlines() if line.startswith("    lora-export "))


def calls(page: Path) -> Iterator[list[str]]:
    """Yield the words of each call of lora-export, the program itself left out."""
    for line in [*shell_lines(page), *examples(page)]:
        for part in re.split(r"&&|;", line.split(" #")[0]):
            words = shlex.split(part)
            places = [i for i, word in enumerate(words) if word.endswith("lora-export")]
            if places:
                yield words[places[0] + 1 :]


def test_there_are_pages_and_calls() -> None:
    """What is checked below is not nothing."""
    assert len(DOCS) >= 15
    assert {call[0] for page in PAGES for call in calls(page)} == set(COMMANDS)


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == [line for line in shell_lines(README) if "pytest" in line]


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= README_BYTES


@each_page
def test_commands_parse(page: Path) -> None:
    """Verbs and options are the command line's own: click parses them as a user's."""
    for verb, *arguments in calls(page):
        assert verb in COMMANDS
        command = root.get_command(None, verb)
        assert command is not None
        command.make_context(verb, list(arguments), resilient_parsing=False)


@each_page
def test_verbs_in_the_text_exist(page: Path) -> None:
    named = {match[1] for code in inline(page) if (match := re.match(r"lora-export ([a-z][\w-]*)", code))}
    assert named <= set(COMMANDS)


@each_page
def test_python_parses_and_names_are_public(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "lora_export":
                    assert node.attr in lora_export.__all__


@each_page
def test_names_in_the_text_exist(page: Path) -> None:
    """`lora_export.something` is public, a module, or an entry of a graph's metadata."""
    for code in inline(page):
        if match := re.match(r"lora_export((?:\.\w+)+)", code):
            name, attribute = match[0], match[1].split(".")[1]
            known = attribute in lora_export.__all__ or name in METADATA
            assert known or importlib.util.find_spec(name) is not None, name


@each_page
def test_options_in_the_text_exist(page: Path) -> None:
    known = {
        option
        for command in [root, *(root.get_command(None, verb) for verb in COMMANDS)]
        for parameter in command.params
        for option in parameter.opts
    }
    known |= {option for file in (ROOT / "tools").glob("*.py") for option in _options(text_of(file))}
    assert _options(text_of(page)) <= known | FOREIGN | {"--help"}


def _options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


@each_page
def test_paths_in_the_text_exist(page: Path) -> None:
    """Files and folders of the repository, patterns included; NAME stands for a reader's own."""
    words = [word for code in inline(page) for word in code.split()]
    words += [word for line in shell_lines(page) for word in shlex.split(line.split(" #")[0])]
    paths = [word for word in words if word.startswith(FOLDERS) and "NAME" not in word]
    assert not [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]
    named = [word for word in words if re.fullmatch(r"test_\w+\.py", word)]
    assert not [name for name in named if not list((ROOT / "tests").rglob(name))]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if target.startswith(OURS):
            if match := re.match(r"(?:blob|tree)/main/(.+)", path.removeprefix(OURS)):
                missing += [] if (ROOT / match[1]).exists() else [target]
            continue
        if "://" in target:
            continue
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown and GitHub make them of such headings."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), re.M):
        plain = re.sub(r"[^\w\s-]", "", title.lower().replace("`", "")).strip()
        found.add(re.sub(r"[\s]+", "-", plain))
    return found


def test_each_verb_and_each_room_is_in_the_readme() -> None:
    named = {word for code in inline(README) for word in code.split()}
    assert set(COMMANDS) <= named
    assert rooms() <= named


def test_each_room_is_in_the_architecture() -> None:
    named = {code.rstrip("/") for code in inline(ARCHITECTURE)}
    assert rooms() <= named


def rooms() -> set[str]:
    package = ROOT / "lora_export"
    flat = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    return flat | {path.parent.name for path in package.glob("*/__init__.py")}


def test_each_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [entry for entry in nav if isinstance(entry, str)]
    listed += [page for entry in nav if isinstance(entry, dict) for group in entry.values() for page in group]
    assert sorted(listed) == [str(page.relative_to(ROOT / "docs")) for page in DOCS]


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_in_step() -> None:
    """In a process of its own: click keeps options that other tests have made."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_described() -> None:
    described = [name for names in reference().GROUPS.values() for name in names]
    assert sorted(described) == sorted(set(lora_export.__all__) - {"__version__"})


def test_the_pages_build(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (extra docs)")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("index.html")}
    assert {Path("guides/merge/index.html"), Path("reference/cli/index.html")} <= pages
    for built in pages:
        article = text_of(tmp_path / "site" / built).partition("<article")[2].partition("</article>")[0]
        # A list without an empty line before it is a paragraph to Python-Markdown.
        paragraphs = re.findall(r"<p>.*?</p>", re.sub(r"<pre.*?</pre>", "", article, flags=re.S), re.S)
        assert not [text for text in paragraphs if re.search(r"\n(?:[-|]|\d+\.) ", text)], built
    page = text_of(tmp_path / "site" / "index.html")
    assert not re.findall(r'(?:src|rel="stylesheet" href)="(https?:[^"]+)', page)  # nothing from elsewhere
