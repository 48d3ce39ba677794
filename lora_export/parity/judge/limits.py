"""Compute how large an error may be in a correct export, with the reason.

``auto`` limits are measured: PyTorch itself is run in the candidate's dtype on the same feeds, adapter
unmerged, and has an error against the reference in higher precision. The candidate's error may be `FACTOR`
times as large: it adds up in another order, and fuses operators. The cost of rounding W0 + ΔW by the merge's
manifest is added, times the adapter's effect (`ROUNDING_FACTOR`), but not more than rounding all weights to
their stored dtype can cost (`STEPS` of it), as the manifest comes from the candidate's maker.

Errors are pooled over the layers of a cache, because a single layer's figure depends on chance; a layer in
which PyTorch's error is larger than the pooled one may have `FACTOR` times that. On SmolLM2-135M in float32
the error of ONNX Runtime was up to 1.7 times PyTorch's in the pooled relative error, and up to 2.1 times in
the worst position pooled over layers and adapters, but 5.7 times in the worst position of one layer alone.

For a mixture of experts with tokens near a tie of their router, PyTorch is run once more with those tokens
choosing the other way; the difference is added, not multiplied (`TIES_FACTOR`).

For a graph that `quantize-onnx` made, what its codes lost by the graph's own metadata is added
(`CODES_FACTOR`), but not more than so many bits can lose (`CODES_MOST`), as the graph's maker wrote them.

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
# A candidate never has all ties at once; the cost of one depends on those before it.
TIES_FACTOR = 1.5
# Multiple of the dtype's step if PyTorch was not run: the sum over a few dozen layers.
STEPS = 32.0
STEP = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Errors of the weights of several layers add up: 2.1 to 4.4 times the weights' own on tiny models.
CODES_FACTOR = 5.0
# What codes change in an adapter's own contribution, in multiples of what they change in the outputs: it
# passes through all layers after it. On SmolLM2-135M it was 23 times the weights' loss for 8 bits, 12 for 4,
# on tiny models 3. Along the contribution, where its applied share is measured, it is less.
CODES_EFFECT = 6.0
# Rounding weights of Student's t distribution of 4 degrees, whose tails are heavy, in blocks of 128 loses
# 0.17 and 0.011 of their norm; normal ones in blocks of 32 lose 0.086 and 0.0053.
CODES_MOST = {"int4": 0.17, "int8": 0.012}
# Activations in 8 bits, one scale for each block of each token (MatMulNBits' accuracy_level 4).
ACTIVATIONS = 0.01
# Outputs of zeros have a relative error of 1, also at each position: limits stay well below that.
CEILING = 0.5
# If PyTorch's own worst position is that bad, the limit is up to `WORST_OVER` times PyTorch's.
WORST_CEILING = 0.9
WORST_OVER = 2.0
# An export with an error of this share of the adapter's effect no longer represents the adapter.
EFFECT_LIMIT = 0.1
# If the dtype's own error is larger, the limit follows it up to here; without the adapter the value is 1.
EFFECT_CEILING = 0.8
# Limits of |applied share − 1|.
APPLIED_LIMIT = 0.05
APPLIED_CEILING = 0.45


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The limits of a group of outputs in one state.

    Attributes:
        relative: Limit of the relative error.
        worst: Limit of the worst position's error.
        why: The reason for ``relative``.
        why_worst: The reason for ``worst``.
        each: Output → the limit of its relative error: a layer of a cache may have a larger error than all
            together.
        ties: Part of ``relative`` that is for ties of routers.
        norm: ‖reference‖ of the group, which ``relative`` is relative to.
        is_bounded: True if less rounding was allowed than the manifest states.
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
        """Return the limits for fewer positions with this ‖reference‖, of which a tie is a larger share."""
        more = self.ties * max(self.norm / norm - 1, 0.0) if norm else 0.0
        return replace(self, relative=min(self.relative + more, max(CEILING, self.relative)))

    def of(self, output: str) -> tuple[float, str]:
        """Return the limit of one output's relative error, and the reason."""
        alone = self.each.get(output, 0.0)
        if alone <= self.relative or math.isclose(alone, self.relative):
            return self.relative, self.why
        return min(alone, CEILING), f"{FACTOR:g} × PyTorch's own in {output}"


@dataclass(frozen=True)
class StatedRounding:
    """Cost of rounding by the merge's manifest.

    Attributes:
        relative: ‖round(W) − W‖ / ‖ΔW‖ over all modules.
        source: Name of the manifest.
        dtype: Type that most of the candidate's weights are stored in.
    """

    relative: float
    source: str
    dtype: str = "bfloat16"

    def cost(self, effect: float) -> tuple[float, bool]:
        """Return the addition to the limit of the relative error, and True if the manifest states more."""
        stated, most = ROUNDING_FACTOR * self.relative * effect, STEPS * STEP[self.dtype]
        return min(stated, most), stated > most


@dataclass(frozen=True)
class CodesLoss:
    """Loss by quantising, by the metadata of a graph that `quantize-onnx` made.

    Attributes:
        relative: ‖dequantised − W‖ / ‖W‖ over all quantised weights.
        to: The coarsest type of the codes.
        activations: True if activations may be rounded to 8 bits as well.
    """

    relative: float
    to: str
    activations: bool = False

    @property
    def cost(self) -> float:
        """The addition to the limit of the relative error."""
        weights = min(self.relative, CODES_MOST[self.to])
        return CODES_FACTOR * math.hypot(weights, ACTIVATIONS if self.activations else 0.0)

    def share(self, effect: float, switches: bool) -> float:
        """Return the addition to the limit of error / effect.

        Args:
            effect: ‖with − without‖ / ‖with‖.
            switches: True if the candidate can run without the adapter: only what the codes change in the
                adapter's own contribution is left then.
        """
        return self.cost if switches else self.cost / effect if effect > 0 else 0.0

    @property
    def why(self) -> str:
        """The reason for the addition."""
        most = f", at most {CODES_MOST[self.to]:g}" if self.relative > CODES_MOST[self.to] else ""
        activations = " and activations in 8 bits" if self.activations else ""
        return f"{CODES_FACTOR:g} × {self.to} codes' own {self.relative:.2g}{most}{activations}"


def pooled_own(tallies: Sequence[Tally]) -> tuple[float, float] | None:
    """Return PyTorch's relative error and its worst position over several outputs.

    Returns:
        (relative error, worst position), or None if PyTorch was not run or its outputs are not finite.
    """
    if any(tally.own is None or tally.own.infinite for tally in tallies):
        return None
    return pooled(tallies, [tally.own or Distance() for tally in tallies])


def pooled_ties(tallies: Sequence[Tally]) -> tuple[float, float]:
    """Return both for the run with ties of routers chosen the other way; 0 if there are no ties."""
    if all(tally.ties is None for tally in tallies):
        return 0.0, 0.0
    return pooled(tallies, [tally.ties or Distance() for tally in tallies])


def pooled(tallies: Sequence[Tally], distances: Sequence[Distance]) -> tuple[float, float]:
    """Return the relative error and the worst position of several outputs together."""
    squared = sum(distance.squared for distance in distances)
    norm = sum(tally.expected_squared for tally in tallies)
    worst = max(tally.worst(distance) for tally, distance in zip(tallies, distances, strict=True))
    return math.sqrt(squared / norm) if norm else math.sqrt(squared), worst


def limit_of(
    dtype: str,
    own: tuple[float, float] | None,
    worst_own: float | None,
    effect: float,
    rounding: StatedRounding | None,
    ties: tuple[float, float] = (0.0, 0.0),
    codes: CodesLoss | None = None,
) -> Limit:
    """Return the limits for a group of outputs.

    Args:
        dtype: Type of the candidate.
        own: `pooled_own` of the group in this state.
        worst_own: PyTorch's worst position over all states, as a single state's depends on chance.
        effect: ‖with − without‖ / ‖with‖ of the group.
        rounding: Cost of rounding by the merge's manifest.
        ties: `pooled_ties` of the group in this state.
        codes: Loss by quantising.
    """
    step = STEP[dtype]
    if own is None or worst_own is None:
        relative = STEPS * step
        why = f"{STEPS:g} × {step:.1e}, {dtype}'s step; no finite PyTorch run in {dtype} to compare with"
        worst, why_worst = WORST_FACTOR * relative, f"{WORST_FACTOR:g} × the limit of the relative error"
    else:
        found = max(own[0], step)
        relative = FACTOR * found
        source = f"PyTorch's own in {dtype}" if found == own[0] else f"{dtype}'s step"
        why = f"{FACTOR:g} × {source}, {found:.1e}"
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
    if codes is not None:
        further = WORST_FACTOR / FACTOR * codes.cost
        relative, worst = relative + codes.cost, worst + further
        why, why_worst = f"{why} + {codes.why}", f"{why_worst} + codes {further:.1e}"
    if relative > CEILING:
        relative, why = CEILING, f"{why}, but at most {CEILING:g}: more shows nothing, in whatever dtype"
    most = max(WORST_CEILING, WORST_OVER * (worst_own or 0.0), WORST_OVER * ties[1])
    if worst > most:
        worst, why_worst = most, f"{why_worst}, but at most {most:.2g}: a position without values is off by 1"
    return Limit(
        relative=relative,
        worst=worst,
        why=why,
        why_worst=why_worst,
        ties=TIES_FACTOR * ties[0],
        is_bounded=is_bounded,
    )


def effect_limit(
    dtype: str,
    own: float | None,
    effect: float,
    rounding: StatedRounding | None,
    ties: float = 0.0,
    codes: tuple[float, str] = (0.0, ""),
) -> tuple[float, str]:
    """Return the limit of error / effect, and the reason.

    Args:
        dtype: Type of the candidate.
        own: PyTorch's own error / effect in that dtype; None if it was not run.
        effect: ‖with − without‖ / ‖with‖.
        rounding: Cost of rounding by the merge's manifest.
        ties: Error / effect of the run with ties of routers chosen the other way.
        codes: `CodesLoss.share` and its reason; 0 without codes.
    """
    lost = own if own is not None else STEPS * STEP[dtype] / (2 * effect)
    limit, why = 2 * lost, f"2 × {'PyTorch’s own' if own is not None else 'the step’s'} {lost:.2g} in {dtype}"
    if rounding is not None and rounding.relative > 0 and effect > 0:
        limit += rounding.cost(effect)[0] / effect
        why += f" + {ROUNDING_FACTOR:g} × rounding {rounding.relative:.2g}"
    if ties:
        limit += TIES_FACTOR * ties
        why += f" + {TIES_FACTOR:g} × ties of routers {ties:.2g}"
    if codes[0]:
        limit, why = limit + codes[0], f"{why} + {codes[1]}"
    if limit <= EFFECT_LIMIT:
        return EFFECT_LIMIT, f"a tenth of the adapter's effect of {effect:.2g}"
    if limit > EFFECT_CEILING:
        return EFFECT_CEILING, f"{why}, but at most {EFFECT_CEILING:g}: it is 1 without the adapter"
    return limit, why


def applied_limit(
    dtype: str, own: float | None, ratio: float | None = None, codes: tuple[float, str] = (0.0, "")
) -> tuple[float, str]:
    """Return the limit of |share of the effect − 1|, and the reason.

    Args:
        dtype: Type of the candidate.
        own: PyTorch's own |share − 1| in that dtype; None if it was not run.
        ratio: PyTorch's own error / effect in that dtype: an upper bound of ``own`` on other feeds.
        codes: `CodesLoss.share` and its reason; 0 without codes.
    """
    limit = APPLIED_LIMIT if own is None else max(FACTOR * own, ratio or 0.0, own)
    if codes[0] > max(limit, APPLIED_LIMIT):
        return min(codes[0], APPLIED_CEILING), codes[1]
    if limit <= APPLIED_LIMIT:
        return APPLIED_LIMIT, "0 is all of the adapter's effect, 1 none of it"
    if limit > APPLIED_CEILING:
        return APPLIED_CEILING, f"PyTorch's own in {dtype} may be {limit:.2g}: little can be told"
    if limit == ratio:
        return limit, f"PyTorch's own error / effect in {dtype}"
    return limit, f"{FACTOR:g} × PyTorch's own in {dtype}, {own:.2g}"
