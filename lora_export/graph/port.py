"""An input or output of a model, whatever the model is: an ONNX graph, an engine, one that is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lora_export.untrusted.fields import AtLeast, Axes

# TensorRT's own limit (``Dims::MAX_DIMS``), for ports that are read from records.
MAX_AXES = Axes(0, 8)
Dim = Annotated[int, AtLeast(-1)] | str | None


@dataclass(frozen=True)
class Port:
    """An input or output of a model.

    Attributes:
        name: Name in the model.
        dtype: Type as numpy and ml_dtypes call it: ``float16``, ``bfloat16``, ``int64`` …
        dims: Size for each axis; where it varies its name, -1 or None.
    """

    name: str
    dtype: str
    dims: Annotated[tuple[Dim, ...], MAX_AXES]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis; -1 where it varies."""
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.dims)

    @property
    def text(self) -> str:
        """Type and sizes for messages: ``int64 [batch, sequence]``."""
        return f"{self.dtype} [{', '.join('?' if dim in (None, -1) else str(dim) for dim in self.dims)}]"
