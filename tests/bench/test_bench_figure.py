"""The picture of a benchmark: what a stranger wrote is shown letter by letter."""

from html import unescape
from types import SimpleNamespace

import pytest

from lora_export.reports.bench.to_figure import report_png, report_svg

NAMES = ["$\\frac{$", "$x^2$", "a_$b_c$", "100 $", "$\\alpha$ $\\nothing{$"]


def report(name):
    """Return a report of two contenders in which every text is one name."""
    latency = SimpleNamespace(median_ms=1.0, p95_ms=2.0)
    ratio = SimpleNamespace(value=1.0, low=0.9, high=1.1)
    rows = [SimpleNamespace(contender=name, latency=latency, ratio=found) for found in (None, ratio)]
    table = SimpleNamespace(rows=rows, workload=SimpleNamespace(label=name))
    return SimpleNamespace(tables=[table], environment=SimpleNamespace(cpu=name), timed=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_dollar_is_no_formula(name):
    """What is between two is TeX to matplotlib, which fails where it is none."""
    pytest.importorskip("matplotlib")
    text = unescape(report_svg(report(name)).decode())
    # It writes each text that it draws by letters into a comment: of a formula, other letters.
    for drawn in (f"{name}; {name}", f"{name}: ms, median and p95", f"time compared with {name}, 95 %", name):
        assert f"<!-- {drawn}" in text
    assert report_png(report(name)).startswith(b"\x89PNG")


def test_a_long_line_above_all_plots_is_broken():
    pytest.importorskip("matplotlib")
    words = [f"w{number}" for number in range(100)]
    text = report_svg(report(" ".join(words))).decode()
    assert f"<!-- {' '.join(words)}; " not in text
    assert all(f"{word} " in text or f"{word}\n" in text for word in words)
