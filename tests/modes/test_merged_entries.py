"""Entries of what was merged into a graph: found in linear time, as a regular expression finds them."""

from __future__ import annotations

import re
import time

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_export.base.history.history import History
from lora_export.base.history.in_graph import not_in

ENTRY = re.compile(r"(?:^|; )(.+?) sha256=(\S*) weight=")
PIECES = st.lists(st.sampled_from(["; ", "a", " sha256=", "b", " weight=", "1", " ", ";"]), max_size=14)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=PIECES.map("".join))
@example("a sha256=b weight=1; c sha256=d weight=?; e; f sha256=g weight=2 part=h")
def test_names_are_those_of_the_entries(text: str) -> None:
    assert not_in(text, History()) == [f"'{name}'" for name, _ in ENTRY.findall(text)]


def test_separators_alone_take_no_time() -> None:
    started = time.process_time()
    for text in ("; " * 200_000, "a sha256=" * 200_000, "a sha256=b weight=" + "; " * 200_000):
        not_in(text, History())
    assert time.process_time() - started < 3
