"""Choices of experts: where rounding alone may send a token to another one.

A router takes the largest of its scores with `torch.topk`. Where the last that it takes and the first that it
leaves are nearer than what a dtype loses there, either choice is right, and the two answers are far apart: a
step, which the rounding error of a run that happened to choose alike tells nothing of. `record_choices` keeps
what was chosen among, `near_ties` finds the calls with such tokens, and inside `turn_ties` they choose the
other way. Routers that take one expert with ``argmax`` are not seen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# A normal distribution's standard deviation, in medians of its absolute values.
_OF_MEDIAN = 1.4826


@dataclass(frozen=True)
class Choice:
    """One call of `torch.topk`.

    Attributes:
        scores: ``(…, n)``.
        count: How many it takes; fewer than n.
    """

    scores: torch.Tensor
    count: int

    def edge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the last that is taken and the first that is left are, ``(…, 1)`` each."""
        # By topk itself: of equal scores only it knows which it takes.
        top = self.scores.topk(self.count, dim=-1).indices
        rest = self.scores.scatter(-1, top, -math.inf)
        return top[..., -1:], rest.argmax(-1, keepdim=True)

    def gap(self, edge: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return how far the score at the one is above that at the other, ``(…, 1)``."""
        taken, left = edge
        return self.scores.gather(-1, taken) - self.scores.gather(-1, left)


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Record what every `torch.topk` along the last axis chooses among inside."""
    found: list[Choice] = []

    def record(choice: Choice) -> torch.Tensor:
        found.append(Choice(choice.scores.detach().double().clone(), choice.count))
        return choice.scores

    with _each_choice(record):
        yield found


@dataclass(frozen=True)
class Ties:
    """What can't be told apart in a dtype.

    Attributes:
        gaps: Call by call: scores that are nearer are a tie.
        near: How many choices are a tie.
        of: How many choices there are.
    """

    gaps: tuple[float, ...]
    near: int
    of: int


def near_ties(right: Sequence[Choice], own: Sequence[Choice], factor: float) -> Ties:
    """Compare a run in a dtype with the right one.

    Args:
        right: Its choices.
        own: Those of the run in the dtype, on the same feeds.
        factor: A gap is a tie where it is less than so many times what the dtype loses of gaps.
    """
    gaps, near, of = [], 0, 0
    if [choice.scores.shape for choice in right] != [choice.scores.shape for choice in own]:
        return Ties((), 0, 0)
    for exact, found in zip(right, own, strict=True):
        edge = exact.edge()
        gap = exact.gap(edge)
        lost = _spread(found.gap(edge) - gap)
        gaps.append(factor * lost)
        near += int((gap < factor * lost).sum())
        of += gap.numel()
    return Ties(tuple(gaps), near, of)


def _spread(errors: torch.Tensor) -> float:
    """Return the standard deviation of most of them.

    By the median, because a token that went to another expert one layer earlier has quite other scores here.
    """
    finite = errors[errors.isfinite()].abs()
    return _OF_MEDIAN * finite.median().item() if finite.numel() else 0.0


@contextlib.contextmanager
def turn_ties(ties: Ties) -> Iterator[None]:
    """Let every choice that is a tie go the other way inside; for the same feeds."""
    import torch

    calls = iter(ties.gaps)

    def turn(choice: Choice) -> torch.Tensor:
        taken, left = edge = choice.edge()
        within = next(calls)
        near = choice.gap(edge) < within
        swapped = torch.where(near, left, taken), torch.where(near, taken, left)
        high, low = choice.scores.gather(-1, taken), choice.scores.gather(-1, left)
        # Equal ones are to be told apart: what is left falls by as much as the dtype can show.
        fall = (low.abs() * 2 * torch.finfo(low.dtype).eps).clamp(min=within)
        low = torch.where(near, low - fall, low)
        return choice.scores.scatter(-1, swapped[0], high).scatter(-1, swapped[1], low)

    with _each_choice(turn):
        yield


@contextlib.contextmanager
def _each_choice(change: Any) -> Iterator[None]:
    """Call ``change`` with every choice, which takes among what it returns."""
    import torch
    from torch.overrides import TorchFunctionMode

    def arguments(scores: Any, k: int, dim: int = -1, largest: bool = True, **_: Any) -> Choice | None:
        last = dim in (-1, scores.ndim - 1) and scores.is_floating_point()
        return Choice(scores, k) if last and largest and 0 < k < scores.shape[-1] else None

    class Watch(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for it
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = dict(kwargs or {})
            if func in (torch.topk, torch.Tensor.topk):
                scores, *rest = (named.pop("input"),) if "input" in named else args
                choice = arguments(scores, *rest, **named)
                args = (scores if choice is None else change(choice), *rest)
            return func(*args, **named)

    with Watch():
        yield
