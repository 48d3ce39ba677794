"""Draw the parts of all plots in pages as SVG: axes, points, lines, bars and a frame.

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
# Between these limits a float can hold powers of ten and differences.
_SMALLEST, LARGEST = -300, 1e300


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Axis, which turns values into pixels.

    Attributes:
        low: Smallest value; if ``log``, its logarithm.
        high: Largest value; if ``log``, its logarithm.
        start: Pixel of ``low``.
        end: Pixel of ``high``.
        log: True if the axis is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a finite value; values outside, and zero on a log axis, are at the end."""
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
        """Return the label of a tick."""
        return f"1e{round(math.log10(value))}" if self.log else f"{value:.6g}"


def log_axis(values: Iterable[float], start: float, end: float) -> Axis | None:
    """Return an axis of whole powers of ten around all values with a logarithm; None if none has one."""
    powers = [math.log10(value) for value in values if 0 < value <= LARGEST]
    if not powers:
        return None
    low = max(math.floor(min(powers)), _SMALLEST)
    return Axis(low=low, high=max(math.ceil(max(powers)), low + 1), start=start, end=end, log=True)


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Return an axis around one or more values, with a small margin."""
    low, high = min(values), max(values)
    air = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low=low - air, high=high + air, start=start, end=end)


def frame(width: float, height: float, x: Axis | None, y: Axis, x_name: str, y_name: str) -> list[Markup]:
    """Return grid, labels of the ticks and names of the axes; without ``x`` no vertical grid."""
    right, bottom = width - RIGHT, height - BOTTOM
    parts = [element("rect", class_="frame", x=LEFT, y=TOP, width=right - LEFT, height=bottom - TOP)]
    for value in y.ticks():
        at = y.at(value)
        parts += [segment("grid", (LEFT, at), (right, at)), label(LEFT - 6, at + 4, y.label(value), "end")]
    for at, text in [(x.at(value), x.label(value)) for value in x.ticks()] if x is not None else []:
        parts += [segment("grid", (at, TOP), (at, bottom)), label(at, bottom + 16, text, "middle")]
    parts.append(label((LEFT + right) / 2, height - 8, x_name, anchor="middle", kind="axis"))
    middle = (TOP + bottom) / 2
    parts.append(
        label(14.0, middle, y_name, anchor="middle", kind="axis", turned=f"rotate(-90 14 {middle:.1f})")
    )
    return parts


def label(
    x: float, y: float, text: str, anchor: str = "start", kind: str = "tick", turned: str | None = None
) -> Markup:
    """Return a text of the picture."""
    return element("text", text, class_=kind, x=float(x), y=float(y), text_anchor=anchor, transform=turned)


def segment(kind: str, start: tuple[float, float], end: tuple[float, float]) -> Markup:
    """Return a straight line."""
    (x1, y1), (x2, y2) = start, end
    return element("line", class_=kind, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))


def bar(kind: str, x: float, y: float, width: float, height: float, title: str) -> Markup:
    """Return a filled rectangle with a title."""
    place = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    return element("rect", element("title", title), class_=kind, **place)


def dot(x: float, y: float, kind: str, title: str, radius: float = 4.0) -> Markup:
    """Return a round point with a title."""
    return element("circle", element("title", title), class_=kind, cx=float(x), cy=float(y), r=radius)


def cross(x: float, y: float, kind: str, title: str) -> Markup:
    """Return a point in the form of a ×, so that it differs from others not only by its colour."""
    strokes = "".join(f"M{x - 5:.1f} {y + way * 5:.1f}L{x + 5:.1f} {y - way * 5:.1f}" for way in (-1, 1))
    return element("path", element("title", title), class_=f"{kind} cross", d=Markup(strokes))


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
    """Return round points without titles, as one path: thousands of elements would make a page slow."""
    return element("path", class_=kind, d=Markup("".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)))


def drawing(
    width: float, height: float, words: str, parts: Iterable[Markup], kind: str | None = None
) -> Markup:
    """Return a picture.

    Args:
        width: Width in the picture's own unit; the page scales it.
        height: Height in the same unit.
        words: Description for people who can't see the picture.
        parts: Elements of the picture, the first at the back.
        kind: Class of the page's CSS.
    """
    size = f"0 0 {width:g} {height:g}"
    return element("svg", joined(parts), viewBox=size, class_=kind, role="img", aria_label=words)


def figure(
    width: float, height: float, words: str, parts: Iterable[Markup], caption: object, missing: int = 0
) -> Markup:
    """Return a picture with its caption.

    Args:
        width: Width in the picture's own unit; the page scales it.
        height: Height in the same unit.
        words: Description for people who can't see the picture.
        parts: Elements of the picture, the first at the back.
        caption: Text below the picture.
        missing: Number of points that are not drawn.
    """
    left_out = f" Not drawn, because not finite: {missing}." if missing else ""
    return element(
        "figure",
        drawing(width, height, words + left_out, parts),
        element("figcaption", caption, left_out),
        style=f"max-width:{width:g}px",
    )
