"""The record of how a captured graph was proven: an entry of its own metadata, JSON.

`PROOF_KEY` ``{"of": "twin", "error": 1.1e-06, "limit": 2e-06, "runs": 4}``, or ``{"of": "nothing", "reason":
…}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lora_export.errors import GraphError
from lora_export.untrusted.documents import json_of
from lora_export.untrusted.fields import FieldError, from_plain

PROOF_KEY = "lora_export.proof"
_AGAIN = "capture the checkpoint again"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Comparison of a graph with PyTorch before it was written.

    Attributes:
        of: ``model``: with its own weights; ``twin``: a small model of the same config, captured in the same
            way; ``nothing``: it was not compared.
        error: Largest difference, relative to the largest expected value of the output.
        limit: Largest one that rounding explains.
        runs: Number of inputs compared.
        dtype: Dtype in which the twin was captured.
        reason: Reason why nothing was compared.
    """

    of: Literal["model", "twin", "nothing"]
    error: float = 0.0
    limit: float = 0.0
    runs: int = 0
    dtype: str = ""
    reason: str = ""

    def to_metadata(self) -> dict[str, str]:
        """Return the entry of a graph's metadata."""
        if self.of == "nothing":
            return {PROOF_KEY: json.dumps({"of": self.of, "reason": self.reason}, sort_keys=True)}
        measured = {"of": self.of, "dtype": self.dtype, "runs": self.runs}
        # Two digits are enough to read, and the same on machines that round differently behind them.
        numbers = {name: float(f"{getattr(self, name):.1e}") for name in ("error", "limit")}
        return {PROOF_KEY: json.dumps(measured | numbers, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Proof | None:
        """Read the entry that `to_metadata` wrote; None if there is none.

        Raises:
            GraphError: The entry is damaged.
        """
        if PROOF_KEY not in metadata:
            return None
        entry = json_of(metadata[PROOF_KEY], f"the graph's metadata entry {PROOF_KEY!r}", GraphError, _AGAIN)
        try:
            return from_plain(cls, entry)
        except FieldError as error:
            raise GraphError("the graph's record of its proof is damaged", _AGAIN, error.problems) from error

    def __str__(self) -> str:
        if self.of == "nothing":
            return f"not compared with PyTorch: {self.reason}"
        what = f"compared with PyTorch in {self.dtype}"
        what = what if self.of == "model" else f"a small twin of it {what}"
        gap = f"a relative difference of {self.error:.1e}, at most {self.limit:.1e} wanted"
        return f"{what} on {self.runs} inputs: {gap}"
