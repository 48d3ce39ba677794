"""A flat list of texts as Python writes it, ``['', 'model', "it's"]``: what exporters put into metadata.

Not parsed as Python: a syntax tree takes a hundred times what is parsed, and deep ones end the interpreter.
"""

from __future__ import annotations

import ast
import re

# A module's path, and those of a pack of weights, are some hundred characters.
MAX_LENGTH = 1 << 16
_ITEM = re.compile(r"""\s*('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\s*(,|$)""")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def listed_texts(text: str | None, brackets: str = "[") -> list[str]:
    """Return the texts of a list; none where it is something else, or longer than `MAX_LENGTH`.

    Args:
        text: What was read.
        brackets: The opening ones of what counts: ``[`` a list, ``(`` a tuple, ``{`` a set.
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
        try:
            # One literal: for its escapes.
            found.append(str(ast.literal_eval(match[1])))
        except (SyntaxError, ValueError):
            return []
        at = match.end()
    return found


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written into a text; Python keeps odd bytes of it as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
