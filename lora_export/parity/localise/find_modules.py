"""Find modules of the PyTorch model in a graph: the input and output value of each.

The graph fails the check, so its weights can't be trusted. These are tried in order: the LoRA record, names
(`lora_export.sites`), and for weights without names the constant nearest to the model's weight
(`by_content`). Stacked experts are found by the nodes that carry their name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.exposed import KEY, StoredRows, lora_record_of
from lora_export.graph.onnx_file import FLOAT_TYPES, GraphFile
from lora_export.modes.branches.calls import branch_of
from lora_export.parity.localise.by_content import Nearest
from lora_export.parity.localise.walk import ModuleWalker, Tap
from lora_export.plan import Refusal
from lora_export.sites import fit
from lora_export.sites.doubts.readers import folded_into_conv, module_by_name
from lora_export.sites.naming import names
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.renaming import likeliest_change
from lora_export.sites.operand import Use
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import ConstantPart, Site, Target, TargetKind
from lora_export.storage.patch import Placement

_NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
_SKIP_NORMS = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
NOT_FOUND = Refusal("not found", "no node or weight of the graph names it")
# Number of a skip norm's output that is its input sum.
_SKIP_SUM = 3


@dataclass(frozen=True)
class ModuleShape:
    """A module of the PyTorch model.

    Attributes:
        path: Path of the module.
        kind: ``linear``, ``conv``, ``embedding``; ``vector`` for a norm; ``parameter`` for stacked experts.
        shape: Shape of its weight, ``(out_dim, in_dim, …)``, or ``(num_embeddings, dim)`` of an embedding.
        identity: Number that is the same for all names of a module.
    """

    path: str
    kind: TargetKind
    shape: tuple[int, ...] = ()
    identity: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A module in the graph.

    Attributes:
        module: Path of the module in the PyTorch model.
        order: Number in the order of computation: larger is later.
        y: Its output, in parts along ``axis``.
        x: Its input; None if the graph does not show it.
        axis: Axis of the output channels in the graph.
        module_axis: Axis of the output channels in PyTorch: a tool may have written a Linear as a
            convolution.
    """

    module: str
    order: int
    y: tuple[Tap, ...]
    x: Tap | None = None
    axis: int = -1
    module_axis: int = -1


def find_probes(
    graph: GraphFile, modules: Sequence[ModuleShape], weight_of: Callable[[Target], Array | None]
) -> tuple[list[Probe], dict[str, Refusal]]:
    """Find modules in a graph.

    Args:
        graph: The graph; nodes may be added to it whose results only probes read.
        modules: Modules to find.
        weight_of: Function that returns a module's weight in the PyTorch model, without any adapter.

    Returns:
        The probes in the order of computation, and for each module without a probe the refusal.
    """
    return _Search(graph, modules, weight_of).run()


class _Search:
    def __init__(
        self, graph: GraphFile, modules: Sequence[ModuleShape], weight_of: Callable[[Target], Array | None]
    ) -> None:
        self._graph, self._modules = graph, modules
        self._resolver = Resolver(graph, branches=True)
        self._order = {id(node): number for number, node in enumerate(graph.graph)}
        self._walker = ModuleWalker(graph)
        self._named: dict[str, list[Use]] = defaultdict(list)
        for use, key in self._resolver.named_uses():
            self._named[key].append(use)
        self._prefix = likeliest_change(
            [f"{module.path}.weight" for module in modules], KnownNames(self._named)
        )
        self._scopes: dict[str, list[ir.Node]] = defaultdict(list)
        for node in graph.graph:
            if (scope := module_by_name(node)) is not None:
                self._scopes[scope].append(node)
        self._stored = _stored_of(graph)
        self._by_root: dict[str, list[Use]] = defaultdict(list)
        for use in self._resolver.uses:
            self._by_root[str(use.root.name)].append(use)
        self._weight_of = weight_of

    def run(self) -> tuple[list[Probe], dict[str, Refusal]]:
        found: dict[str, Probe | Refusal] = {}
        lost: list[Target] = []
        claimed: set[int] = set()
        for module in self._modules:
            target = _target(module)
            if target is None:
                probe = self._norm(module) if module.kind == "vector" else self._by_scope(module.path)
                found[module.path] = probe or NOT_FOUND
            elif (site := self._recorded(target) or self._by_name(target)) is None:
                lost.append(target)
            else:
                claimed.update(id(use.node) for part in site.parts for use in part.uses)
                found[module.path] = self._probe_at(site)
        nearest = Nearest(self._resolver.uses, claimed)
        for target in lost:
            site = nearest.find(target, self._weight_of(target))
            found[target.path] = self._probe_at(site) if site else NOT_FOUND
        probes = sorted((p for p in found.values() if isinstance(p, Probe)), key=lambda probe: probe.order)
        return probes, {path: refusal for path, refusal in found.items() if isinstance(refusal, Refusal)}

    def _recorded(self, target: Target) -> Site | None:
        """Return the site by the LoRA record, or None; a fused base has lost its names."""
        parts = []
        for rows in self._stored.get(target.path, ()):
            uses = tuple(use for use in self._by_root.get(rows.weight, ()) if fit.accepts(target, use))
            if not uses:
                return None
            placement = Placement(rows=rows.rows, row=rows.row, col=rows.col, transposed=rows.transposed)
            parts.append(ConstantPart(uses[0].root, uses, (placement,)))
        return Site(target=target, parts=tuple(parts), evidence="record") if parts else None

    def _by_name(self, target: Target) -> Site | None:
        for variant in names.variants(target.key):
            keys = [self._prefix.apply(key) or "" for key in variant.keys]
            groups = [[use for use in self._named.get(key, ()) if fit.accepts(target, use)] for key in keys]
            if not all(groups):
                continue
            if len(groups) > 1:
                split = fit.place_split(target, groups, "names")
                if isinstance(split, Site):
                    return split
                continue
            parts = []
            for use in groups[0]:
                placed = fit.place(target, use, variant.part)
                if not isinstance(placed, Refusal):
                    parts.append(ConstantPart(use.root, (use,), placed))
            if parts:
                return Site(target=target, parts=tuple(parts), evidence="names")
        return None

    def _probe_at(self, site: Site) -> Probe | Refusal:
        target = site.target
        for part in site.parts:
            if folded_into_conv(target, part):
                reason = "the exporter has folded a norm into it: the graph doesn't contain its output"
                return Refusal("computed", reason)
        branch = branch_of(site, {})
        if isinstance(branch, Refusal):
            return branch
        # A module that is called several times is examined in its first call.
        pieces = {piece.rows: piece for piece in reversed(branch.pieces)}
        taps, order, at = [], -1, 0
        for rows, piece in sorted(pieces.items()):
            node = piece.call.node
            if rows[0] != at or id(node) not in self._order:
                return Refusal("operator", "it is computed in parts that are not all in the main graph")
            at = rows[1]
            order = max(order, self._order[id(node)])
            width = (piece.offset, piece.offset + rows[1] - rows[0])
            taps.append(self._walker.output(piece.call, *width, target.path))
        if at != branch.out_dim:
            return Refusal("not found", "only a part of its outputs was found")
        x = next(iter(pieces.values())).call.x
        axis, module_axis = (1 if kind == "conv" else -1 for kind in (branch.kind, target.kind))
        return Probe(
            module=target.path,
            order=order,
            y=tuple(taps),
            x=Tap(x),
            axis=axis,
            module_axis=module_axis,
        )

    def _norm(self, module: ModuleShape) -> Probe | None:
        for key in (f"{module.path}.bias", f"{module.path}.weight"):
            for variant in names.variants(key):
                uses = self._named.get(self._prefix.apply(variant.keys[0]) or "", ())
                nodes = [use.node for use in uses if use.operand.kind == "vector"]
                if len(nodes) == 1 and id(nodes[0]) in self._order:
                    x = _normed(nodes[0]) or self._entering(module.path)
                    return Probe(
                        module=module.path,
                        order=self._order[id(nodes[0])],
                        y=(Tap(nodes[0].outputs[0]),),
                        x=x,
                    )
        return None

    def _by_scope(self, path: str) -> Probe | None:
        """Return a probe of the only float value that leaves the nodes with a module's name, or None."""
        leaving = [
            (node, value)
            for node in self._inside(path)
            for value in node.outputs
            if node.op_type != "Constant" and _is_float(value) and self._leaves(value, path)
        ]
        if len(leaving) != 1:
            return None
        ((maker, value),) = leaving
        return Probe(module=path, order=self._order[id(maker)], y=(Tap(value),), x=self._entering(path))

    def _inside(self, path: str) -> list[ir.Node]:
        return [node for scope in self._scopes if _within(scope, path) for node in self._scopes[scope]]

    def _leaves(self, value: ir.Value, path: str) -> bool:
        """Return True if a node of another module reads a value; nodes without a name don't count."""
        readers = [module_by_name(usage.node) for usage in value.uses()]
        return value.is_graph_output() or any(
            reader is not None and not _within(reader, path) for reader in readers
        )

    def _entering(self, path: str) -> Tap | None:
        """Return the only float value that nodes of a module read and others compute, or None."""
        nodes = self._inside(path)
        mine = {id(node) for node in nodes}
        found = {
            id(value): value
            for node in nodes
            for value in node.inputs
            if value is not None and value.const_value is None and value.dtype in FLOAT_TYPES
            if (maker := value.producer()) is None or id(maker) not in mine
        }
        return Tap(next(iter(found.values()))) if len(found) == 1 else None


def _normed(node: ir.Node) -> Tap | None:
    """Return the input of an operator that is a whole norm, or None."""
    if node.op_type in _NORMS and node.inputs[0] is not None:
        return Tap(node.inputs[0])
    if node.op_type in _SKIP_NORMS and len(node.outputs) > _SKIP_SUM and node.outputs[_SKIP_SUM].name:
        return Tap(node.outputs[_SKIP_SUM])
    return None


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype in FLOAT_TYPES


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _target(module: ModuleShape) -> Target | None:
    if module.kind not in ("linear", "conv", "embedding"):
        return None
    return Target(
        key=f"{module.path}.weight", kind=module.kind, shape=module.shape, action="merge", tensor_names=()
    )


def _stored_of(graph: GraphFile) -> Mapping[str, Iterable[StoredRows]]:
    metadata = graph.model.metadata_props
    if KEY not in metadata:
        return {}
    return {member.path: member.stored for _, member in lora_record_of(metadata, graph.path.name).members()}
