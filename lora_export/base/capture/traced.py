"""Hold the inputs, outputs and sizes with which a model is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Inputs, outputs and sizes with which a model is traced.

    Attributes:
        inputs: Example inputs.
        shapes: Their dynamic dimensions.
        output_names: Of the graph.
        input_names: Of the graph; None: as the parameters of ``forward``.
        has_cache: True if a decoder's key-value cache is among them.
    """

    inputs: Mapping[str, Any]
    shapes: Mapping[str, Any]
    output_names: list[str] | None
    input_names: list[str] | None = None
    has_cache: bool = False
