"""Write an `AdapterReport` as text: a table on a terminal, aligned columns elsewhere."""

from __future__ import annotations

import math

from lora_export.plan import align
from lora_export.reports.adapter.facts import AdapterReport, ModuleReport
from lora_export.untrusted.shown import MAX_CELL, limited, shown, shown_lines

HEADINGS = ("module", "weight", "rank", "alpha", "scaling", "dtype", "‖ΔW‖", "σ₁", "90 %", "99 %")
KIND_HEADINGS = ("modules", "number", "weight", "rank", "scaling", "dtype", "‖ΔW‖")
# Larger numbers of modules are listed by their kinds, unless --modules asks for each.
MAX_MODULES = 40
WORDS = 2  # number of columns, from the left, that are words
_DROPPED = ("dtype", "σ₁", "alpha", "99 %", "weight")  # in this order, on a narrow terminal


def module_label(row: ModuleReport) -> str:
    """Return a module's name, with its component if the file serves several models."""
    return f"{row.component}/{row.module}" if row.component else row.module


def heading_lines(report: AdapterReport) -> list[str]:
    """Return the lines above the table: the adapter's kind, origin and size."""
    lines = [
        f"adapter   {report.name}",
        f"format    {report.format}, {report.tuner}",
        f"sha256    {report.sha256}",
    ]
    if report.base_model:
        relation = "converted for" if report.converted else "trained   on"
        lines.append(f"{relation} {report.base_model}")
    if report.made_of:
        lines.append(f"made from {report.made_of}, sha256 {report.made_of_sha256 or 'unknown'}")
    size = (
        f"{report.parameters:,} parameters, {human_bytes(report.size_bytes)}, {len(report.modules)} modules"
    )
    lines.append(f"size      {size}")
    if report.base:
        share = [f"{human_bytes(report.base.size_bytes)}"]
        if report.base.parameters:
            share.insert(0, f"{report.base.parameters:,} parameters")
        lines.append(f"base      {', '.join(share)} ({report.base.path})")
        parts = [
            f"{value:.3%} of its {what}"
            for value, what in ((report.parameter_share, "parameters"), (report.size_share, "bytes"))
            if value is not None
        ]
        lines.append(f"share     {', '.join(parts)}")
    return lines


def rows(report: AdapterReport) -> list[tuple[str, ...]]:
    """Return the table's cells, one row for each module."""
    return [
        (
            module_label(row),
            _weight(row),
            str(row.rank),
            f"{row.alpha:g}",
            f"{row.scaling:.4g}",
            row.dtype,
            f"{row.norm:.4g}",
            f"{row.spectral_norm:.4g}",
            str(row.effective_rank_90),
            str(row.effective_rank_99),
        )
        for row in report.modules
    ]


def is_long(report: AdapterReport) -> bool:
    """Return True if the report lists kinds of modules instead of modules."""
    return len(report.modules) > MAX_MODULES


def kind_rows(report: AdapterReport) -> list[tuple[str, ...]]:
    """Return a row for all modules of one name, layout, rank and scaling: their number and joint ‖ΔW‖."""
    kinds: dict[tuple[str, ...], list[float]] = {}
    for row in report.modules:
        name = (
            f"{row.component}/…{row.module.rpartition('.')[2]}"
            if row.component
            else row.module.rpartition(".")[2]
        )
        key = (name, _weight(row), str(row.rank), f"{row.scaling:.4g}", row.dtype)
        kinds.setdefault(key, []).append(row.norm)
    return [
        (name, f"{len(norms)}", *others, f"{math.hypot(*norms):.4g}")
        for (name, *others), norms in kinds.items()
    ]


def _kinds(report: AdapterReport) -> list[str]:
    table = align(
        [KIND_HEADINGS, *(tuple(shown(cell, MAX_CELL) for cell in row) for row in kind_rows(report))]
    )
    total = math.hypot(*(row.norm for row in report.modules))
    return [*table, "", f"all modules: ‖ΔW‖ {total:.4g}; each of them: --modules"]


def closing_lines(report: AdapterReport, summed: bool = False) -> list[str]:
    """Return the lines below the table: replaced parameters, meaning of the columns, notes.

    Args:
        report: The report.
        summed: The table sums up modules, without the columns of single ones.
    """
    lines = [
        f"replaces  {extra.parameter} {'×'.join(map(str, extra.shape)) or 'scalar'} {extra.dtype}"
        for extra in report.extras
    ]
    if biases := [module_label(row) for row in report.modules if row.bias]:
        lines.append(f"biases    of {', '.join(biases)}")
    if report.modules:
        median = sorted(row.effective_rank_90 for row in report.modules)[len(report.modules) // 2]
        lines.append(
            f"median of all modules: {median} directions hold 90 % of ‖ΔW‖²"
            if summed
            else "σ₁: largest singular value; 90 %, 99 %: directions that hold that share of ‖ΔW‖² "
            f"(median of 90 %: {median})"
        )
    if any(row.dora for row in report.modules):
        lines.append(
            "DoRA: the figures are those of the low-rank part; the magnitude's share depends on the base"
        )
    return lines + limited([f"note: {note}" for note in report.notes], "notes")


def plain_lines(report: AdapterReport, modules: bool = False) -> list[str]:
    """Return the report as aligned columns without colours or boxes, for files and pipes.

    Args:
        report: The report.
        modules: List every module, regardless of their number.
    """
    if is_long(report) and not modules:
        return [*heading_lines(report), "", *_kinds(report), *closing_lines(report, summed=True)]
    table = [HEADINGS, *rows(report)]
    table = [tuple(shown(cell, MAX_CELL) for cell in row) for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < WORDS else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return [*heading_lines(report), "", *lines, "", *closing_lines(report)]


def report_text(report: AdapterReport) -> str:
    """Return the lines for a file, with control characters written out."""
    return "\n".join(shown_lines(plain_lines(report, modules=True))) + "\n"


def print_table(report: AdapterReport, modules: bool = False) -> None:
    """Print the report to the terminal with rich; see `plain_lines`."""
    from rich.console import Console
    from rich.table import Table

    # Without markup and emoji, because a name may hold brackets, or a word between colons.
    console = Console(highlight=False, markup=False, emoji=False)
    for line in heading_lines(report):
        console.print(shown(line))
    if is_long(report) and not modules:
        for line in ("", *_kinds(report), *(shown(line) for line in closing_lines(report, summed=True))):
            console.print(line)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    cells = [HEADINGS, *(tuple(shown(cell, MAX_CELL) for cell in row) for row in rows(report))]
    columns = _columns_that_fit(cells, console.width)
    for i in columns:
        table.add_column(
            HEADINGS[i], justify="left" if i < WORDS else "right", no_wrap=i > 0, overflow="fold"
        )
    for row in cells[1:]:
        table.add_row(*(row[i] for i in columns))
    console.print(table)
    for line in closing_lines(report):
        console.print(shown(line))


def _columns_that_fit(cells: list[tuple[str, ...]], width: int) -> list[int]:
    """Return the columns for a terminal: all, or fewer if all would fold the names."""
    shown = list(range(len(HEADINGS)))
    for heading in _DROPPED:
        if sum(max(len(row[i]) for row in cells) + 2 for i in shown) <= width + 2:
            break
        shown.remove(HEADINGS.index(heading))
    return shown


def human_bytes(size: int) -> str:
    """Return a size in the largest unit that leaves a number above one, powers of 1000."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def _weight(row: ModuleReport) -> str:
    shape = "×".join(map(str, row.weight_shape))
    extra = (
        f" ×{row.experts} experts" if row.experts > 1 else f" groups {row.groups}" if row.groups > 1 else ""
    )
    return f"{row.kind} {shape}{extra}"
