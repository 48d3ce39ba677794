"""The record of what `quantize-onnx` did to a graph: which weights are codes now, and what that cost.

It is one entry of the graph's own metadata (`KEY`), a list with an entry for each time that the graph was
quantised: first all but the head to 4 bits, then the head to 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lora_export.errors import GraphError
from lora_export.untrusted.documents import json_of
from lora_export.untrusted.fields import Count, FieldError, Size, from_plain

KEY = "lora_export.quantised"
_AGAIN = "quantise the float graph again"
# Above any norm of float32 values; its square is a float as well.
_LARGEST = 1e50


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """One weight that is codes now.

    Attributes:
        name: Name of the float weight that was quantised.
        codes: Name of the codes.
        module: Path of a module that reads it; "" if the graph doesn't tell.
        relative: ‖dequantised − W‖ / ‖W‖.
        norm: ‖W‖.
    """

    name: str
    codes: str
    module: str
    relative: float
    norm: float


@dataclass(frozen=True, kw_only=True)
class QuantisedRecord:
    """The weights that one run of a quantiser made codes of.

    Attributes:
        to: ``int4`` or ``int8``.
        method: Quantiser.
        block_size: Number of values that share a scale.
        symmetric: True if there are no zero points.
        accuracy_level: MatMulNBits' attribute; 0 if it is not set.
        weights: The weights.
    """

    to: str
    method: str
    block_size: Size
    symmetric: bool
    accuracy_level: Count
    weights: tuple[QuantisedWeight, ...]

    @property
    def relative(self) -> float:
        """‖dequantised − W‖ / ‖W‖ of all weights together."""
        return pooled([self])

    @property
    def worst(self) -> QuantisedWeight | None:
        """The weight with the largest relative error."""
        return max(self.weights, key=lambda weight: (weight.relative, weight.name), default=None)

    @property
    def mean(self) -> float:
        """Mean of the weights' relative errors."""
        return math.fsum(weight.relative for weight in self.weights) / max(len(self.weights), 1)


def pooled(records: list[QuantisedRecord]) -> float:
    """Return ‖dequantised − W‖ / ‖W‖ of the weights of all records together."""
    weights = [weight for record in records for weight in record.weights]
    squared = math.fsum(weight.norm**2 for weight in weights)
    lost = math.fsum((weight.relative * weight.norm) ** 2 for weight in weights)
    return math.sqrt(lost / squared) if squared else 0.0


def quantised_in(metadata: Mapping[str, str]) -> list[QuantisedRecord]:
    """Return the records in a graph's metadata, the oldest first; none if it was not quantised by us.

    Args:
        metadata: ``metadata_props`` of an ONNX file, or ONNX Runtime's ``custom_metadata_map``.

    Raises:
        GraphError: The entry is damaged.
    """
    where = f"the graph's metadata entry {KEY!r}"
    listed = json_of(metadata.get(KEY, "[]"), where, GraphError, _AGAIN)
    if not isinstance(listed, list):
        raise GraphError(f"{where} is not a list", _AGAIN)
    try:
        records = [from_plain(QuantisedRecord, entry) for entry in listed]
    except FieldError as error:
        raise GraphError(f"{where} is damaged", _AGAIN, error.problems) from error
    weights = [weight for record in records for weight in record.weights]
    if not all(0 <= value < _LARGEST for weight in weights for value in (weight.relative, weight.norm)):
        raise GraphError(
            f"{where} is damaged", _AGAIN, [f"relative, norm: wanted numbers from 0 to {_LARGEST:g}"]
        )
    return records


def add_record(metadata: dict[str, str], record: QuantisedRecord) -> None:
    """Add the record of a run to a graph's metadata."""
    records = [*quantised_in(metadata), record]
    metadata[KEY] = json.dumps([asdict(one) for one in records], sort_keys=True, ensure_ascii=False)
