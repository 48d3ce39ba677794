"""What all plots of pages are made of: axes, points, lines, bars and a frame, as SVG.

Colours are classes of the page's CSS (`lora_export.reports.page`). Points have a ``title``, which browsers
show under the mouse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_export.reports.markup import Markup, element, joined

LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 14.0, 46.0
_TICKS = 7
# Between these, powers of ten and differences are numbers that a float holds.
_SMALLEST, LARGEST = -300, 1e300


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: values to pixels.

    Attributes:
        low: Smallest value, or its logarithm where ``log``.
        high: Largest value, the same.
        start: Pixel of ``low``.
        end: Pixel of ``high``.
        log: Whether the axis is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a finite value; what lies outside, and zero on a log axis, is at the end."""
        place = (math.log10(value) if value > 0 else self.low) if self.log else value
        part = (min(max(place, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return the values that get a label: powers of ten, or round numbers."""
        span = self.high - self.low
        if self.log:
            step = max(1, math.ceil(span / _TICKS))
            return [10.0**power for power in range(round(self.low), round(self.high) + 1, step)]
        unit = 10.0 ** math.floor(math.log10(span / _TICKS))
        step_size = next(unit * times for times in (1, 2, 5, 10, 20) if span / (unit * times) <= _TICKS)
        return [
            i * step_size
            for i in range(math.ceil(self.low / step_size), math.floor(self.high / step_size) + 1)
        ]

    def label(self, value: float) -> str:
        """Return what a tick is called."""
        return f"1e{round(math.log10(value))}" if self.log else f"{value:.6g}"


def log_axis(values: Iterable[float], start: float, end: float) -> Axis | None:
    """Return an axis of whole powers of ten around all that have a logarithm; None where none has."""
    powers = [math.log10(value) for value in values if 0 < value <= LARGEST]
    if not powers:
        return None
    low = max(math.floor(min(powers)), _SMALLEST)
    return Axis(low=low, high=max(math.ceil(max(powers)), low + 1), start=start, end=end, log=True)


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Return an axis around values, of which there is one at least, with a little air."""
    low, high = min(values), max(values)
    air = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low=low - air, high=high + air, start=start, end=end)


def frame(width: float, height: float, x: Axis | None, y: Axis, x_said: str, y_said: str) -> list[Markup]:
    """Return grid, labels of the ticks and names of the axes; without ``x`` no vertical ones."""
    right, bottom = width - RIGHT, height - BOTTOM
    parts = [element("rect", class_="frame", x=LEFT, y=TOP, width=right - LEFT, height=bottom - TOP)]
    for value in y.ticks():
        at = y.at(value)
        parts += [segment("grid", (LEFT, at), (right, at)), label(LEFT - 6, at + 4, y.label(value), "end")]
    for at, said in [(x.at(value), x.label(value)) for value in x.ticks()] if x is not None else []:
        parts += [segment("grid", (at, TOP), (at, bottom)), label(at, bottom + 16, said, "middle")]
    parts.append(label((LEFT + right) / 2, height - 8, x_said, anchor="middle", kind="axis"))
    middle = (TOP + bottom) / 2
    parts.append(
        label(14.0, middle, y_said, anchor="middle", kind="axis", turned=f"rotate(-90 14 {middle:.1f})")
    )
    return parts


def label(
    x: float, y: float, said: str, anchor: str = "start", kind: str = "tick", turned: str | None = None
) -> Markup:
    """Return a text of the picture."""
    return element("text", said, class_=kind, x=float(x), y=float(y), text_anchor=anchor, transform=turned)


def segment(kind: str, start: tuple[float, float], end: tuple[float, float]) -> Markup:
    """Return a straight line."""
    (x1, y1), (x2, y2) = start, end
    return element("line", class_=kind, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))


def bar(kind: str, x: float, y: float, width: float, height: float, said: str) -> Markup:
    """Return a filled rectangle that says what it is."""
    place = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    return element("rect", element("title", said), class_=kind, **place)


def dot(x: float, y: float, kind: str, said: str, radius: float = 4.0) -> Markup:
    """Return a round point that says what it is."""
    return element("circle", element("title", said), class_=kind, cx=float(x), cy=float(y), r=radius)


def cross(x: float, y: float, kind: str, said: str) -> Markup:
    """Return a point in the form of a ×, so that not only its colour tells it from others."""
    strokes = "".join(f"M{x - 5:.1f} {y + way * 5:.1f}L{x + 5:.1f} {y - way * 5:.1f}" for way in (-1, 1))
    return element("path", element("title", said), class_=f"{kind} cross", d=Markup(strokes))


def curve(kind: str, points: Iterable[tuple[float, float] | None]) -> Markup:
    """Return a line through points, with a gap at each None."""
    strokes, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
        else:
            strokes.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
            pen = "L"
    return element("path", class_=f"{kind} curve", d=Markup("".join(strokes))) if strokes else Markup()


def points(kind: str, places: Iterable[tuple[float, float]]) -> Markup:
    """Return round points without words; one path for all, as thousands of elements make a page slow."""
    return element("path", class_=kind, d=Markup("".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)))


def drawing(
    width: float, height: float, words: str, parts: Iterable[Markup], kind: str | None = None
) -> Markup:
    """Return a picture.

    Args:
        width: Size in the picture's own unit; the page scales it.
        height: The same.
        words: What it shows, for who can't see it.
        parts: What is drawn, the first at the back.
        kind: Class of the page's CSS.
    """
    size = f"0 0 {width:g} {height:g}"
    return element("svg", joined(parts), viewBox=size, class_=kind, role="img", aria_label=words)


def figure(
    width: float, height: float, words: str, parts: Iterable[Markup], caption: object, missing: int = 0
) -> Markup:
    """Return a picture with its caption.

    Args:
        width: Size in the picture's own unit; the page scales it.
        height: The same.
        words: What it shows, for who can't see it.
        parts: What is drawn, the first at the back.
        caption: What stands below.
        missing: How many points had no place.
    """
    left_out = f" Not drawn, because no finite number: {missing}." if missing else ""
    return element(
        "figure",
        drawing(width, height, words + left_out, parts),
        element("figcaption", caption, left_out),
        style=f"max-width:{width:g}px",
    )
