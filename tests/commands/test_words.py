"""Docstrings begin with a verb and its object, and texts that users see are plain English: in every room."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lora_export"
# A folder or a file at the top, without ``.py``.
ROOMS = sorted({path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")})

# Pattern → what to write instead.
ANYWHERE = {
    r"(?<!there )\bis no [a-z]": "is not a …",
    r"(?<!there )\bare no [a-z]": "are not …",
    r"\b(leave|left|leaves|leaving) (it |them )?away\b": "omit",
    r"\bleave out --": "omit --…",
    r"\bspeaks? of\b": "names, says",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bmade of\b": "made from",
}
IN_DOCSTRINGS = {
    r"\A(What|Whose|Why|Whether|How|Which|Where)\b": "a verb and its object: Return …, Raise …, Read …",
    r"(?m)^ *\w+: (It|What|Whose|Why|Whether|Which|Where)\b": "a noun phrase: 'Path of the file.'",
}
NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def texts_of(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text and whether it is a docstring, for each string; of an f-string its parts as one."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, NODES) and node.body and isinstance(node.body[0], ast.Expr)
    }
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(parts), False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            yield node.lineno, node.value, id(node) in docstrings


def problems_of(source: str) -> list[str]:
    found = []
    for line, text, is_docstring in texts_of(source):
        rules = [(*rule, re.IGNORECASE) for rule in ANYWHERE.items()]
        rules += [(*rule, 0) for rule in IN_DOCSTRINGS.items() if is_docstring]
        for pattern, instead, flags in rules:
            found += [
                f"{line}: {match[0].strip()!r}: {instead}" for match in re.finditer(pattern, text, flags)
            ]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_words_of_a_room(room):
    files = files_of(room)
    assert files
    problems = [
        f"{path.relative_to(PACKAGE)}:{problem}"
        for path in files
        for problem in problems_of(path.read_text(encoding="utf-8"))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "source",
    [
        '"""What a file holds."""',
        'def f():\n    """Whether it is open."""',
        'class C:\n    """A thing.\n\n    Attributes:\n        name: What users call it.\n    """',
        'def f(path):\n    """Read a file.\n\n    Args:\n        path: It.\n    """',
        'raise ValueError(f"{path} is no file")',
        'print("inputs that are no numbers")',
        'option("--alpha", help="Leave it away for rsLoRA.")',
        'print(f"a tensor that {name} does not speak of")',
        'print("leave out --kv-cache")',
        'print("mend what is listed")',
        'print("built anew")',
        'print("a graph made of the base")',
    ],
)
def test_each_pattern_is_found(source):
    assert problems_of(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Read what a file holds."""',
        'class C:\n    """A thing.\n\n    Attributes:\n        name: Name that users give it.\n    """',
        'raise ValueError(f"{path} is not a file: what it holds, nobody knows")',
        'raise ValueError("there is no adapter, and there are no weights")',
        'keys = {"mode": "What"}',
        'print("What next?")',
    ],
)
def test_plain_english_passes(source):
    assert not problems_of(source)
