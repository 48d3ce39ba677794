"""How large an error may be before something is wrong with the export, and why.

``auto`` takes no number out of the air: PyTorch itself is run in the candidate's dtype on the same feeds,
adapter unmerged, and loses something against the reference in higher precision. The candidate may lose
`FACTOR` times as much: it adds up in another order, and fuses operators. To that comes what the merge's own
report says that rounding W0 + ΔW cost, times the adapter's effect (`ROUNDING_FACTOR`), but not more than
rounding all weights to the dtype that they are stored in can cost (`STEPS` of it): the report is the
candidate's own.

What is measured is pooled over the layers of a cache, because a single layer's figure is a matter of luck; a
layer in which PyTorch loses more than in all together may lose `FACTOR` times that. On
SmolLM2-135M in float32 ONNX Runtime lost up to 1.7 times what PyTorch lost in the pooled relative error, and
up to 2.1 times in the worst position pooled over layers and adapters, but 5.7 times in the worst position of
one layer alone.

Of a mixture of experts, PyTorch is run once more where tokens are near a tie of their router, with those
choosing the other way; what that costs is added, not multiplied (`TIES_FACTOR`).

Without a PyTorch run (the reference is a graph, or saved outputs) the limit is a multiple of the dtype's
step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_export.parity.judge.metrics import Distance, Tally

FACTOR = 4.0
WORST_FACTOR = 6.0
ROUNDING_FACTOR = 2.0
# All ties at once are more than what a candidate has; what one costs depends on those before it.
TIES_FACTOR = 1.5
# Of the step, where PyTorch was not run: what a few dozen layers add up to.
STEPS = 32.0
STEP = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Zeros in place of outputs have a relative error of 1, and 1 at each position: no limit comes near that.
CEILING = 0.5
# Where PyTorch's own worst position is that bad, it is up to `WORST_OVER` times what PyTorch has.
WORST_CEILING = 0.9
WORST_OVER = 2.0
# An export whose error is this share of the adapter's effect is not the adapter any more.
EFFECT_LIMIT = 0.1
# Where the dtype itself loses more, the limit follows it up to here: without the adapter it is above 1.
EFFECT_CEILING = 0.8
# Of |applied share − 1|.
APPLIED_LIMIT = 0.05
APPLIED_CEILING = 0.45


@dataclass(frozen=True)
class Limit:
    """The limits of a group of outputs in one state.

    Attributes:
        relative: Of the relative error.
        worst: Of the worst position's.
        why: Why ``relative`` is what it is.
        why_worst: Why ``worst`` is.
        each: Output → the limit of its relative error: a layer of a cache may lose more than all together.
        ties: What is in ``relative`` for ties of routers.
        norm: ‖reference‖ of the group, which ``relative`` is to.
        is_bounded: Of rounding less was taken than the manifest says.
    """

    relative: float
    worst: float
    why: str
    why_worst: str
    each: Mapping[str, float] = field(default_factory=dict)
    ties: float = 0.0
    norm: float = 0.0
    is_bounded: bool = False

    def over(self, norm: float) -> Limit:
        """Return the limits of fewer positions, of this ‖reference‖: a tie is a larger share of them."""
        more = self.ties * max(self.norm / norm - 1, 0.0) if norm else 0.0
        return replace(self, relative=min(self.relative + more, max(CEILING, self.relative)))

    def of(self, output: str) -> tuple[float, str]:
        """Return the limit of one output's relative error, and why."""
        alone = self.each.get(output, 0.0)
        if alone <= self.relative or math.isclose(alone, self.relative):
            return self.relative, self.why
        return min(alone, CEILING), f"{FACTOR:g} × PyTorch's own in {output}"


@dataclass(frozen=True)
class Rounding:
    """What the merge's manifest says of rounding.

    Attributes:
        relative: ‖round(W) − W‖ / ‖ΔW‖ over all modules.
        source: The manifest.
        dtype: What most of the candidate's weights are stored in.
    """

    relative: float
    source: str
    dtype: str = "bfloat16"

    def cost(self, effect: float) -> tuple[float, bool]:
        """Return what the limit of the relative error rises by, and whether that is less than is said."""
        said, most = ROUNDING_FACTOR * self.relative * effect, STEPS * STEP[self.dtype]
        return min(said, most), said > most


def pooled_own(tallies: Sequence[Tally]) -> tuple[float, float] | None:
    """Return PyTorch's relative error and its worst position over several outputs.

    Returns:
        None: It was not run, or what it computes in that dtype is not finite, so that nothing is known.
    """
    if any(tally.own is None or tally.own.infinite for tally in tallies):
        return None
    return pooled(tallies, [tally.own or Distance() for tally in tallies])


def pooled_ties(tallies: Sequence[Tally]) -> tuple[float, float]:
    """Return the same where ties of routers were chosen the other way; 0 where there were none."""
    if all(tally.ties is None for tally in tallies):
        return 0.0, 0.0
    return pooled(tallies, [tally.ties or Distance() for tally in tallies])


def pooled(tallies: Sequence[Tally], distances: Sequence[Distance]) -> tuple[float, float]:
    """Return the relative error and the worst position of several outputs together."""
    squared = sum(distance.squared for distance in distances)
    norm = sum(tally.wanted_squared for tally in tallies)
    worst = max(tally.worst(distance) for tally, distance in zip(tallies, distances, strict=True))
    return math.sqrt(squared / norm) if norm else math.sqrt(squared), worst


def limit_of(
    dtype: str,
    own: tuple[float, float] | None,
    worst_own: float | None,
    effect: float,
    rounding: Rounding | None,
    ties: tuple[float, float] = (0.0, 0.0),
) -> Limit:
    """Return the limits for a group of outputs.

    Args:
        dtype: The candidate's.
        own: `pooled_own` of the group in this state.
        worst_own: The worst position in any state: how bad the worst one is depends on luck.
        effect: ‖with − without‖ / ‖with‖ of the group.
        rounding: What the merge's manifest says.
        ties: `pooled_ties` of the group in this state.
    """
    step = STEP[dtype]
    if own is None or worst_own is None:
        relative = STEPS * step
        why = f"{STEPS:g} × {step:.1e}, {dtype}'s step; no finite PyTorch run in {dtype} to compare with"
        worst, why_worst = WORST_FACTOR * relative, f"{WORST_FACTOR:g} × the limit of the relative error"
    else:
        found = max(own[0], step)
        relative = FACTOR * found
        whose = f"PyTorch's own in {dtype}" if found == own[0] else f"{dtype}'s step"
        why = f"{FACTOR:g} × {whose}, {found:.1e}"
        found = max(worst_own, own[0], step)
        worst = WORST_FACTOR * found
        why_worst = f"{WORST_FACTOR:g} × PyTorch's own worst in {dtype}, {found:.1e}"
    is_bounded = False
    if rounding is not None and rounding.relative > 0 and effect > 0:
        more, is_bounded = rounding.cost(effect)
        relative, worst = relative + more, worst + WORST_FACTOR / FACTOR * more
        why += f" + {ROUNDING_FACTOR:g} × rounding {rounding.relative:.2g} × effect {effect:.2g}"
        why += f" (of which {more:.1e} is what {rounding.dtype} can lose)" * is_bounded
        why_worst += f" + rounding {WORST_FACTOR / FACTOR * more:.1e}"
    if ties[0]:
        relative, worst = relative + TIES_FACTOR * ties[0], worst + TIES_FACTOR * ties[1]
        why += f" + {TIES_FACTOR:g} × ties of routers {ties[0]:.1e}"
        why_worst += f" + {TIES_FACTOR:g} × ties of routers {ties[1]:.1e}"
    if relative > CEILING:
        relative, why = CEILING, f"{why}, but at most {CEILING:g}: more shows nothing, in whatever dtype"
    most = max(WORST_CEILING, WORST_OVER * (worst_own or 0.0), WORST_OVER * ties[1])
    if worst > most:
        worst, why_worst = most, f"{why_worst}, but at most {most:.2g}: a position without values is off by 1"
    return Limit(relative, worst, why, why_worst, ties=TIES_FACTOR * ties[0], is_bounded=is_bounded)


def effect_limit(
    dtype: str, own: float | None, effect: float, rounding: Rounding | None, ties: float = 0.0
) -> tuple[float, str]:
    """Return the limit of error / effect, and why.

    Args:
        dtype: The candidate's.
        own: PyTorch's own error / effect in that dtype.
        effect: ‖with − without‖ / ‖with‖.
        rounding: What the merge's manifest says.
        ties: Of routers, chosen the other way: error / effect.
    """
    lost = own if own is not None else STEPS * STEP[dtype] / (2 * effect)
    limit, why = 2 * lost, f"2 × {'PyTorch’s own' if own is not None else 'the step’s'} {lost:.2g} in {dtype}"
    if rounding is not None and rounding.relative > 0 and effect > 0:
        limit += rounding.cost(effect)[0] / effect
        why += f" + {ROUNDING_FACTOR:g} × rounding {rounding.relative:.2g}"
    if ties:
        limit += TIES_FACTOR * ties
        why += f" + {TIES_FACTOR:g} × ties of routers {ties:.2g}"
    if limit <= EFFECT_LIMIT:
        return EFFECT_LIMIT, f"a tenth of the adapter's effect of {effect:.2g}"
    if limit > EFFECT_CEILING:
        return EFFECT_CEILING, f"{why}, but at most {EFFECT_CEILING:g}: it is 1 without the adapter"
    return limit, why


def applied_limit(dtype: str, own: float | None, ratio: float | None = None) -> tuple[float, str]:
    """Return the limit of |share of the effect − 1|, and why.

    Args:
        dtype: The candidate's.
        own: PyTorch's own |share − 1| in that dtype.
        ratio: PyTorch's own error / effect in it: how large ``own`` might have been by bad luck.
    """
    limit = APPLIED_LIMIT if own is None else max(FACTOR * own, ratio or 0.0, own)
    if limit <= APPLIED_LIMIT:
        return APPLIED_LIMIT, "0 is all of the adapter's effect, 1 none of it"
    if limit > APPLIED_CEILING:
        return APPLIED_CEILING, f"PyTorch's own in {dtype} may be {limit:.2g}: little can be told"
    if limit == ratio:
        return limit, f"PyTorch's own error / effect in {dtype}"
    return limit, f"{FACTOR:g} × PyTorch's own in {dtype}, {own:.2g}"
