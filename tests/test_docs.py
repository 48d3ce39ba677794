"""The README's commands are the ones that are run, and its options exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from lora_export.cli import root
from lora_export.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


def shell_lines():
    for language, text in BLOCKS:
        if language == "console":
            yield from (line for line in text.splitlines() if line.strip())


def test_ci_runs_the_readmes_test_command_and_nothing_else():
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == [line for line in shell_lines() if "pytest" in line]


def used():
    for line in shell_lines():
        for part in re.split(r"&&|;", line.split(" #")[0]):
            words = shlex.split(part)
            names = [i for i, word in enumerate(words) if word.endswith("lora-export")]
            if names:
                yield words[names[0] + 1 :]


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)[:60]) for words in used()])
def test_commands_parse(words):
    """Verbs and options are the command line's own: click parses them as a user's."""
    verb, *arguments = words
    assert verb in COMMANDS
    command = root.get_command(None, verb)
    command.make_context(verb, list(arguments), resilient_parsing=False)


def test_python_parses_and_names_are_public():
    import lora_export

    for language, text in BLOCKS:
        if language == "python":
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "lora_export":
                    assert node.attr in lora_export.__all__


def test_every_option_named_in_the_text_exists():
    known = {
        option
        for verb in COMMANDS
        for parameter in root.get_command(None, verb).params
        for option in parameter.opts
    } | {"--index-url", "--no-deps", "--debug"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    tools = {
        option
        for tool in (ROOT / "tools").glob("*.py")
        for option in re.findall(r"--[a-z0-9-]+", tool.read_text())
    }
    assert named <= known | tools
