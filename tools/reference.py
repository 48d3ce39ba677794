"""Write docs/reference/cli.md from ``--help`` and docs/reference/python.md from the docstrings.

Run: python tools/reference.py [--check]
With ``--check`` nothing is written; exits with 1 where a page is not what it would write.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import click

import lora_export
from lora_export.cli import root
from lora_export.commands import COMMANDS

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
WIDTH = 100
SECTIONS = ("Args", "Returns", "Raises", "Attributes")
# What a reader looks for together; `test_every_public_name_is_described` has each name in one of them.
GROUPS = {
    "Read and write adapters": ["load_adapter", "save_adapter", "Adapter", "LoraModule"],
    "Merge, expose, capture": [
        *("merge_checkpoint", "merge_onnx", "export_onnx", "swap_onnx", "bank_onnx", "convert_adapter"),
        *("capture_onnx", "quantize_onnx"),
    ],
    "Run": ["AdapterSession", "EngineSession", "MergedEngine"],
    "Build engines": ["build_engine", "BuildOptions", "ProfileRequest"],
    "Check and measure": [
        *("check_parity", "assert_parity", "ParityReport", "run_bench", "verify", "VerifyReport"),
    ],
    "Errors": [
        *("LoraExportError", "AdapterError", "CheckpointError", "SiteError", "GraphError", "OutputError"),
        *("InputChangedError", "BackendError", "BackendUnavailable", "EngineBuildError", "ParityError"),
    ],
}
CLI_HEAD = """\
# Command line

What `--help` prints, verb by verb, in the order in which you meet them. This page is written by
`python tools/reference.py`; a test compares the two.
"""
PYTHON_HEAD = f"""\
# Python

Every name of `import lora_export`; the import itself loads nothing heavy. `lora_export.__version__` is the
version. This page is written by `python tools/reference.py` from the docstrings; a test compares the two.

{" · ".join(f"[{title}](#{title.lower().replace(',', '').replace(' ', '-')})" for title in GROUPS)}
"""


def cli_page() -> str:
    """Return the page of the command line."""
    parts = [CLI_HEAD, _help(root, "lora-export")]
    for verb in COMMANDS:
        command = root.get_command(click.Context(root), verb)
        assert command is not None
        parts.append(f"## {verb}\n\n{_help(command, f'lora-export {verb}')}")
    return "\n".join(parts)


def _help(command: click.Command, name: str) -> str:
    # A width of its own: the page must not depend on who writes it.
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "\n".join(["```text", *lines, "```", ""])


def python_page() -> str:
    """Return the page of the public names."""
    parts = [PYTHON_HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += _entry(name, getattr(lora_export, name))
    return "\n".join(parts)


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"### {name}\n"
    if inspect.isclass(thing):
        yield from _class(name, thing)
        return
    yield f"```text\n{_signature(name, thing)}\n```\n"
    yield _prose(thing)


def _class(name: str, thing: type) -> Iterator[str]:
    own = "__init__" in vars(thing)
    if own and not issubclass(thing, Exception):
        yield f"```text\n{_signature(name, thing.__init__, bound=True)}\n```\n"
    if bases := [base.__name__ for base in thing.__bases__ if base.__name__ in lora_export.__all__]:
        yield f"A kind of `{bases[0]}`.\n"
    yield _prose(thing)
    for member, value in vars(thing).items():
        if member.startswith("_") or not inspect.getdoc(value):
            continue
        if isinstance(value, property):
            yield f"#### {name}.{member}\n"
            yield _prose(value)
        elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            function = getattr(value, "__func__", value)
            bound = not isinstance(value, staticmethod)
            yield f"#### {name}.{member}\n"
            yield f"```text\n{_signature(member, function, bound=bound)}\n```\n"
            yield _prose(value)


def _signature(name: str, function: Any, bound: bool = False) -> str:
    """Return ``name(parameters) -> result`` as it stands in the source, one line or one a parameter."""
    signature = inspect.signature(function)
    given = list(signature.parameters.values())[1 if bound else 0 :]
    shown, kinds = [], [parameter.kind for parameter in given]
    for index, parameter in enumerate(given):
        keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if keyword and not {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL} & set(
            kinds[:index]
        ):
            shown.append("*")
        shown.append(_parameter(parameter))
    back = "" if signature.return_annotation is inspect.Signature.empty else signature.return_annotation
    result = f" -> {back}" if back and name[0].islower() else ""
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {text}," for text in shown), f"){result}"])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {parameter.annotation}"
    if parameter.default is inspect.Parameter.empty:
        return text
    # A default that has an address in its text would differ from run to run.
    default = "…" if "<" in repr(parameter.default) else repr(parameter.default)
    return f"{text} = {default}"


def _prose(thing: Any) -> str:
    """Return a docstring in Google's style as Markdown."""
    lines: list[str] = []
    section = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            section = line[:-1]
            lines.append(f"*{section}*")
            lines.append("")
        elif section and line.startswith("    "):
            lines.append(_listed(line[4:], section))
        else:
            if line.strip():
                section = ""
            lines.append(line)
    return _fenced("\n".join(lines)) + "\n"


def _listed(line: str, section: str) -> str:
    if line.startswith("    ") or section == "Returns":
        return line.strip() if section == "Returns" else f"  {line.strip()}"
    name, colon, text = line.partition(":")
    return f"- `{name}`:{text}" if colon else f"- {line}"


def _fenced(text: str) -> str:
    """Return the text with its ``::`` blocks, which Markdown does not know, fenced."""

    def fence(match: re.Match[str]) -> str:
        return f"{match[1]}:\n\n```python\n{dedent(match[2]).strip()}\n```"

    return re.sub(r"(\w+)::\n\n((?:    .*(?:\n|$)|\n(?=    ))+)", fence, text)


PAGES = {"cli.md": cli_page, "python.md": python_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing; say which page is behind.")
    check = parser.parse_args().check
    behind = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            behind.append(name)
        elif not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if behind:
        sys.exit(f"{', '.join(behind)}: run python tools/reference.py")


if __name__ == "__main__":
    main()
