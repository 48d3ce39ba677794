"""Build HTML and SVG from elements: content is text unless an element made it.

Reports escape only here, so that no name of a tensor, node or file can become markup.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_export.untrusted.shown import safe


class Markup(str):
    """HTML or SVG: the result of `element` or `joined`, or text of ours that needs no escapes."""

    __slots__ = ()


# A break in the page's source; as text it would be written out.
LINE_END = Markup("\n")


def element(name: str, *content: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: Name of the tag.
        content: Parts of the element: `Markup` as it is, anything else as text.
        attributes: ``class_`` stands for ``class``, ``text_anchor`` for ``text-anchor``. Floats get one
            decimal; attributes that are None are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{joined(content)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """Join parts without anything between them."""
    return Markup("".join(map(_text, parts)))


def _text(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return f"{value:.1f}" if isinstance(value, float) else safe(value)
