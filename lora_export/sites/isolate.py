"""Give a module's uses of a shared constant a constant of their own (copy on write).

Exporters merge weights of equal values, and models tie weights; a change for one module must not reach
another.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lora_export.errors import SiteError
from lora_export.graph.onnx_file import initializer_of
from lora_export.sites.operand import DEQUANTIZE, PASSED, QUANTIZE, SHAPE_ONLY, Use
from lora_export.sites.target import ConstantPart


class Isolator:
    """Source of the constant that a part's patches go to; it copies shared ones once."""

    def __init__(self) -> None:
        self._owners: dict[tuple[int, frozenset[tuple[int, int]]], ir.Value] = {}
        self._owned: dict[tuple[int, int], frozenset[tuple[int, int]]] = {}
        # A Constant node is replaced once; later parts still refer to its old output.
        self._roots: dict[int, tuple[ir.Value, ir.Value]] = {}
        self.notes: list[str] = []

    def constant_for(self, part: ConstantPart, path: str, parameter: str) -> ir.Value:
        """Return an initializer that only the part's uses read; its values are those of ``part.root``.

        Args:
            part: Constant that holds a target, and its uses.
            path: Path of the module, the beginning of the new names.
            parameter: ``weight`` or ``bias``, the end of the new names.

        Raises:
            SiteError: Some of the uses, but not all, belong to another part already.
        """
        mine = frozenset((id(use.node), use.operand.index) for use in part.uses)
        key = (id(part.root), mine)
        if key in self._owners:
            return self._owners[key]
        self._claim(mine, part, path)
        root = self._initializer(part.root)
        others = set(readers_of(root)) - mine
        if others:
            name = _free_name(root, f"{path}.lora_merged.{parameter}")
            self.notes.append(
                f"{path}: its weight {root.name!r} is shared with {len(others)} other reader(s); "
                f"it got its own copy {name}"
            )
            root = _copy(root, part.uses, name)
        self._owners[key] = root
        return root

    def _claim(self, mine: frozenset[tuple[int, int]], part: ConstantPart, path: str) -> None:
        if any(self._owned.get(use, mine) != mine for use in mine):
            raise SiteError(
                f"{path}: some, but not all, of the nodes that read {part.root.name!r} belong to "
                "another target",
                "merge the adapters one by one, or export the graph again with torch.onnx.export(..., "
                "dynamo=True, optimize=False), which has one constant for each module",
            )
        self._owned.update(dict.fromkeys(mine, mine))

    def _initializer(self, root: ir.Value) -> ir.Value:
        if id(root) not in self._roots:
            self._roots[id(root)] = (root, initializer_of(root))
        return self._roots[id(root)][1]


def readers_of(value: ir.Value) -> Iterator[tuple[int, int]]:
    """Yield (node, input index) of each operator that a constant's values reach, and outputs of graphs."""
    for node, index in reading_nodes(value):
        yield id(node), index


def reading_nodes(value: ir.Value) -> Iterator[tuple[ir.Node | ir.Value, int]]:
    """Yield each operator that a constant's values reach, with the input's index; outputs of graphs as -1."""
    if value.is_graph_output():
        yield value, -1
    for usage in value.uses():
        if usage.node.op_type in PASSED or (usage.idx == 0 and usage.node.op_type in QUANTIZE | DEQUANTIZE):
            yield from reading_nodes(usage.node.outputs[0])
        elif usage.node.op_type not in SHAPE_ONLY:
            yield usage.node, usage.idx


def _free_name(root: ir.Value, name: str) -> str:
    """Return ``name``, with a number if the graph has it already (merged before, or in two constants)."""
    graph, number, free = root.graph, 1, name
    assert graph is not None
    while free in graph.initializers:
        number += 1
        free = f"{name}.{number}"
    return free


def _new_value(name: str, like: ir.Value) -> ir.Value:
    tensor = like.const_value
    assert tensor is not None
    return ir.Value(name=name, shape=like.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _copy(root: ir.Value, uses: tuple[Use, ...], name: str) -> ir.Value:
    graph = root.graph
    assert graph is not None
    value = _new_value(name, root)
    graph.register_initializer(value)
    for number, use in enumerate(uses):
        end = value
        for position, node in enumerate(use.chain):
            end = _clone(node, end, f"{name}.{number}.{position}", before=use.node)
        use.node.replace_input_with(use.operand.index, end)
    return value


def _clone(node: ir.Node, source: ir.Value, name: str, before: ir.Node) -> ir.Value:
    attributes = list(node.attributes.values())
    inputs = [source, *node.inputs[1:]]
    output = ir.Value(name=name, shape=node.outputs[0].shape, type=node.outputs[0].type)
    clone = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=[output], name=f"{name}.node")
    before.prepend(clone)
    return output
