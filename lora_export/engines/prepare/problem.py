"""Problems that keep a graph from becoming an engine: all lines for the user, and how to fix each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.engines.backend import Compiler
from lora_export.errors import EngineBuildError
from lora_export.sites.node_text import node_text

# A model has the same problem in each of its layers: more examples would not help.
_EXAMPLES = 3


@dataclass(frozen=True)
class BuildProblem:
    """One thing that keeps a graph from being built.

    Attributes:
        text: The place and the problem.
        hint: How to fix it; the same sentence for problems with the same fix.
    """

    text: str
    hint: str = ""


def of_nodes(nodes: Sequence[ir.Node], reason: str, hint: str = "") -> Iterator[BuildProblem]:
    """Yield a line for each of the first nodes with the same problem, and the number of the rest."""
    return of_places([node_text(node) for node in nodes], reason, hint)


def of_places(places: Sequence[str], reason: str, hint: str = "") -> Iterator[BuildProblem]:
    """Yield a line for each of the first places with the same problem, and the number of the rest."""
    shown = len(places) if len(places) == _EXAMPLES + 1 else _EXAMPLES
    for place in places[:shown]:
        yield BuildProblem(f"{place}: {reason}", hint)
    if len(places) > shown:
        yield BuildProblem(f"… and {len(places) - shown} more: {reason}", hint)


def refuse_build(name: str, compiler: Compiler, problems: Iterable[BuildProblem]) -> None:
    """Raise `EngineBuildError` with all problems and each hint once; do nothing if there are none."""
    found = list(problems)
    if not found:
        return
    hints = dict.fromkeys(problem.hint for problem in found if problem.hint)
    raise EngineBuildError(
        f"{name} can't be built by {compiler.title} as it is",
        "; ".join(hints),
        [problem.text for problem in found],
    )
