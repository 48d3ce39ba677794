"""Whole numbers of the command line: Python's have any length, those of numpy and our records 64 bits."""

from __future__ import annotations

from typing import Any

import click

LARGEST = 2**63 - 1


class Whole(click.types.IntParamType):
    """A whole number of the command line that our records hold."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """Return the number; fail if it is not one, or too large."""
        return _not_too_large(self, super().convert(value, parameter, context), parameter, context)


class WholeNumber(click.IntRange):
    """A whole number with a lower bound that our records hold."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """Return the number; fail if it is not one, too small or too large."""
        return _not_too_large(self, super().convert(value, parameter, context), parameter, context)


def _not_too_large(
    kind: click.ParamType[Any], number: int, parameter: click.Parameter | None, context: click.Context | None
) -> int:
    if abs(number) > LARGEST:
        kind.fail(f"it has more than 64 bits; the largest is {LARGEST}", parameter, context)
    return number
