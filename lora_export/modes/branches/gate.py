"""Gate the two products of a bank: each row of the batch lets through the ranks of its adapters.

The gate is ``d · e`` with d = x·A_all ``(…, Σ ranks)`` and e the row's `adapter_weights`, each repeated over
its slot's ranks: a Gather along the slots, so that no slot's weight reaches another's ranks. e is computed
once for each sequence of ranks that modules have, usually once for the whole graph. Values of a slot that no
row uses are multiplied by 0: they must be finite (NaN is refused, and an A with which x·A may overflow).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lora_export.errors import SiteError
from lora_export.graph.exposed import WEIGHTS_INPUT, ExposedModule
from lora_export.graph.nodes import NodeWriter, model_names
from lora_export.graph.onnx_file import GraphFile
from lora_export.modes.branches.batch.follow import BatchRows
from lora_export.modes.branches.batch.rows import Rows

_INSTEAD = "train the adapters without this module, or change them between runs (lora-export swap-onnx)"

_IF_BATCH = "if that is the batch, give --batch-input"


class BankGate:
    """Gate that adds the input `WEIGHTS_INPUT` ``[batch, n_slots]`` and multiplies ranks by it.

    Args:
        graph: The graph.
        slots: Number of slots.
        shapes: Id of a value → its shape, if known.
        batch_input: Name of the input whose first axis is the batch; by default the first input with a free
            one.
        same_symbol: Give the weights' first axis the batch's symbol, for which TensorRT checks that the sizes
            are equal; else a node checks it, because ONNX Runtime doesn't.

    Raises:
        SiteError: The graph has no such input.
    """

    def __init__(
        self,
        graph: GraphFile,
        slots: int,
        shapes: Mapping[int, ir.Shape],
        batch_input: str | None = None,
        same_symbol: bool = False,
    ) -> None:
        self._shapes = shapes
        # Module → node after which its rows are not followed, if there is one.
        self._unverified: dict[str, str] = {}
        self._inputs = [value for value in graph.graph.inputs if value.shape]
        # Module → reason why its rows would get another row's adapter, and a hint.
        self._misplaced: dict[str, tuple[str, str]] = {}
        self._in_front: set[str] = set()
        self._modules: set[str] = set()
        self.batch_input = _batch_input(graph, batch_input)
        assert self.batch_input.shape is not None
        self.batch = self.batch_input.shape[0]
        self._flow = BatchRows(graph.graph, shapes, self.batch, self.batch_input)
        self._same_symbol = same_symbol
        self._other_axes = {
            str(size) for value in graph.graph.inputs if value.shape is not None for size in value.shape
        } - {str(self.batch)}
        self.first = next(iter(graph.graph))
        self._write = NodeWriter(model_names(graph.model))
        self._expanded: dict[tuple[tuple[int, ...], ir.DataType], ir.Value] = {}
        self._shaped: dict[tuple[int, str], ir.Value] = {}
        self._sizes: dict[int, ir.Value] = {}
        self.weights = ir.Value(
            name=WEIGHTS_INPUT,
            shape=ir.Shape([self.batch if same_symbol else f"{WEIGHTS_INPUT}.rows", slots]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.graph.inputs.append(self.weights)
        self._checked = self._check()
        self._cast = {ir.DataType.FLOAT: self._checked}

    def choose(
        self, write: NodeWriter, anchor: ir.Node, module: ExposedModule, down: ir.Value, x: ir.Value
    ) -> ir.Value:
        """Return ``down`` with each rank multiplied by its row's weight of the rank's slot."""
        ranks = _slots_of_ranks(module)
        dtype = down.dtype
        assert dtype is not None
        expanded = self._expand(ranks, dtype)
        name = f"{module.name}.lora.chosen"
        return self._combine(
            write,
            anchor,
            operator="Mul",
            module=module,
            value=down,
            of_row=expanded,
            count=len(ranks),
            x=x,
            name=name,
        )

    def add_bias(
        self,
        write: NodeWriter,
        anchor: ir.Node,
        module: ExposedModule,
        up: ir.Value,
        bias: ir.Value,
        width: int,
        x: ir.Value,
    ) -> ir.Value:
        """Return ``up`` plus each row's own mixture of the slots' biases ``[n_slots, width]``.

        The mixture is computed at the beginning of the graph, so the bias has to be there, too.
        """
        dtype = up.dtype
        assert dtype is not None
        name = f"{module.name}.lora.bias"
        mixed = write.add(self.first, "MatMul", [self._typed(dtype), bias], f"{name}_of_row", dtype=dtype)
        return self._combine(
            write, anchor, operator="Add", module=module, value=up, of_row=mixed, count=width, x=x, name=name
        )

    def _combine(
        self,
        write: NodeWriter,
        anchor: ir.Node,
        operator: str,
        module: ExposedModule,
        value: ir.Value,
        of_row: ir.Value,
        count: int,
        x: ir.Value,
        name: str,
    ) -> ir.Value:
        """Combine a value with ``of_row`` ``[batch, count]``, which has entries for each row of the batch."""
        dtype, shape = value.dtype, self._shapes.get(id(x))
        assert dtype is not None
        rows = self._flow.of(x)
        if rows is not None and rows.axis is None:
            self._refuse_moved(rows, module, x)
        self._refuse_either(module, x)
        self._modules.add(module.name)
        known = shape is not None and self._has_batch_in_front(shape, module)
        self._refuse_misplaced(rows, module, x)
        if known:
            self._in_front.add(module.name)
        # If the value has no rows, those of a batch in front are equal, so that none can be another's.
        if rows is None or rows.doubt:
            self._unverified.setdefault(module.name, rows.doubt if rows else self._flow.unknown(x))
        elif not (rows.in_front or (known and rows.axis is None)):
            self._unverified.setdefault(module.name, "")
        if module.kind == "conv":
            behind = [1 for _ in module.kernel]
            shaped = self._shape(of_row, f"{len(behind)} behind", [0, -1, *behind])
            return write.add(anchor, operator, [value, shaped], name, dtype=dtype)
        if shape is not None and known:
            axes = len(shape) + 1 if module.kind == "embedding" else len(shape)
            shaped = self._shape(of_row, f"{axes} before", [0, *(1 for _ in range(axes - 2)), count])
            return write.add(anchor, operator, [value, shaped], name, dtype=dtype)
        # For an activation (batch · sequence, in_dim), or one of unknown shape, the batch is outermost.
        shaped = self._shape(of_row, "3 before", [0, 1, count])
        cut = write.add(anchor, "Reshape", [value, self._rows(count)], f"{name}.rows", dtype=dtype)
        combined = write.add(anchor, operator, [cut, shaped], f"{name}.of_rows", dtype=dtype)
        back = write.add(anchor, "Shape", [value], f"{name}.shape", dtype=ir.DataType.INT64)
        return write.add(anchor, "Reshape", [combined, back], name, dtype=dtype)

    def refuse(self) -> None:
        """Raise `SiteError` for all modules whose rows would get another row's adapter.

        Raises:
            SiteError: There are such modules; all are listed.
        """
        if self._misplaced:
            hints = dict.fromkeys(hint for _, hint in self._misplaced.values())
            if (self._modules - set(self._misplaced)) | self._in_front:
                # With another input as the batch, calls that have this one in front would be misplaced.
                hints = dict.fromkeys(self._two_batches(hint) for hint in hints)
            raise SiteError(
                f"{len(self._misplaced)} modules read activations without the batch in front: a bank takes "
                "the batch's rows in their order, outermost along the first axis",
                "; ".join(hints),
                [reason for reason, _ in self._misplaced.values()],
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what could not be verified, because a row would silently get another row's adapter."""
        if not self._unverified:
            return ()
        names = list(self._unverified)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        behind = next(filter(None, self._unverified.values()), "")
        where = f" behind {behind}, which is not followed" if behind else ""
        return (
            f"{names[0]}{more}: the graph doesn't tell the first axis of the activation{where}; it is taken "
            "to be the batch's rows in their order, or batch·sequence with the batch outermost",
        )

    # --- once in the graph --------------------------------------------------------------------------

    def _check(self) -> ir.Value:
        """Check that the weights have the batch's number of rows: a Split into that many fails if not.

        (Not a Reshape: ONNX Runtime's ReshapeFusion would put -1 for the batch.)
        """
        write, first = self._write, self.first
        int64 = ir.DataType.INT64
        shape = write.add(first, "Shape", [self.batch_input], "lora.batch_shape", dtype=int64)
        zero = write.constant(first, np.array([0], np.int64), "lora.first_axis")
        self._batch_size = write.add(first, "Gather", [shape, zero], "lora.batch", dtype=int64)
        if self._same_symbol:
            return self.weights
        return write.add(
            first,
            "Split",
            [self.weights, self._batch_size],
            "lora.weights_of_batch",
            dtype=ir.DataType.FLOAT,
            attributes={"axis": 0},
        )

    def _expand(self, ranks: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        key = ranks, dtype
        if key not in self._expanded:
            write, first = self._write, self.first
            index = write.constant(first, np.array(ranks, np.int64), "lora.slot_of_rank")
            self._expanded[key] = write.add(
                first,
                "Gather",
                [self._typed(dtype), index],
                "lora.expanded",
                dtype=dtype,
                attributes={"axis": 1},
            )
        return self._expanded[key]

    def _typed(self, dtype: ir.DataType) -> ir.Value:
        """Return the weights in the dtype that a module computes in."""
        if dtype not in self._cast:
            self._cast[dtype] = self._write.add(
                self.first,
                "Cast",
                [self._checked],
                "lora.weights_cast",
                dtype=dtype,
                attributes={"to": dtype.value},
            )
        return self._cast[dtype]

    def _shape(self, expanded: ir.Value, kind: str, dims: list[int]) -> ir.Value:
        """Reshape the expanded weights so that they are along the activation's axes."""
        key = id(expanded), kind
        if key not in self._shaped:
            shape = self._write.constant(self.first, np.array(dims, np.int64), "lora.axes")
            assert expanded.dtype is not None
            self._shaped[key] = self._write.add(
                self.first, "Reshape", [expanded, shape], "lora.expanded_axes", dtype=expanded.dtype
            )
        return self._shaped[key]

    def _rows(self, total: int) -> ir.Value:
        """Return the shape ``(batch, -1, Σ ranks)``."""
        if total not in self._sizes:
            write, first = self._write, self.first
            rest = write.constant(first, np.array([-1, total], np.int64), "lora.rows")
            self._sizes[total] = write.add(
                first,
                "Concat",
                [self._batch_size, rest],
                "lora.rows_shape",
                dtype=ir.DataType.INT64,
                attributes={"axis": 0},
            )
        return self._sizes[total]

    # --- does the activation have the batch in front? -----------------------------------------------

    def _refuse_moved(self, rows: Rows, module: ExposedModule, x: ir.Value) -> None:
        """Let `refuse` refuse a module whose rows are not the batch's in their order."""
        batch = f"the rows of the batch (of {self.batch_input.name})"
        if rows.moved:
            reason = (
                f"{module.name}: {rows.moved} takes {batch} in another order, or not all of them, and its "
                f"activation {x.name} is computed from that"
            )
            hint = "the rows are not those of the batch in their order"
        elif rows.summed:
            reason = f"{module.name}: {rows.summed} makes one of {batch}, and its activation {x.name} is that"
            hint = "all rows share its result"
        else:
            return
        self._misplaced.setdefault(module.name, (reason, f"{hint}: {_INSTEAD}"))

    def _refuse_either(self, module: ExposedModule, x: ir.Value) -> None:
        """Let `refuse` refuse a module that depends only on an input with several axes of the batch size."""
        if name := self._flow.either(x):
            reason = (
                f"{module.name}: its activation {x.name} is computed from the input {name} alone, which has "
                f"several axes of the batch's size ({self.batch}, of {self.batch_input.name}): any may be it"
            )
            hint = f"export the graph with a free batch axis, or with other sizes of {name} than the batch's"
            self._misplaced.setdefault(module.name, (reason, hint))

    def _refuse_misplaced(self, rows: Rows | None, module: ExposedModule, x: ir.Value) -> None:
        """Let `refuse` refuse a module if the graph puts something outside of the batch's rows."""
        if rows is None or rows.axis is None or rows.in_front:
            return
        inside = f"inside of another size along axis {rows.axis} (sequence·batch, or several batches)"
        where = f"along axis {rows.axis}" if rows.outermost else inside
        reason = (
            f"{module.name}: the rows of the batch (of {self.batch_input.name}) lie {where} of its "
            f"activation {x.name}"
        )
        self._misplaced.setdefault(module.name, (reason, f"the batch is not outermost: {_INSTEAD}"))

    def _has_batch_in_front(self, shape: ir.Shape, module: ExposedModule) -> bool:
        """Return True if the activation is known to have the batch in front; `refuse` if it is known not to.

        It is unknown for products (``batch*sequence``) and symbols that exporters make up. Two axes without a
        name are equal only in a shape that can't be flattened: one with further axes.
        """
        if not len(shape):
            reason = f"{module.name}: its activation is one number for the whole batch"
            self._misplaced.setdefault(module.name, (reason, f"all rows share its result: {_INSTEAD}"))
            return False
        first, flat = shape[0], 1 if module.kind == "embedding" else 2
        unnamed = isinstance(first, ir.SymbolicDim) and first.value is None
        if first == self.batch and not (unnamed and len(shape) <= flat):
            return True
        if isinstance(first, int) or str(first) in self._other_axes:
            reason = (
                f"{module.name}: the first axis of its activation is {first}, the batch is {self.batch} "
                f"(of {self.batch_input.name}): its rows are not the batch's"
            )
            self._misplaced.setdefault(module.name, (reason, self._other_batch(first)))
        return False

    def _two_batches(self, hint: str) -> str:
        """Return what helps in place of a hint that names another input as the batch."""
        if not hint.startswith(_IF_BATCH):
            return hint
        mine, other = self.batch_input.name, hint.removeprefix(_IF_BATCH).strip()
        return (
            f"a bank has one batch, and other calls have that of {mine} in front: if the rows of {mine} "
            f"and {other} belong together, export the graph with one name for both axes, else {_INSTEAD}"
        )

    def _other_batch(self, first: ir.SymbolicDim | int) -> str:
        """Return a hint for an activation whose first axis is not the batch's."""
        others = [str(value.name) for value in self._inputs if value.shape and value.shape[0] == first]
        if others and first != self.batch:
            return f"{_IF_BATCH} {' or '.join(others)}"
        batch = self.batch
        if isinstance(first, int) and isinstance(batch, int) and batch < first and first % batch == 0:
            return (
                "the batch and another axis are one there, of fixed sizes: export the graph with a free "
                "batch axis (torch.onnx.export's dynamic_shapes= with dynamo=True, else dynamic_axes=)"
            )
        why = "all rows share its result" if first == 1 else "the batch is not its first axis"
        return f"{why}: {_INSTEAD}"


def _slots_of_ranks(module: ExposedModule) -> tuple[int, ...]:
    """Return the slot of each rank; in a grouped convolution, group after group (see `binding.pack`)."""
    return tuple(
        slot
        for _ in range(module.groups)
        for member in module.members
        for slot, rank in enumerate(member.ranks)
        for _ in range(rank // module.groups)
    )


def _batch_input(graph: GraphFile, name: str | None) -> ir.Value:
    inputs = [value for value in graph.graph.inputs if value.const_value is None and value.shape]
    free = [value for value in inputs if value.shape and not isinstance(value.shape[0], int)]
    for value in free + inputs:
        if name is None:
            return _most_certain(value, inputs)
        if value.name == name:
            return value
    raise SiteError(
        f"{graph.path.name} has no input {name!r} with a batch axis" if name else "no input has any axis",
        f"name one with --batch-input: {', '.join(str(value.name) for value in inputs)}",
    )


def _most_certain(first: ir.Value, inputs: list[ir.Value]) -> ir.Value:
    """Return an input of the same batch in which no other axis has its size, so that the first is certain."""
    assert first.shape is not None
    batch = first.shape[0]
    for value in [first, *inputs]:
        if value.shape and value.shape[0] == batch and list(value.shape).count(batch) == 1:
            return value
    return first
