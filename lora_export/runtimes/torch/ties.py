"""Find choices of experts in which rounding alone may send a token to another expert.

A router takes the largest of its scores with `torch.topk`. If the last score that it takes and the first that
it leaves differ by less than the dtype's error there, either choice is right, but the two answers are far
apart. The rounding error of a run that happened to choose the same way doesn't show that. `record_choices`
records the scores, `near_ties` finds the calls with such tokens, and inside `turn_ties` they choose the other
way. Routers that take one expert with ``argmax`` are not recorded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# Standard deviation of a normal distribution, divided by the median of its absolute values.
_OF_MEDIAN = 1.4826


@dataclass(frozen=True)
class TopkCall:
    """One call of `torch.topk`.

    Attributes:
        scores: Scores of shape ``(…, n)``.
        count: Number of scores that it takes; less than n.
    """

    scores: torch.Tensor
    count: int

    def edge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices of the last taken and the first left score, each of shape ``(…, 1)``."""
        # Found with topk itself: only topk knows which of equal scores it takes.
        top = self.scores.topk(self.count, dim=-1).indices
        rest = self.scores.scatter(-1, top, -math.inf)
        return top[..., -1:], rest.argmax(-1, keepdim=True)

    def gap(self, edge: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the difference of the two scores at an edge, of shape ``(…, 1)``."""
        taken, left = edge
        return self.scores.gather(-1, taken) - self.scores.gather(-1, left)


@contextlib.contextmanager
def record_choices() -> Iterator[list[TopkCall]]:
    """Record the scores of every `torch.topk` along the last axis inside the block."""
    found: list[TopkCall] = []

    def record(choice: TopkCall) -> torch.Tensor:
        found.append(TopkCall(choice.scores.detach().double().clone(), choice.count))
        return choice.scores

    with _each_choice(record):
        yield found


@dataclass(frozen=True)
class TopkTies:
    """Choices that can't be told apart in a dtype.

    Attributes:
        gaps: For each call, the difference below which two scores are a tie.
        near: Number of choices that are a tie.
        of: Number of all choices.
    """

    gaps: tuple[float, ...]
    near: int
    of: int


def near_ties(reference: Sequence[TopkCall], lossy: Sequence[TopkCall], factor: float) -> TopkTies:
    """Return the ties found by comparing a run in a dtype with the exact run.

    Args:
        reference: Choices of the exact run.
        lossy: Choices of the run in the dtype, on the same feeds.
        factor: A gap is a tie if it is less than this many times the dtype's error of gaps.
    """
    gaps, near, of = [], 0, 0
    if [choice.scores.shape for choice in reference] != [choice.scores.shape for choice in lossy]:
        return TopkTies((), 0, 0)
    for exact, found in zip(reference, lossy, strict=True):
        edge = exact.edge()
        gap = exact.gap(edge)
        lost = _spread(found.gap(edge) - gap)
        gaps.append(factor * lost)
        near += int((gap < factor * lost).sum())
        of += gap.numel()
    return TopkTies(tuple(gaps), near, of)


def _spread(errors: torch.Tensor) -> float:
    """Return the standard deviation of most errors.

    It is estimated by the median, because a token that went to another expert one layer earlier has very
    different scores here.
    """
    finite = errors[errors.isfinite()].abs()
    return _OF_MEDIAN * finite.median().item() if finite.numel() else 0.0


@contextlib.contextmanager
def turn_ties(ties: TopkTies) -> Iterator[None]:
    """Make every choice that is a tie go the other way inside the block, for the same feeds."""
    import torch

    calls = iter(ties.gaps)

    def turn(choice: TopkCall) -> torch.Tensor:
        taken, left = edge = choice.edge()
        within = next(calls)
        near = choice.gap(edge) < within
        swapped = torch.where(near, left, taken), torch.where(near, taken, left)
        high, low = choice.scores.gather(-1, taken), choice.scores.gather(-1, left)
        # Equal scores must differ after the swap: the left one is lowered by as little as the dtype can show.
        fall = (low.abs() * 2 * torch.finfo(low.dtype).eps).clamp(min=within)
        low = torch.where(near, low - fall, low)
        return choice.scores.scatter(-1, swapped[0], high).scatter(-1, swapped[1], low)

    with _each_choice(turn):
        yield


@contextlib.contextmanager
def _each_choice(change: Any) -> Iterator[None]:
    """Call ``change`` with every choice; `torch.topk` then uses the scores that it returns."""
    import torch
    from torch.overrides import TorchFunctionMode

    def arguments(scores: Any, k: int, dim: int = -1, largest: bool = True, **_: Any) -> TopkCall | None:
        last = dim in (-1, scores.ndim - 1) and scores.is_floating_point()
        return TopkCall(scores, k) if last and largest and 0 < k < scores.shape[-1] else None

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
