"""Plot a `ParityReport` as inline SVG: error by module, error against effect, values against values.

NaN and infinite values are not drawn, but counted in the caption.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from lora_export.parity.result import Localisation, OutputMetrics, ParityReport, Scatter
from lora_export.reports.markup import Markup, element, joined
from lora_export.reports.parity.words import number, plural
from lora_export.reports.svg import (
    BOTTOM,
    LARGEST,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    cross,
    curve,
    dot,
    figure,
    frame,
    label,
    linear_axis,
    log_axis,
    points,
    segment,
)

# The number of a layer in a module's path.
_LAYER = re.compile(r"\.(\d+)\.")
_LAYERS_NAMED = 24


class _Line(NamedTuple):
    field: str
    kind: str
    title: str


_LINES = (
    _Line("effect", "effect", "effect of the adapter"),
    _Line("own_out", "own", "PyTorch’s own error"),
    _Line("error_out", "error", "error of the candidate"),
)


def error_by_module(found: Localisation) -> Markup:
    """Return a plot of the error along the computation, module by module; "" if there is nothing to draw."""
    width, height = 1000.0, 340.0
    rows = found.rows
    values = [getattr(row, line.field) for row in rows for line in _LINES]
    y = log_axis(values, height - BOTTOM, TOP)
    if y is None:
        return Markup()
    x = Axis(low=-0.5, high=len(rows) - 0.5, start=LEFT, end=width - RIGHT)
    parts = [
        *frame(
            width,
            height,
            x=None,
            y=y,
            x_name="layers and their modules, in the order of the computation",
            y_name="relative",
        )
    ]
    parts += _layers(found, x, height - BOTTOM)
    parts += _culprit(found, x, height - BOTTOM)
    for line in _LINES:
        parts += _line(found, line, x, y)
    where = f"begins at {found.module}" if found.module else "jumps nowhere"
    words = f"Relative error of {plural(len(rows), 'module')} in the order of the computation; it {where}."
    legend = [
        element("span", element("i", class_=line.kind), line.title, " ", class_="key")
        for line in reversed(_LINES)
    ]
    missing = sum(not math.isfinite(row.error_out) for row in rows)
    caption = joined([*legend, "One point for each module."])
    return figure(width, height, words=words, parts=parts, caption=caption, missing=missing)


def error_against_effect(report: ParityReport) -> Markup:
    """Return a plot of error against effect for every state and output; "" if no adapter has an effect.

    On the diagonal the error is as large as the effect, as for an adapter that is not applied.
    """
    size = 480.0
    rows = [row for row in report.metrics if row.effect is not None]
    drawn = [(row, row.effect) for row in rows if row.effect and _has_place(row.effect, row.relative)]
    x = log_axis((effect for _, effect in drawn), LEFT, size - RIGHT)
    # Without the applied share, which is not a slope here.
    judged = [v for v in report.verdicts if (v.kind, v.name) == ("effect", "error / effect")]
    limits = {v.limit for v in judged if 0 < v.limit < LARGEST}
    # The diagonal and the limit are visible, whatever the errors are.
    ends = [effect * times for _, effect in drawn for times in (1.0, min(limits, default=1.0))]
    y = log_axis([*(row.relative for row, _ in drawn), *ends], size - BOTTOM, TOP)
    if x is None or y is None:
        return Markup()
    parts = frame(size, size, x=x, y=y, x_name="effect of the adapter", y_name="error")
    parts += _ratio(x, y, ratio=1.0, kind="diagonal", text="error = effect: not applied")
    if limits:
        name = "limit" if len(limits) == 1 else "strictest limit"
        text = f"{name}: {number(min(limits))} × effect"
        parts += _ratio(x, y, ratio=min(limits), kind="limit", text=text)
    failed = {(verdict.state, verdict.output) for verdict in report.failed}
    for row, effect in sorted(drawn, key=lambda pair: _key(pair[0]) in failed):
        bad = _key(row) in failed
        title = f"{row.state}, {row.output}: error {number(row.relative)}, effect {number(effect)}"
        draw, kind = (cross, "bad") if bad else (dot, "error")
        parts.append(draw(x.at(effect), y.at(row.relative), kind, title + (", FAILED" if bad else "")))
    count = sum(_key(row) in failed for row, _ in drawn)
    words = f"Error against effect of {plural(len(drawn), 'output')}, {count} of them failed."
    caption = "Error against effect: a point for each adapter and output; those that failed are a ×."
    return figure(size, size, words=words, parts=parts, caption=caption, missing=len(rows) - len(drawn))


def value_scatter(found: Scatter) -> Markup:
    """Return a plot of one output's values, reference against candidate; "" if none is finite."""
    size = 480.0
    pairs = list(zip(found.reference, found.candidate, strict=False))
    drawn = [pair for pair in pairs if all(abs(value) <= LARGEST for value in pair)]
    if not drawn:
        return Markup()
    values = [value for pair in drawn for value in pair]
    x, y = linear_axis(values, LEFT, size - RIGHT), linear_axis(values, size - BOTTOM, TOP)
    parts = frame(size, size, x=x, y=y, x_name="reference", y_name="candidate")
    parts.append(segment("diagonal", (x.at(x.low), y.at(y.low)), (x.at(x.high), y.at(y.high))))
    parts.append(points("points", ((x.at(wanted), y.at(seen)) for wanted, seen in drawn)))
    title = f"{found.state}, {found.output}"
    words = f"{title}: {plural(len(drawn), 'value')} of the candidate against the reference's."
    caption = f"{title}: {plural(len(drawn), 'value')}; on the line both are equal."
    return figure(size, size, words=words, parts=parts, caption=caption, missing=len(pairs) - len(drawn))


def _key(row: OutputMetrics) -> tuple[str, str]:
    return row.state, row.output


def _has_place(*values: float) -> bool:
    return all(0 <= value <= LARGEST for value in values)


def _line(found: Localisation, line: _Line, x: Axis, y: Axis) -> Iterator[Markup]:
    """Yield one line through all modules and its points."""
    values = [getattr(row, line.field) for row in found.rows]
    places = [(x.at(i), y.at(value)) if _has_place(value) else None for i, value in enumerate(values)]
    yield curve(line.kind, places)
    for row, value, point in zip(found.rows, values, places, strict=True):
        if point is None:
            continue
        title = f"{row.module}: {line.title} {number(value)}"
        if line.field != "error_out":
            yield dot(*point, line.kind, title, 2.0)
        elif row.jumped or row.module == found.module:
            yield cross(*point, "bad", f"{title}, of its input {number(row.error_in)}; it jumps here")
        else:
            yield dot(*point, line.kind, f"{title}, of its input {number(row.error_in)}", 3.5)


def _layers(found: Localisation, x: Axis, bottom: float) -> Iterator[Markup]:
    """Yield a line and the number at the beginning of each layer, or of every n-th if there are many."""
    starts: list[tuple[int, str]] = []
    for i, row in enumerate(found.rows):
        layer = _LAYER.search(row.module)
        if layer is not None and (not starts or starts[-1][1] != layer[1]):
            starts.append((i, layer[1]))
    step = max(1, math.ceil(len(starts) / _LAYERS_NAMED))
    for i, number_of_layer in starts[::step]:
        at = x.at(i - 0.5)
        yield segment("grid", (at, TOP), (at, bottom))
        yield label(at + 3, bottom + 16, number_of_layer)


def _culprit(found: Localisation, x: Axis, bottom: float) -> Iterator[Markup]:
    """Yield a line and the module's name where the error begins."""
    for i, row in enumerate(found.rows):
        if row.module == found.module:
            at, right = x.at(i), i > len(found.rows) / 2
            yield segment("culprit", (at, TOP), (at, bottom))
            yield label(
                at + (-8 if right else 8),
                TOP + 16,
                row.module,
                anchor="end" if right else "start",
                kind="culprit",
            )


def _ratio(x: Axis, y: Axis, ratio: float, kind: str, text: str) -> Iterator[Markup]:
    """Yield the line error = ratio × effect within the plot, and its name at the upper end."""
    shift = math.log10(ratio)
    low, high = max(x.low, y.low - shift), min(x.high, y.high - shift)
    if low < high:
        ends = [(_pixel(x, power), _pixel(y, power + shift)) for power in (low, high)]
        yield segment(kind, *ends)
        # The text is left of the line at its own height, so that the line does not run through it.
        (left, bottom), (right, top) = ends
        height = 14
        yield label(
            right - height * (right - left) / (bottom - top) - 8, top + height, text, anchor="end", kind=kind
        )


def _pixel(axis: Axis, power: float) -> float:
    return axis.start + (power - axis.low) / (axis.high - axis.low) * (axis.end - axis.start)
