"""Numbers that are texts in strangers' files."""

import math
import re
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_export.untrusted.numbers import decimal_number, whole_number

TEXTS = st.text(
    st.one_of(st.sampled_from("0123456789+-_ .eE\n"), st.characters(categories=["Nd", "No"])), max_size=8
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=TEXTS)
@example(text="٣")
@example(text="1_0")
@example(text="1\n")
@example(text="²")
@example(text="")
def test_a_number_is_what_python_reads_in_plain_letters(text):
    """`int` and `float` say the value; which texts are plain is said letter by letter."""
    digits = bool(text) and set(text) <= set(string.digits)
    assert whole_number(text) == (int(text) if digits else None)
    plain = set(text) <= set(string.digits + ".eE+-") and not re.match(r"\+", text)
    try:
        expected = float(text) if plain else None
    except ValueError:
        expected = None
    assert decimal_number(text) == expected


@given(value=st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_python_prints_is_read(value):
    assert decimal_number(repr(value)) == value


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "infinity", "1" * 401, "0x10"])
def test_what_is_no_number(text):
    assert decimal_number(text) is None
    assert whole_number(text) is None


def test_long_numbers_end():
    assert whole_number("9" * 18) == 10**18 - 1 < 2**63
    assert whole_number("9" * 19) is None
    assert decimal_number("1e9999") == math.inf
