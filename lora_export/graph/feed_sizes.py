"""Limit the feeds that parity and bench make: a graph only claims the sizes of its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_VALUES = 1 << 29
# Numpy's own limit.
_MOST_AXES = 64


class FeedSizes:
    """Count of the values that are about to be made for the inputs of a graph."""

    def __init__(self) -> None:
        self._count = 0

    def problem(self, name: str, shape: Sequence[int]) -> str:
        """Return the rule that an input breaks, with those before it; "" if its values may be made.

        Args:
            name: Name of the input.
            shape: Shape that its values would have.
        """
        if len(shape) > _MOST_AXES:
            return f"{name} has {len(shape)} axes, at most {_MOST_AXES} are taken"
        sizes = " × ".join(map(str, shape))
        if min(shape, default=0) < 0:
            return f"{name} of {sizes} values has a size below 0"
        # An empty input may still have sizes that numpy does not multiply.
        self._count += math.prod(size or 1 for size in shape)
        if self._count > MOST_VALUES:
            return f"with {name} of {sizes} values the feeds would have more than {MOST_VALUES} values"
        return ""
