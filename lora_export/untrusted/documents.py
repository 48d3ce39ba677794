"""Read JSON and YAML: files, metadata of files, and lines from other processes.

All documents are read here, and are checked before anything else uses them:

1. It is UTF-8 and has no half of a surrogate pair.
2. Its size is limited, and it would take less memory than ten times its size and 50 MB: ``[[],[],…`` takes
   thirty times its size.
3. It is not nested deeper than `MAX_DEPTH`: later code may walk it by recursion.
4. No object has a key twice: the last one would silently win.
5. Numbers that are computed with are finite. Configs of transformers may hold ``Infinity`` and ``NaN``
   (``time_step_limit``), so this rule is the caller's choice.
6. No number of a JSON document is too large for a float: later code may turn an integer into one, and
   ``1e999`` would be written again as ``Infinity``, which is not JSON. (Tokenizers' configs hold 10³⁰, more
   than 64 bits.)
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_export.errors import LoraExportError
from lora_export.untrusted.links import refuse_link
from lora_export.untrusted.shown import shown

if TYPE_CHECKING:
    import yaml

MAX_DEPTH = 64
MAX_BYTES = 64 << 20
# A recipe of thousands of steps is smaller; YAML's reader needs a second for each 100 kB.
MAX_YAML_BYTES, MAX_YAML_NODES = 512 << 10, 50_000
# Least memory of one value of each kind in CPython: an empty list, a small dict, a short string, a number
# with its place in a list.
_LIST_BYTES, _DICT_BYTES, _TEXT_BYTES, _NUMBER_BYTES = 80, 240, 60, 40
# An entry of a large dict: its place there, its pair until the dict is made, and json's memory of its key.
_ENTRY_BYTES = 140
# A text with a letter outside of Latin-1, or of the first plane, takes 2 or 4 bytes for each.
_WIDEST, _TEXT_HEAD = 4, 76
_BETWEEN_QUOTES = re.compile(r'[^"]+')
_SMALL_PEAK, _PEAK_FACTOR = 50 << 20, 10
_LISTED = 20
# Integers with as many digits fit into a float, and need no further look.
_SHORT = 300


class DocumentError(ValueError):
    """Error for a document that breaks rules.

    Attributes:
        problems: One sentence for each broken rule, without the file's name.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def parse_json(
    text: str | bytes, *, finite: bool = False, surrogates: bool = False, max_bytes: int = MAX_BYTES
) -> Any:
    """Return the value of a JSON document.

    Args:
        text: The document.
        finite: Refuse NaN and infinities, for numbers that are computed with.
        surrogates: Allow halves of surrogate pairs, with which we write paths that are not UTF-8.
        max_bytes: Size of the largest document that is read.

    Raises:
        DocumentError: The document breaks a rule of this module.
    """
    if len(text) > max_bytes:
        raise DocumentError([f"it has {len(text)} bytes, but at most {max_bytes} are read"])
    if isinstance(text, bytes):
        text = _decoded(text)
    _refuse_costly(text)
    has_escapes = "\\u" in text
    twice: dict[str, None] = {}

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            # The document is refused: its dict may be used up.
            twice.update((name, None) for name, _ in pairs if made.pop(name, twice) is twice)
        return made

    try:
        value = json.loads(
            text,
            object_pairs_hook=once,
            parse_constant=_no_number if finite else None,
            parse_float=_finite_float,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise DocumentError([f"it is nested deeper than {MAX_DEPTH} levels"]) from error
    except ValueError as error:
        raise DocumentError([str(error)]) from error
    if twice:
        raise DocumentError([f"the key '{shown(name)}' occurs twice" for name in list(twice)[:_LISTED]])
    _refuse_deep(value)
    if not surrogates and has_escapes:
        _refuse_half_pairs(value)
    return value


def read_json(
    path: Path,
    error: type[LoraExportError] = LoraExportError,
    hint: str = "save or download it again",
    *,
    given: Path | None = None,
    finite: bool = False,
    surrogates: bool = False,
) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file.
        error: Class of the error to raise.
        hint: How to fix a damaged file.
        given: Path that the user named, if the file was only looked for beside or in it: a link out of that
            folder is refused (`refuse_link`). None where the file itself was named, or is ours.
        finite: See `parse_json`.
        surrogates: See `parse_json`.

    Raises:
        LoraExportError: The file can't be read, or breaks a rule of this module (of the class ``error``).
    """
    if given is not None:
        refuse_link(path, given, error)
    raw = _bytes_of(path, MAX_BYTES, error)
    return json_of(raw, str(path), error, hint, finite=finite, surrogates=surrogates)


def json_of(
    text: str | bytes,
    where: str,
    error: type[LoraExportError] = LoraExportError,
    hint: str = "save or download it again",
    *,
    finite: bool = False,
    surrogates: bool = False,
) -> Any:
    """Return the value of a JSON text; see `read_json`.

    Args:
        text: The document.
        where: Its place, for the error.
        error: Class of the error to raise.
        hint: How to fix a damaged document.
        finite: See `parse_json`.
        surrogates: See `parse_json`.

    Raises:
        LoraExportError: The document breaks a rule of this module (of the class ``error``).
    """
    try:
        return parse_json(text, finite=finite, surrogates=surrogates)
    except DocumentError as found:
        if len(found.problems) == 1:
            raise error(f"{where} can't be read as JSON: {found.problems[0]}", hint) from found
        raise error(f"{where} can't be read as JSON", hint, found.problems) from found


def compose_yaml(path: Path, error: type[LoraExportError], what: str) -> yaml.Node | None:
    """Return the nodes of a YAML file, with their lines; None for an empty file.

    Args:
        path: The file.
        error: Class of the error to raise.
        what: Kind of the file, for the error.

    Raises:
        LoraExportError: The file can't be read, or breaks a rule of this module (of the class ``error``).
    """
    import yaml

    from lora_export.untrusted.yaml_nodes import BoundedLoader

    raw = _bytes_of(path, MAX_YAML_BYTES, error, what)
    try:
        root = yaml.compose(_decoded(raw), Loader=BoundedLoader)
        _refuse_many(root)
    except DocumentError as found:
        raise error(
            f"{path} can't be read as YAML: {found}", f"correct the {what}; a long one can be split"
        ) from found
    except OverflowError as found:  # "\UFFFFFFFF"
        reason = "an escape in it stands for no character"
        raise error(f"{path} is not YAML: {reason}", "escape characters up to \\U0010FFFF") from found
    except (yaml.YAMLError, ValueError) as found:
        reason = " ".join(str(found).split())
        raise error(f"{path} is not YAML: {reason}", "correct the syntax at that place") from found
    return root


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read; opening a pipe, for example, could wait for ever.

    Raises:
        OSError: The file can't be opened, or is not a regular one.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    except BaseException:
        os.close(handle)
        raise
    # From here on the file closes it: after a signal in between, a second close would fail, and its error
    # would take the place of the signal's.
    return os.fdopen(handle, "rb")


def _bytes_of(path: Path, most: int, error: type[LoraExportError], what: str = "") -> bytes:
    """Return a file's content; raise if it has more than ``most`` bytes."""
    name = f"the {what} {path}" if what else str(path)
    try:
        with open_regular(path) as file:
            raw = file.read(most + 1)
    except OSError as found:
        hint = "check the path and its permissions"
        raise error(f"cannot read {name}: {found.strerror or found}", hint) from found
    if len(raw) > most:
        raise error(
            f"{path} has more than {most} bytes, the limit for such a file", "check that it is the right file"
        )
    return raw


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError([f"it is not UTF-8: byte {error.start} is {raw[error.start]:#04x}"]) from error


def _refuse_costly(text: str) -> None:
    """Keep rule 2 by an upper estimate: every value begins with one of these characters."""
    if len(text) <= _SMALL_PEAK // 32:
        return
    dicts = text.count("{") * _DICT_BYTES
    cost = (
        text.count("[") * _LIST_BYTES
        + max(dicts, text.count(":") * _ENTRY_BYTES)  # a small dict has room for its entries
        + text.count('"') * _TEXT_BYTES // 2
        + text.count(",") * _NUMBER_BYTES
        + sys.getsizeof(text)
        - len(text)
    )
    most = _PEAK_FACTOR * len(text) + _SMALL_PEAK
    if cost + _WIDEST * len(text) > most:
        cost += _letters_cost(text)
    if cost > most:
        raise DocumentError(
            [f"its {len(text)} bytes would take {cost} in memory: more than {_PEAK_FACTOR} times as much"]
        )


def _letters_cost(text: str) -> int:
    """Return the bytes of a document's texts, each in its own width, beyond one for each letter."""
    if text.isascii() and "\\u" not in text:
        return 0
    cost = 0
    for found in _BETWEEN_QUOTES.finditer(text):
        part = found[0]
        if "\\u" in part:
            cost += (_WIDEST - 1) * len(part)
        elif not part.isascii():
            cost += max(sys.getsizeof(part) - _TEXT_HEAD - len(part), 0)
    return cost


def _refuse_half_pairs(value: Any) -> None:
    """Keep rule 1 for texts that JSON's escapes made, one by one: all together may be large."""
    open_values = [iter([value])]
    try:
        while open_values:
            one = next(open_values[-1], open_values)
            if one is open_values:
                open_values.pop()
            elif isinstance(one, str):
                one.encode()
            elif isinstance(one, dict):
                for name in one:
                    name.encode()
                open_values.append(iter(one.values()))
            elif isinstance(one, list):
                open_values.append(iter(one))
    except UnicodeEncodeError as error:
        raise DocumentError([f"it has half of a surrogate pair: {shown(error)}"]) from error


def _refuse_deep(value: Any) -> None:
    """Keep rule 3, level by level, without recursion."""
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise DocumentError([f"it is nested deeper than {MAX_DEPTH} levels"])
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]


def _refuse_many(root: yaml.Node | None) -> None:
    """Keep rules 1 to 3: aliases can mean more nodes and letters than any memory holds."""
    import yaml

    level, depth, count, whole = [root] if root is not None else [], 0, 0, set[int]()
    letters = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise DocumentError([f"it is nested deeper than {MAX_DEPTH} levels"])
        inner: list[yaml.Node] = []
        for node in level:
            if isinstance(node, yaml.MappingNode):
                inner += [one for pair in node.value for one in pair]
            elif isinstance(node, yaml.SequenceNode):
                inner += node.value
            else:
                letters += len(node.value)
                # Once, as aliases may mean one long text many times.
                if id(node) not in whole:
                    whole.add(id(node))
                    _refuse_half(node)
            if letters > MAX_YAML_BYTES:
                raise DocumentError([f"with its aliases it has more than {MAX_YAML_BYTES} letters"])
            if count + len(inner) > MAX_YAML_NODES:
                raise DocumentError([f"with its aliases it has more than {MAX_YAML_NODES} values"])
        count, level = count + len(inner), inner


def _refuse_half(node: yaml.Node) -> None:
    """Keep rule 1 for a text that YAML's escapes made."""
    try:
        str(node.value).encode()
    except UnicodeEncodeError as error:
        line = node.start_mark.line + 1
        raise DocumentError([f"line {line}: it has half of a surrogate pair: {shown(error)}"]) from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _whole(text: str) -> int:
    """Keep rule 6."""
    if len(text) > _SHORT and math.isinf(float(text)):
        raise ValueError(f"an integer of {len(text)} digits is too large for a float")
    return int(text)


def _finite_float(text: str) -> float:
    """Keep rule 6."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large for a float")
    return value
