"""Draw pairs of plots side by side, one or several, as a PNG or SVG file with matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from lora_export.errors import BackendUnavailable, install_line

COLOUR, REFERENCE = "#4c72b0", "#777777"


def check_matplotlib() -> None:
    """Raise `BackendUnavailable` if pictures can't be drawn here."""
    if find_spec("matplotlib") is None:
        raise BackendUnavailable(
            "a .png or .svg picture needs matplotlib, which is not installed",
            f"{install_line('plot')}, or choose a name that ends in .html, which needs no package",
        )


def picture(file_format: str, rows: int, height: float, draw: Callable[[Any, Any], None]) -> bytes:
    """Return a picture; the same report gives the same bytes.

    Args:
        file_format: ``png`` or ``svg``.
        rows: Number of pairs of plots, one below the other.
        height: Height in inches; the width is 12.
        draw: Function that gets matplotlib's figure and its axes, ``(rows, 2)``.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("agg")
    # Ids are fixed and there is no date; a name with a dollar is not a formula.
    with matplotlib.rc_context({"svg.hashsalt": "lora-export", "text.parse_math": False}):
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(rows, 2, figsize=(12, height), squeeze=False, layout="constrained")
        draw(figure, axes)
        file = BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(file, format=file_format, dpi=130, metadata=metadata)
        pyplot.close(figure)
    return file.getvalue()
