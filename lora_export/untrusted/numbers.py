"""Read numbers that strangers' files hold as text: in ASCII digits, as their writers print them.

Python's ``int`` and ``float`` also take the digits of every script, underscores, signs and spaces
(``" +1_0"``), which other readers of the same file take for something else, or for nothing.
"""

from __future__ import annotations

import re

# Eighteen nines are less than 2**63, which other readers compute with.
_WHOLE = re.compile(r"[0-9]{1,18}", re.ASCII)
_DECIMAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?", re.ASCII)
_LONGEST = 400


def whole_number(text: str) -> int | None:
    """Return a whole number of at most eighteen digits; None for any other text."""
    return int(text) if _WHOLE.fullmatch(text) else None


def decimal_number(text: str) -> float | None:
    """Return a number such as ``16``, ``0.5`` or ``1e-3``; None for another text, ``nan`` or ``inf``."""
    return float(text) if len(text) <= _LONGEST and _DECIMAL.fullmatch(text) else None
