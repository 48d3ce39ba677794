"""Read a flat list of strings as Python writes it, ``['', 'model', "it's"]``, from exporters' metadata.

It is not parsed as Python: a syntax tree takes a hundred times the memory, and deep ones crash the
interpreter.
"""

from __future__ import annotations

import ast
import re

# A module's path, and the paths of a pack of weights, are some hundred characters long.
MAX_LENGTH = 1 << 16
_ITEM = re.compile(r"""\s*('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\s*(,|$)""")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def listed_texts(text: str | None, brackets: str = "[") -> list[str]:
    """Return the strings of a list; none if it is something else, or longer than `MAX_LENGTH`.

    Args:
        text: The list as text.
        brackets: Accepted opening brackets: ``[`` for a list, ``(`` for a tuple, ``{`` for a set.
    """
    if text is None or len(text) > MAX_LENGTH:
        return []
    text = text.strip()
    if len(text) < 2 or text[0] not in brackets or text[-1] != _BRACKETS[text[0]]:
        return []
    inside, found, at = text[1:-1].rstrip(), list[str](), 0
    while at < len(inside):
        match = _ITEM.match(inside, at)
        if match is None:
            return []
        value = _value_of(match[1])
        if value is None:
            return []
        found.append(value)
        at = match.end()
    return found


def _value_of(literal: str) -> str | None:
    """Return the text of a literal; None if it is not valid Python."""
    # As nearly all are: a graph has thousands of them, and Python's parser takes five times as long.
    if literal.isprintable() and "\\" not in literal:
        return literal[1:-1]
    try:
        # A single literal is evaluated, for its escapes.
        return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return None


def is_utf8(name: str) -> bool:
    """Return whether a file's name can be written into a text: Python keeps odd bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
