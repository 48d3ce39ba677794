"""Copy on write: give a module's uses of a shared constant a constant of their own.

Exporters merge weights of equal value, and models tie weights: a change for one module must not reach
another.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lora_export.sites.slot import Use
from lora_export.sites.target import Part

_PASS = {"Transpose", "Cast", "CastLike", "Identity"}
# Nodes that read the shape alone: no values reach them.
_SHAPE_ONLY = {"Shape", "Size"}


class Isolator:
    """Hands out the constant that a part's patches go to, copying shared ones once."""

    def __init__(self) -> None:
        self._owners: dict[tuple[int, frozenset[tuple[int, int]]], ir.Value] = {}
        self.notes: list[str] = []

    def constant_for(self, part: Part, path: str, parameter: str) -> ir.Value:
        """Return an initializer that only the part's uses read; its values are those of ``part.root``.

        Args:
            part: Where a target lives.
            path: Module path, the beginning of the new names.
            parameter: ``weight`` or ``bias``, the end of the new names.
        """
        mine = frozenset((id(use.node), use.slot.index) for use in part.uses)
        key = (id(part.root), mine)
        if key not in self._owners:
            readers = set(_readers(part.root))
            root = _as_initializer(part.root, part.uses)
            if readers <= mine and not part.root.is_graph_output():
                self._owners[key] = root
            else:
                self._owners[key] = _copy(root, part.uses, f"{path}.lora_merged.{parameter}")
                others = len(readers - mine) + part.root.is_graph_output()
                self.notes.append(
                    f"{path}: its weight {part.root.name!r} is shared with {others} other reader(s); "
                    f"it got its own copy {path}.lora_merged.{parameter}"
                )
        return self._owners[key]


def _readers(value: ir.Value) -> Iterator[tuple[int, int]]:
    """Yield (node, input index) of each operator that a constant's values reach."""
    for usage in value.uses():
        if usage.node.op_type in _PASS:
            yield from _readers(usage.node.outputs[0])
        elif usage.node.op_type not in _SHAPE_ONLY:
            yield id(usage.node), usage.idx


def _as_initializer(root: ir.Value, uses: tuple[Use, ...]) -> ir.Value:
    """Turn a Constant node's output into an initializer of the same name; keep an initializer as it is."""
    maker = root.producer()
    if maker is None:
        return root
    graph = maker.graph
    assert isinstance(graph, ir.Graph)
    value = _new_value(str(root.name), root)
    ir.convenience.replace_all_uses_with(root, value)
    graph.remove(maker, safe=False)
    graph.register_initializer(value)
    return value


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
        use.node.replace_input_with(use.slot.index, end)
    return value


def _clone(node: ir.Node, source: ir.Value, name: str, before: ir.Node) -> ir.Value:
    attributes = list(node.attributes.values())
    inputs = [source, *node.inputs[1:]]
    output = ir.Value(name=name, shape=node.outputs[0].shape, type=node.outputs[0].type)
    clone = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=[output], name=f"{name}.node")
    before.prepend(clone)
    return output
