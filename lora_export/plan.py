"""The plan: every tensor of an adapter, where it goes, what will happen to it and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NoReturn

from lora_export.errors import SiteError
from lora_export.untrusted.shown import MAX_CELL, shown

# Why something has no site; what to do about it hangs on this, never on the words of the reason.
RefusalKind = Literal[
    "not found",
    "shape",
    "ambiguous",
    # Two of one adapter would have one place or one name.
    "double",
    # Constants that bear no module's name may hold it.
    "nameless",
    # A name fits, and only the checkpoint can tell whether the values are the module's.
    "unproven",
    # They are not the checkpoint's.
    "values",
    # No output of the graph depends on it.
    "unused",
    # An adapter's branch stands beside it already.
    "contained",
    # The file doesn't say whether it is a Linear or an Embedding, and nothing else does.
    "kind",
    # Stored as codes of a quantiser: a branch may go beside, nothing can be merged.
    "quantised",
    # Computed in integers: neither a branch nor a merge.
    "integers",
    # The exporter has computed what the module gives.
    "computed",
    # A tool may have computed what one of its calls gives.
    "partly computed",
    # A constant holds some of its values, so that it answers a call with them.
    "picked",
    # An operator or a layout for which nothing is known.
    "operator",
    # A merge can do it, a branch can't.
    "merge only",
    # A branch can do it, a merge can't.
    "branch only",
    # The graph would need DoRA's factor.
    "dora",
    # Two names of one weight, which the model can't be given two weights for.
    "tied",
    # The graph has the parameter perhaps, but no LoRA inputs for its module.
    "not exposed",
    # More ranks than the graph takes, or than a slot of a bank has.
    "rank",
    "slot rank",
    # The factors of several modules that a bank needs apart.
    "mixed",
]


# How a place was proven: by names alone, by values too, by names because a quantiser's codes aren't compared;
# or it was added to the graph and had no values.
Proof = Literal["names", "values", "codes", "added"]


# Fields of a row that say what its other fields say in words.
_NOT_WRITTEN = frozenset({"kind", "proof", "trained_otherwise"})


@dataclass(frozen=True)
class Refusal:
    """A reason why something has no site.

    Attributes:
        kind: Kind of the reason, on which the hint depends.
        detail: The finding and its place.
        hint: Advice for this one, where more is known than the kind tells.
    """

    kind: RefusalKind
    detail: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """The plan for one parameter that an adapter changes.

    Attributes:
        adapter: Adapter's name.
        parameter: The changed parameter's path in the model.
        tensors: The adapter's tensors behind it.
        action: ``merge``, ``replace``, ``add to bias``, ``expose``, ``unchanged`` (the base holds the same
            values already) or ``refused``.
        place: Name of the stored weight(s).
        operator: Operators that read it, in a graph.
        layout: Layout of the canonical weight there: transposed, which rows of a fused weight, rescaled.
        reason: The evidence for the site, or the reason why there is none.
        kind: Kind of the refusal, where there is no site.
        proof: Evidence for a site in a graph, see `Proof`.
        trained_otherwise: True if trainers compute the module in another way than they merge it.
    """

    adapter: str
    parameter: str
    tensors: tuple[str, ...]
    action: str
    place: str = ""
    operator: str = ""
    layout: str = ""
    reason: str = ""
    kind: RefusalKind | None = None
    proof: Proof | None = None
    trained_otherwise: bool = False

    @classmethod
    def refused(cls, adapter: str, parameter: str, tensors: Sequence[str], refusal: Refusal) -> PlanRow:
        """Make the row of something without a site."""
        return cls(
            adapter=adapter,
            parameter=parameter,
            tensors=tuple(tensors),
            action="refused",
            reason=refusal.detail,
            kind=refusal.kind,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {key: value for key, value in asdict(self).items() if key not in _NOT_WRITTEN}


@dataclass(frozen=True)
class Plan:
    """The plan for everything that adapters change.

    Attributes:
        rows: One row for each parameter, in the order of the adapters' files.
        notes: Notes for the user.
        warnings: Notes that the user should not miss.
    """

    rows: tuple[PlanRow, ...] = ()
    notes: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    @property
    def refused(self) -> list[PlanRow]:
        """Rows without a site."""
        return [row for row in self.rows if row.action == "refused"]

    @property
    def placed(self) -> list[PlanRow]:
        """Rows with a site."""
        return [row for row in self.rows if row.action != "refused"]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rows = [row.as_dict() for row in self.rows]
        return {"rows": rows, "notes": list(self.notes), "warnings": list(self.warnings)}

    def summary(self, outputs: Iterable[object], dry_run: bool) -> list[str]:
        """Return the lines that ``print(report)`` prints of a mode's result.

        Args:
            outputs: Files that were written, or would be.
            dry_run: True if nothing was written.
        """
        counts = Counter(row.action for row in self.rows)
        done = ", ".join(f"{count} {action}" for action, count in counts.most_common())
        verb = "would write" if dry_run else "wrote"
        return [
            f"plan: {done or 'nothing to change'}",
            *(f"warning: {shown(warning)}" for warning in self.warnings),
            *(f"{verb} {shown(output)}" for output in outputs),
        ]

    def lines(self) -> list[str]:
        """Return the table as text lines, columns aligned."""
        head = ("parameter", "action", "place", "operator", "layout", "reason")
        table = [head, *(tuple(str(getattr(row, name)) for name in head) for row in self.rows)]
        return [*align(table), *self.notes]


def refuse(
    adapters: str,
    place: str,
    problems: Sequence[str],
    hints: Iterable[str],
    *,
    count: int,
    total: int,
    error: type[SiteError] = SiteError,
) -> NoReturn:
    """Raise `SiteError` for what has no site: all of it, and what to do.

    Args:
        adapters: The adapters' names, as the user knows them.
        place: The base that they were to go into.
        problems: A line for each, with its reason.
        hints: Advice; repeated hints are shown once.
        count: Number of parameters without a site.
        total: Number of all parameters.
        error: Class of the error.
    """
    message = f"{adapters} has {count} parameters with no place in {place} (of {total})"
    raise error(message, "; ".join(dict.fromkeys(hint for hint in hints if hint)), problems)


def align(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines with aligned columns; cells are cut where they are too long."""
    table = [[*(shown(cell, MAX_CELL) for cell in row[:-1]), shown(row[-1])] for row in table]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def unaccounted(file_tensors: Iterable[str], rows: Iterable[PlanRow]) -> list[str]:
    """Return the tensors of an adapter file that no row of the plan names."""
    named = {name for row in rows for name in row.tensors}
    return [name for name in file_tensors if name not in named]
