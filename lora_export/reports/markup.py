"""HTML and SVG made of elements: whatever is put into one is text, unless an element made it.

It is the one place where reports escape, so that no name of a tensor, node or file can become markup.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_export.untrusted.shown import safe


class Markup(str):
    """HTML or SVG: the result of `element` or `joined`, or text of ours that needs no escapes."""

    __slots__ = ()


# A break in the page's source: as a text it would be written out.
LINE_END = Markup("\n")


def element(name: str, *content: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: Name of the tag.
        content: What is in it: `Markup` as it is, anything else as text.
        attributes: ``class_`` stands for ``class``, ``text_anchor`` for ``text-anchor``. Floats get one digit
            behind the point; attributes that are None are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{joined(content)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """Return parts one after the other."""
    return Markup("".join(map(_text, parts)))


def _text(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return f"{value:.1f}" if isinstance(value, float) else safe(value)
