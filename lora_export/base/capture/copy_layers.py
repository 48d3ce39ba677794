"""Make the graph of a cut model as deep as the model is: copy the nodes of a layer for each that is like it.

Rules, without which nothing is copied:

1. A node belongs to a layer if the exporter says so and it depends on a layer's weights or cache. What does
   not (positions, masks, sizes) is computed once for all.
2. From one layer to the next goes one value, the state; a layer reads nothing else of any other.
3. A layer's results are its state and its part of the cache.
4. The first and the last layer of a kind have the same nodes, constants included: code that asks for the
   number of its layer would tell them apart.
5. A layer's state goes out as large as it came in: what is behind the layers is traced for the sizes that the
   cut model makes, and with more layers that halve a sound it would be others.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from lora_export.base.capture.outline import CannotCopy, Stack

_SCOPES = "pkg.torch.onnx.name_scopes"
_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.")


def copy_layers(graph: ir.Graph, stack: Stack, has_cache: bool) -> None:
    """Copy the nodes of the chosen layers for all layers of a stack.

    Args:
        graph: Of the cut model, each node for itself: nothing shared by layers but what is made once.
        stack: The stack; the weights of layer ``n`` are named ``path.n.…``.
        has_cache: True if inputs ``past_key_values.n.…`` and outputs ``present.n.…`` are its layers'.

    Raises:
        CannotCopy: A rule does not hold.
    """
    if stack.depth == len(stack.chosen):
        return
    layers = _Layers(graph, stack, has_cache)
    layers.copy_all()


class _Layers:
    def __init__(self, graph: ir.Graph, stack: Stack, has_cache: bool) -> None:
        self._graph, self._stack, self._has_cache = graph, stack, has_cache
        self._within = re.compile(rf"{re.escape(stack.path)}\.(\d+)(?=\.|$)")
        values = (*graph.inputs, *graph.initializers.values())
        self._numbers = {id(value): number for value in values if (number := self._number(value)) is not None}
        self._caches = {id(value) for value in graph.inputs}
        self._results = {id(v) for v in graph.outputs if has_cache and _CACHE.match(str(v.name))}
        self.nodes: list[list[ir.Node]] = [[] for _ in stack.chosen]
        self._layer: dict[int, int] = {}
        self._sort_nodes()
        self.states = [self._state_into(number) for number in range(1, len(stack.chosen))]
        self._last = self._state_out()
        self._check_results()
        self._check_sizes()
        for first, last in stack.alike:
            _Comparison(self, first, last).check()

    def _sort_nodes(self) -> None:
        """Rule 1."""
        depends: set[int] = set()
        for node in self._graph:
            own = any(self._is_layers(value, node) for value in node.inputs)
            if not own and not any(id(value) in depends for value in node.inputs):
                continue
            depends.update(map(id, node.outputs))
            number = self._scope(node)
            if number is None:
                continue
            if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
                raise CannotCopy(f"{node.op_type} of layer {number} has a subgraph")
            self.nodes[number].append(node)
            self._layer[id(node)] = number
        if not all(self.nodes):
            raise CannotCopy("a layer has no nodes")

    def _scope(self, node: ir.Node) -> int | None:
        scopes = node.metadata_props.get(_SCOPES)
        if scopes is None:
            # Made by a rule of the optimiser, from a node of the layer that its inputs are of.
            producers = [value.producer() for value in node.inputs if value is not None]
            return max((self._layer[id(p)] for p in producers if id(p) in self._layer), default=None)
        for scope in ast.literal_eval(scopes):
            if found := self._within.fullmatch(scope):
                return int(found[1])
        return None

    def _is_layers(self, value: ir.Value | None, node: ir.Node) -> bool:
        """Return whether a value is a layer's weight or its cache; of a cache the shape is everybody's."""
        if value is None or value.producer() is not None:
            return False
        if node.op_type == "Shape":
            return False
        return self._number(value) is not None

    def _number(self, value: ir.Value) -> int | None:
        name = str(value.name)
        if value.is_graph_input():
            found = _CACHE.match(name) if self._has_cache else None
            return int(found[2]) if found else None
        found = self._within.match(name) if value.is_initializer() else None
        return int(found[1]) if found else None

    def _state_into(self, number: int) -> ir.Value:
        """Rule 2."""
        states: dict[int, ir.Value] = {}
        for value in (value for node in self.nodes[number] for value in node.inputs if value is not None):
            producer = value.producer()
            before = None if producer is None else self._layer.get(id(producer))
            if producer is None and self._number(value) not in (None, number):
                raise CannotCopy(f"layer {number} reads {value.name!r}")
            if producer is not None and before is None and self._depends(producer):
                raise CannotCopy(f"layer {number} reads {value.name!r}, computed between layers")
            if before not in (None, number, number - 1):
                raise CannotCopy(f"layer {number} reads {value.name!r} of layer {before}")
            if before == number - 1:
                states[id(value)] = value
        if len(states) != 1:
            raise CannotCopy(f"{len(states)} values go into layer {number}")
        return next(iter(states.values()))

    def _depends(self, node: ir.Node) -> bool:
        """Return whether a node outside of all layers depends on one."""
        pending, seen = [node], set()
        while pending:
            node = pending.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if id(node) in self._layer:
                return True
            pending += [p for value in node.inputs if value is not None and (p := value.producer())]
        return False

    def _state_out(self) -> ir.Value:
        """Return what goes out of the last chosen layer."""
        last = len(self.nodes) - 1
        found = {id(value): value for value in self._read_outside(last)}
        if len(found) != 1:
            raise CannotCopy(f"{len(found)} values go out of the last layer")
        return next(iter(found.values()))

    def _read_outside(self, number: int) -> Iterator[ir.Value]:
        for node in self.nodes[number]:
            for value in node.outputs:
                cache = value.is_graph_output() and self._has_cache and _CACHE.match(str(value.name))
                outside = any(self._layer.get(id(use.node)) != number for use in value.uses())
                if outside or (value.is_graph_output() and not cache):
                    yield value

    def _check_results(self) -> None:
        """Rule 3, of all but the last."""
        for number, state in enumerate(self.states):
            others = [value for value in self._read_outside(number) if value is not state]
            if number and others:
                raise CannotCopy(f"layer {number} gives {others[0].name!r} as well")
            if state.is_graph_output():
                raise CannotCopy(f"the state {state.name!r} is an output")

    def _check_sizes(self) -> None:
        """Rule 5, of all but the first, which is not copied."""
        ways = [*self.states, self._last]
        for number, (before, after) in enumerate(itertools.pairwise(ways), 1):
            if _sizes(before) is None or _sizes(before) != _sizes(after):
                raise CannotCopy(f"layer {number} makes {after.shape} of {before.shape}")

    def copy_all(self) -> None:
        """Write the layers behind the first again, and drop those that they were copied from."""
        graph, stack = self._graph, self._stack
        behind = [node for nodes in self.nodes[1:] for node in nodes]
        templates = set(range(1, len(self.nodes)))
        for name, value in list(graph.initializers.items()):
            if self._number(value) in templates:
                del graph.initializers[name]
        results = [self._kept(value, templates) for value in graph.outputs]
        inputs = [value for value in graph.inputs if self._number(value) not in templates]
        ways_out = [*self.states[1:], self._last]
        current, after, cache = self.states[0], behind[-1], list[ir.Value]()
        for index in range(1, stack.depth):
            number = stack.template[index]
            copy = _Copy(self, number, index, state=self.states[number - 1], current=current)
            for node in self.nodes[number]:
                made = copy.node(node)
                graph.insert_after(after, made)
                after = made
            inputs += copy.inputs
            cache += copy.outputs
            current = copy.new[ways_out[number - 1]]
            if index == stack.chosen[number]:
                self._take_over(copy.new, number)
        self._last.name, current.name = f"{self._last.name} of template", self._last.name
        graph.inputs[:] = sorted(inputs, key=_order)
        kept = [current if value is self._last else value for value in results if value is not None]
        graph.outputs[:] = [*kept, *sorted(cache, key=_order)]
        for use in list(self._last.uses()):
            if self._layer.get(id(use.node)) != len(self.nodes) - 1:
                use.node.replace_input_with(use.idx, current)
        for node in behind:
            # Nodes that are gone would still count as readers of what they read.
            for place in range(len(node.inputs)):
                node.replace_input_with(place, None)
        graph.remove(behind)

    def _take_over(self, new: Mapping[ir.Value, ir.Value], number: int) -> None:
        """Have nodes outside of the layers read the sizes of a layer's cache from that layer's copy."""
        for value, made in new.items():
            if self.is_own(value, number):
                for use in list(value.uses()):
                    if id(use.node) not in self._layer:
                        use.node.replace_input_with(use.idx, made)

    def _kept(self, value: ir.Value, templates: set[int]) -> ir.Value | None:
        found = _CACHE.match(str(value.name)) if self._has_cache else None
        return None if found and int(found[2]) in templates else value

    def is_member(self, node: ir.Node) -> bool:
        """Return whether a node is a layer's."""
        return id(node) in self._layer

    def is_cache(self, value: ir.Value) -> bool:
        """Return whether a value is an input of the graph."""
        return id(value) in self._caches

    def register(self, value: ir.Value) -> None:
        """Add a weight."""
        self._graph.initializers.add(value)

    def is_own(self, value: ir.Value, number: int) -> bool:
        """Return whether a value is a weight or a cache of a layer."""
        return value.producer() is None and self._numbers.get(id(value)) == number

    def is_result(self, value: ir.Value) -> bool:
        """Return whether a value is a layer's part of the cache that is an output."""
        return id(value) in self._results

    def renamed(self, text: str, number: int, index: int) -> str:
        """Return a text that names a layer as it is for another one."""
        path = self._stack.path
        text = re.sub(rf"(?<![\w.]){re.escape(path)}\.{number}(?![0-9])", f"{path}.{index}", text)
        if not self._has_cache:
            return text
        return re.sub(rf"\b(past_key_values|present)\.{number}\.", rf"\g<1>.{index}.", text)


class _Comparison:
    """Rule 4."""

    def __init__(self, layers: _Layers, first: int, last: int) -> None:
        self._layers, self._first, self._last = layers, first, last
        states = layers.states
        self._pairs = {id(states[first - 1]): states[last - 1]}

    def check(self) -> None:
        """Raise `CannotCopy` where two layers differ."""
        one, other = self._layers.nodes[self._first], self._layers.nodes[self._last]
        if len(one) != len(other):
            raise CannotCopy(f"layers {self._first} and {self._last} have {len(one)} and {len(other)} nodes")
        for mine, theirs in zip(one, other, strict=True):
            if not self._are_same(mine, theirs):
                raise CannotCopy(f"layers {self._first} and {self._last} differ: {mine.name}, {theirs.name}")

    def _are_same(self, mine: ir.Node, theirs: ir.Node) -> bool:
        if mine.op_identifier() != theirs.op_identifier() or len(mine.inputs) != len(theirs.inputs):
            return False
        if not _same_attributes(mine, theirs):
            return False
        if not all(self._is_same(*pair) for pair in zip(mine.inputs, theirs.inputs, strict=True)):
            return False
        self._pairs.update(zip(map(id, mine.outputs), theirs.outputs, strict=True))
        return True

    def _is_same(self, mine: ir.Value | None, theirs: ir.Value | None) -> bool:
        if mine is theirs:
            return True
        if mine is None or theirs is None:
            return False
        if id(mine) in self._pairs:
            return self._pairs[id(mine)] is theirs
        if self._layers.is_own(mine, self._first):
            renamed = self._layers.renamed(str(mine.name), self._first, self._last)
            return renamed == theirs.name and mine.shape == theirs.shape
        if mine.const_value is not None and theirs.const_value is not None:
            return bool(np.array_equal(mine.const_value.numpy(), theirs.const_value.numpy()))
        one, other = mine.producer(), theirs.producer()
        if one is None or other is None or self._layers.is_member(one):
            return False
        # Sizes are computed in many ways, from the inputs.
        if mine.dtype == theirs.dtype == ir.DataType.INT64:
            return True
        return mine.index() == theirs.index() and self._are_same(one, other)


def _same_attributes(mine: ir.Node, theirs: ir.Node) -> bool:
    if mine.attributes.keys() != theirs.attributes.keys():
        return False
    for name, one in mine.attributes.items():
        other = theirs.attributes[name]
        if one.type != other.type:
            return False
        if one.type == ir.AttributeType.TENSOR:
            if not np.array_equal(one.as_tensor().numpy(), other.as_tensor().numpy()):
                return False
        elif one.value != other.value:
            return False
    return True


class _Copy:
    """One layer, copied from the one that it is like."""

    def __init__(self, layers: _Layers, number: int, index: int, state: ir.Value, current: ir.Value) -> None:
        self._layers, self._number, self._index = layers, number, index
        self.new: dict[ir.Value, ir.Value] = {state: current}
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def node(self, node: ir.Node) -> ir.Node:
        """Return a node's copy."""
        copy = ir.Node(
            node.domain,
            node.op_type,
            [value if value is None else self._value(value) for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{node.name}.{self._index}",
            metadata_props={key: self._renamed(text) for key, text in node.metadata_props.items()},
        )
        for old, made in zip(node.outputs, copy.outputs, strict=True):
            made.shape, made.type = old.shape, old.type
            made.name = f"{old.name}.{self._index}"
            if self._layers.is_result(old):
                made.name = self._renamed(str(old.name))
                self.outputs.append(made)
            made.metadata_props.update({key: self._renamed(text) for key, text in old.metadata_props.items()})
            self.new[old] = made
        return copy

    def _value(self, value: ir.Value) -> ir.Value:
        if value not in self.new:
            own = self._layers.is_own(value, self._number)
            self.new[value] = self._made(value) if own else value
        return self.new[value]

    def _made(self, value: ir.Value) -> ir.Value:
        made = ir.Value(
            name=self._renamed(str(value.name)),
            shape=value.shape,
            type=value.type,
            const_value=value.const_value,
            metadata_props={key: self._renamed(text) for key, text in value.metadata_props.items()},
        )
        if self._layers.is_cache(value):
            self.inputs.append(made)
        else:
            self._layers.register(made)
        return made

    def _renamed(self, text: str) -> str:
        return self._layers.renamed(text, self._number, self._index)


def _sizes(value: ir.Value) -> list[int | str] | None:
    """Return a value's sizes; None if one of them is unknown."""
    sizes = [] if value.shape is None else [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    known = [size for size in sizes if size is not None]
    return known if value.shape is not None and len(known) == len(sizes) else None


def _order(value: ir.Value) -> tuple[int, bool]:
    """Sort a cache by its layers, the keys of each before its values, behind all else."""
    found = _CACHE.match(str(value.name))
    return (int(found[2]), str(value.name).endswith("value")) if found else (-1, False)
