"""Tell whether a graph contains an adapter already: an adapter's layers, or its product, beside the weights.

PEFT replaces a layer by ``lora_A``, ``lora_B`` and ``base_layer``, so an export of a model whose adapter is
not merged has them in its names. An adapter added to such a graph would count twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from lora_export.graph.onnx_file import GraphFile
from lora_export.sites import operator_named
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.naming.adapter_layers import adapters_among
from lora_export.sites.naming.evidence import folded_names, scope_path
from lora_export.sites.operand import constant_behind
from lora_export.sites.target import Site

_VIEWS = {"Reshape", "Identity", "Cast", "Flatten", "Squeeze", "Unsqueeze"}
_SCALED = _VIEWS | {"Mul", "Div", "Transpose", "Dropout"}
_SUMMED = _VIEWS | {"Add"}
# A bias and a change of shape may be between the two products and their sum.
_STEPS = 4
# Limit of views and factors between two products.
_MOST = 64


def adapter_names(graph: GraphFile) -> list[str]:
    """Return some of the names in a graph that only an adapter's layers have, or an empty list."""
    return adapters_among(_names(graph))


def _names(graph: GraphFile) -> Iterator[str]:
    for owner in graph.graphs():
        yield from (str(value.name) for value in owner.inputs)
    for value in graph.initializers():
        yield str(value.name)
        yield from folded_names(value)
    for node in graph.graph.all_nodes():
        yield from _node_names(node)


def _node_names(node: ir.Node) -> Iterator[str]:
    yield node.name or ""
    yield scope_path(node) or ""
    yield from (str(output.name) for output in node.outputs)


def branch_beside(site: Site) -> str:
    """Return a reason if a product of two constants is added to a module's own product, or an empty string.

    Such a product is an adapter's branch without an adapter's names, unless the nodes say that it belongs to
    another module. What is below the module itself is a part of it, whatever it is called.
    """
    for use in (use for part in site.parts for use in part.uses):
        x = _through(use.node.inputs[1 if site.target.kind == "embedding" else 0], _VIEWS)
        for addend in _addends(use.node):
            up = _product(addend)
            down = _product(up.inputs[0]) if up is not None else None
            if up is None or down is None or x is None or x not in map(_viewed, down.inputs):
                continue
            if all(
                _is_inside(module_by_name(node), module_by_name(use.node), site.target.path)
                for node in (up, down)
            ):
                factors = [value for value in up.inputs if value is not None]
                names = [repr(str(value.name)) for value in factors if constant_behind(value) is not None]
                return (
                    f"contains an adapter already: a product with {', '.join(names)} and another constant is "
                    f"added beside {use.root.name!r}"
                )
    return ""


def _is_inside(module: str | None, own: str | None, path: str) -> bool:
    """Return True if a node's module is a product's own or below it, or below the target's, ``path``."""
    if module is None or own is None or module == own:
        return module == own
    # Where the layer is kept under another name (``fc.to_wrap`` beside ``fc.adapter``), the target is around.
    front, found, _ = f".{own}.".partition(f".{path}.")
    around = f"{front}{found}"[1:] if found and path else f"{own}."
    return module.startswith(around)


def _addends(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that are added to a node's product before anything else is done with it."""
    # Gemm's C, and the sum with which ONNX Runtime fuses a convolution.
    inside = {"Gemm": 2, "FusedGemm": 2, "FusedConv": 3}.get(node.op_type, len(node.inputs))
    yield from (value for value in node.inputs[inside : inside + 1] if value is not None)
    front = [] if _has_activation(node) else [node.outputs[0]]
    for _ in range(_STEPS):
        readers = [(value, usage.node) for value in front for usage in value.uses()]
        front = []
        for value, reader in readers:
            others = [other for other in reader.inputs if other is not None and other is not value]
            if reader.op_type == "Add" and len(others) == 1:
                yield others[0]
            if reader.op_type in _SUMMED:
                front.append(reader.outputs[0])


def _product(value: ir.Value | None) -> ir.Node | None:
    """Return the product of an activation and a constant that makes a value, apart from factors, or None."""
    for _ in range(2):
        if value is None or (maker := value.producer()) is None:
            return None
        operator = operator_named(maker.op_type)
        if operator and operator.weight is not None:
            is_fixed = constant_behind(maker.inputs[operator.weight]) is not None
            return maker if is_fixed and not _has_activation(maker) else None
        value = _through(value, _SCALED)
    return None


def _has_activation(node: ir.Node) -> bool:
    """Return whether an activation is inside a product: no adapter has one between A and B."""
    operator = operator_named(node.op_type)
    activated = operator is not None and operator.without_activation
    return bool(activated and node.attributes.get_string("activation", ""))


def _viewed(value: ir.Value | None) -> ir.Value | None:
    return _through(value, _VIEWS)


def _through(value: ir.Value | None, operators: Collection[str]) -> ir.Value | None:
    """Walk back through operators that have one activation."""
    for _ in range(_MOST):
        if value is None or (maker := value.producer()) is None or maker.op_type not in operators:
            return value
        inputs = [other for other in maker.inputs if other is not None and constant_behind(other) is None]
        if not inputs:
            return value
        value = inputs[0]
    return value
