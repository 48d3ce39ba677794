"""What a terminal or a CI service would act on in a text."""

from __future__ import annotations

import re

from lora_export.untrusted.shown import MAX_LINE

ACTING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def is_harmless(text: str) -> bool:
    """Whether a text of several lines has nothing that a terminal or a CI service would act on."""
    lines = text.split("\n")
    return (
        not ACTING.search(text)
        and not any(line.strip().startswith("::") for line in lines)
        and not re.search(r"##(\w+)?\[", text)
        and sum(line.startswith("Error:") for line in lines) <= 1
        and not any(line.startswith("hint: rm") for line in lines)
        and max(map(len, lines)) < 4 * MAX_LINE
    )
