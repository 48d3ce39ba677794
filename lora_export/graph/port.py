"""An input or output of a model, whatever the model is: an ONNX graph, an engine, one that is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from lora_export.untrusted.fields import AtLeast, Axes

if TYPE_CHECKING:
    import onnx_ir as ir

# TensorRT's own limit (``Dims::MAX_DIMS``), for ports that are read from records.
MAX_AXES = Axes(0, 8)
Dim = Annotated[int, AtLeast(-1)] | str | None


@dataclass(frozen=True)
class Port:
    """An input or output of a model.

    Attributes:
        name: Name in the model.
        dtype: Type as numpy and ml_dtypes call it: ``float16``, ``int64`` …, ``object`` for texts.
        dims: Size for each axis; where it varies its name, -1 or None.
    """

    name: str
    dtype: str
    dims: Annotated[tuple[Dim, ...], MAX_AXES]

    @classmethod
    def of(cls, value: ir.Value) -> Port:
        """Return the port of a graph's input or output: type ``""`` and no axes where the graph says none."""
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ())
        if value.dtype is None:
            return cls(str(value.name), "", dims)
        # numpy has no fixed type for texts.
        dtype = np.dtype(object if value.dtype.name == "STRING" else value.dtype.numpy())
        return cls(str(value.name), dtype.name, dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis; -1 where it varies."""
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.dims)

    @property
    def text(self) -> str:
        """Type and sizes for messages: ``int64 [batch, sequence]``."""
        return f"{self.dtype} [{', '.join('?' if dim in (None, -1) else str(dim) for dim in self.dims)}]"
