"""Describe a graph's inputs and hold values for them.

An input's kind is told by its name and dtype, the meaning of its dimensions by `graph.roles`, so that parity
and an engine's profiles read a graph in the same way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.errors import GraphError
from lora_export.graph.captured import (
    BATCH,
    DECODER_SEQUENCE,
    PAST_SEQUENCE,
    SEQUENCE,
    SIDES,
    TOTAL_SEQUENCE,
)
from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.port import Port
from lora_export.graph.roles import role_of

InputKind = Literal[
    "ids", "types", "positions", "steps", "mask", "past", "bytes", "bools", "timestep", "values"
]
_PAST_NAME = re.compile(r"^past(_key_values|_key|_value|\b)")
# Operators that don't change ids.
_SAME_IDS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_LOOKUPS = {"Gather": "axis", "GatherBlockQuantized": "gather_axis"}
_TOKEN_KINDS = ("ids", "types", "positions", "mask")


@dataclass(frozen=True)
class InputPort(Port):
    """An input of a graph that a feed must have.

    Attributes:
        rows: For an index: number of rows of the table that the graph looks it up in, or None if unknown.
    """

    rows: int | None = None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Type of the values in a feed."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    @property
    def kind(self) -> InputKind | None:
        """Purpose of the input; None if neither name nor dtype tells it."""
        name, rank = self.name.lower(), len(self.dims)
        if _PAST_NAME.match(name):
            return "past" if rank == 4 and is_float(self.dtype) else None
        if "mask" in name:
            return "mask" if rank == 2 else None
        if "timestep" in name and self.dtype != "bool":
            return "timestep"
        if is_float(self.dtype):
            return "values"
        if self.dtype == "bool":
            return "bools"
        if self.dtype == "uint8":
            return "bytes"
        if not self.dtype.startswith(("int", "uint")):
            return None
        if "cache_position" in name:
            return "steps" if rank == 1 else None
        return _integer_kind(name) if rank == 2 else None

    def role(self, axis: int) -> str | None:
        """Return the role of an axis, with the names of `captured`, or None if nothing tells it."""
        dim = self.dims[axis]
        if self.kind == "past":
            # Not by the dimension's name: onnxruntime-genai calls the head's size kv_cache_dim.
            return {0: BATCH, 2: PAST_SEQUENCE}.get(axis)
        if self.kind == "steps":
            return SEQUENCE
        if isinstance(dim, int) and (len(self.dims) == 1 or (axis and self.kind not in _TOKEN_KINDS)):
            return None
        if axis == 1 and dim is not None and isinstance(dim, int):
            return self._side(SEQUENCE)
        found = str(dim) if dim in SIDES else role_of(self.name, self.dims, axis)
        if found is None and axis == 1 and self.kind in _TOKEN_KINDS:
            found = SEQUENCE
        return self._side(found, str(dim)) if found == SEQUENCE else found

    def _side(self, role: str, symbol: str = "") -> str:
        """Return the role of tokens: the decoder's role for tokens of a decoder after an encoder."""
        decoder = "decoder" in symbol or ("encoder" not in symbol and self.name.startswith("decoder_"))
        return DECODER_SEQUENCE if decoder else role


@dataclass(frozen=True, eq=False)
class Feed:
    """Values for all inputs of a graph except LoRA's.

    Attributes:
        label: Name in reports.
        values: Input name → values.
        shared: Inputs without a batch axis, which all rows share.
    """

    label: str
    values: Mapping[str, Array]
    shared: frozenset[str] = frozenset()

    @property
    def batch(self) -> int:
        """Number of rows."""
        for name in ("input_ids", "pixel_values", *self.values):
            if name in self.values and name not in self.shared:
                return int(self.values[name].shape[0])
        return 1

    @property
    def mask(self) -> Array | None:
        """True for each token of the logits that is not padding, bool ``[batch, sequence]``; None if unknown.

        Tokens of the past are left out. After an encoder the tokens are the decoder's: its own mask if the
        graph has one, otherwise None, as the encoder's mask does not cover them.
        """
        prefix = "decoder_" if "decoder_input_ids" in self.values else ""
        found = self.values.get(f"{prefix}attention_mask")
        if found is None or found.ndim != 2:
            return None
        ids = self.values.get(f"{prefix}input_ids")
        past = self.past if ids is None else found.shape[1] - ids.shape[1]
        current: Array = found[:, max(past, 0) :] != 0
        return current

    @property
    def past(self) -> int:
        """Number of past tokens in its key-value cache."""
        sizes = (v.shape[2] for name, v in self.values.items() if _PAST_NAME.match(name) and v.ndim == 4)
        return int(next(sizes, 0))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Input name → its sizes."""
        return {name: list(values.shape) for name, values in self.values.items()}

    @property
    def sha256(self) -> str:
        """Hash of names, dtypes, sizes and values."""
        found = hashlib.sha256()
        for name, values in sorted(self.values.items()):
            found.update(f"{name} {values.dtype} {values.shape}\n".encode())
            found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()


def ids_left(feeds: Sequence[Feed], ports: Sequence[InputPort], vocab_size: int | None) -> list[str]:
    """Return a line if some token ids are in no feed, as their rows of the embedding are never read.

    Args:
        feeds: All feeds.
        ports: The graph's inputs.
        vocab_size: Number of token ids; None: number of rows of the graph's table, if known.
    """
    if vocab_size is None:
        vocab_size = max((port.rows or 0 for port in ports if port.kind == "ids"), default=0) or None
    found = {
        int(token)
        for port in ports
        if port.kind == "ids"
        for feed in feeds
        for token in np.unique(feed.values[port.name])
    }
    if not found or vocab_size is None or len(found) >= vocab_size:
        return []
    return [
        f"{len(found):,} of {vocab_size:,} token ids occur in the inputs; an error only in other rows of an "
        "embedding does not show (more: --samples, --sequence)"
    ]


def rows_of(feed: Feed, indices: Sequence[int]) -> Feed:
    """Return a feed with some rows of another, in the given order; a row may occur more than once.

    Args:
        feed: Feed to take the rows from.
        indices: Numbers of the rows.
    """
    chosen = np.asarray(indices, np.int64)
    values = {name: v if name in feed.shared else v[chosen] for name, v in feed.values.items()}
    return Feed(f"{feed.label}, rows {','.join(map(str, chosen))}", values, feed.shared)


def shared_inputs(ports: Iterable[InputPort]) -> frozenset[str]:
    """Return the names of inputs whose first axis is not the batch."""
    return frozenset(port.name for port in ports if not port.dims or port.role(0) != BATCH)


def sizes_by_role(ports: Sequence[InputPort]) -> list[tuple[InputPort, int, str | None]]:
    """Return every axis of every input with its role.

    Returns:
        List of (input, axis, role). With a cache, a mask of a fixed length covers past and new tokens.
    """
    cached = any(port.kind == "past" for port in ports)
    found = []
    for port in ports:
        for axis, dim in enumerate(port.dims):
            role = port.role(axis)
            if cached and port.kind == "mask" and isinstance(dim, int) and role == SEQUENCE:
                role = TOTAL_SEQUENCE
            found.append((port, axis, role))
    return found


def ports_of_graph(file: GraphFile, exclude: Collection[str] = ()) -> list[InputPort]:
    """Return the inputs of an ONNX graph that a feed must have, in the graph's order.

    Args:
        file: The graph.
        exclude: Inputs to leave out: LoRA's. Inputs with a default are left out anyway.

    Raises:
        GraphError: Some of them are not tensors of a known rank.
    """
    graph = file.graph
    values = [v for v in graph.inputs if v.name not in exclude and v.name not in graph.initializers]
    problems = [
        f"{value.name}: {value.type or 'no type'}" + (" of unknown rank" if value.shape is None else "")
        for value in values
        if not isinstance(value.type, ir.TensorType) or value.shape is None
    ]
    if problems:
        raise GraphError(
            f"{file.path.name} has inputs that are not tensors of a known rank",
            "export it again with plain tensors as inputs",
            problems,
        )
    return [_port(value) for value in values]


def is_float(dtype: str) -> bool:
    """Return True if a dtype's name is that of a floating point type of numpy or `ml_dtypes`."""
    return dtype.startswith(("bfloat", "float"))


def _port(value: ir.Value) -> InputPort:
    port = Port.of(value)
    return InputPort(port.name, port.dtype, port.dims, _rows_looked_up(value))


def _rows_looked_up(value: ir.Value) -> int | None:
    """Return the number of rows of the smallest table that a value is an index of."""
    sizes, todo = [], [value]
    while todo:
        for node, position in todo.pop().uses():
            if node.op_type in _SAME_IDS and position == 0:
                todo.append(node.outputs[0])
            elif node.op_type in _LOOKUPS and position == 1:
                axis = node.attributes.get(_LOOKUPS[node.op_type])
                table = node.inputs[0]
                if table is not None and table.shape is not None and (axis is None or axis.as_int() == 0):
                    sizes += [rows for rows in table.shape[:1] if isinstance(rows, int)]
    return min(sizes, default=None)


def _integer_kind(name: str) -> InputKind | None:
    if "token_type" in name or "segment" in name:
        return "types"
    if "position" in name:
        return "positions"
    return "ids" if "ids" in name or "tokens" in name else None
