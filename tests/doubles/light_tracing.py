"""torch's tracing without work that leaves nothing in a graph: a third of the time of a tiny model's export.

It is the same graph byte for byte, names included: `test_light_tracing.py` exports with and without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._functorch._aot_autograd import graph_capture_wrappers
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import graph_module
from torch.fx.experimental import proxy_tensor, sym_node
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.utils._thunk import Thunk

Put = Callable[[Any, str, Any], None]
# Attributes as torch has them: the object, the name, the value.
REPLACED: list[tuple[Any, str, Any]] = []


def trace_lightly(put: Put = setattr) -> None:
    """Let torch trace with less work for the same graph.

    Args:
        put: Puts a value in the place of an attribute.
    """

    def replace(owner: Any, name: str, value: Any) -> None:
        REPLACED.append((owner, name, vars(owner).get(name, getattr(owner, name))))
        put(owner, name, value)

    _remember_sizes(replace)
    _compile_when_called(replace)
    _describe_no_tensors(replace)
    _name_unused_sizes_alone(replace)
    replace(graph_capture_wrappers, "PropagateUnbackedSymInts", _Known)


class _Silent:
    """A logger that nobody reads: each call of the others asks twice whether somebody does."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)

    def debug(self, *_: Any, **__: Any) -> None:
        pass


# Methods whose result depends on their two operands alone: not on what is known of a symbol's range.
_OF_TWO = (
    *("_add", "_sub", "_mul", "_int_floordiv", "_sym_max", "_sym_min", "_and_", "_or_"),
    *("_eq", "_ne", "_gt", "_lt", "_le", "_ge"),
)


def _remember_sizes(put: Put) -> None:
    """Let sums and products of symbolic sizes be computed once for each pair of expressions."""
    put(sym_node, "sym_node_log", _Silent(sym_node.sym_node_log))
    put(proxy_tensor, "log", _Silent(proxy_tensor.log))
    put(sympy.Expr, "is_number", property(functools.lru_cache(8192)(sympy.Expr.is_number.fget)))
    for name in _OF_TWO:
        put(sym_node.SymNode, name, _remembered(name, getattr(sym_node.SymNode, name)))


def _remembered(method: str, compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    mode = torch._C._TorchDispatchModeKey.PROXY
    get_mode = torch._C._get_dispatch_mode
    kind = sym_node.SymNode

    @functools.wraps(compute)
    def remembered(self: Any, other: Any) -> Any:
        env = self.shape_env
        if type(other) is not kind or env is None or get_mode(mode) or proxy_tensor.get_proxy_mode():
            return compute(self, other)
        known = env.__dict__.setdefault("_remembered", {})
        key = (
            *(method, self._expr, other._expr, self.pytype, other.pytype, self._hint, other._hint),
            *(env._replacements_version_counter, self._optimized_summation, other._optimized_summation),
        )
        try:
            found = known.get(key)
        except TypeError:  # a hint without a hash
            return compute(self, other)
        if found is None:
            found = known[key] = compute(self, other)
        # Each result is an object of its own: what is traced hangs on it.
        made = kind.__new__(kind)
        made.__dict__.update(found.__dict__)
        return made

    return remembered


class _Unwritten:
    """A graph's `forward`, written when somebody asks for it."""

    def __init__(self, compile_now: Callable[[Any], Any]) -> None:
        self._compile_now = compile_now

    def __get__(self, graph: Any, kind: type) -> Any:
        if graph is None:
            return self
        self._compile_now(graph)
        return graph.forward


def _compile_when_called(put: Put) -> None:
    """Let a graph's Python code be written when somebody runs it: the exporter reads the graph alone."""
    module = graph_module.GraphModule
    compile_now = module.recompile

    @functools.wraps(compile_now)
    def recompile(self: Any) -> None:
        codegen = self._graph._codegen
        if isinstance(codegen, torch.fx.graph._PyTreeCodeGen):
            self._in_spec, self._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        type(self).forward = _Unwritten(compile_now)
        self.__dict__.pop("_code", None)
        self._recompile_submodules()

    def code(self: Any) -> str:
        if "_code" not in self.__dict__:
            compile_now(self)
        text: str = self._code
        return text

    put(module, "recompile", recompile)
    put(module, "code", property(code))


def _describe_no_tensors(put: Put) -> None:
    """Let nodes say of what they give the value alone, not its layout in memory as well."""
    put(proxy_tensor, "_extract_tensor_metadata", lambda result: None)


class _Named(Thunk[Any]):
    """What a size is in the graph, of which the graph has the name so far."""


def _name_unused_sizes_alone(put: Put) -> None:
    """Let sizes that no node needs take their names, which number the others, and become nodes when one does.

    Whatever wraps a tensor computes how many bytes it has, which nobody asks for: a node for each sum and
    each product. For tensors of the same sizes these are the same, and are computed for the first.
    """
    make = FunctionalTensor.__new__
    register = proxy_tensor._sym_register
    make_wrapper = torch.Tensor._make_wrapper_subclass
    # Of the tensor that is being wrapped: its sizes, and what is done in the graph for them.
    wrapping: list[tuple[list[Any], list[Any]]] = []
    wanted: list[int] = []

    def has_name_alone(size: Any, tracer: Any) -> bool:
        """Return True if a size has a name alone; give any other its node."""
        slot = proxy_tensor.get_proxy_slot(size, tracer)
        if isinstance(slot, _Named):
            return True
        slot.force()
        return False

    def named(tracer: Any, func: Any, args: tuple[object, ...], out: object) -> None:
        if not (wrapping and isinstance(out, proxy_tensor.py_sym_types)):
            register(tracer, func, args, out)
            return
        sizes, steps = wrapping[-1]
        for given in args[0] if isinstance(args[0], list | tuple) else args:
            if isinstance(given, proxy_tensor.py_sym_types):
                place = next((i for i, one in enumerate(sizes) if one.node is given.node), None)
                if not has_name_alone(given, tracer) or place is not None:
                    steps.append(place)
        name = tracer.graph._target_to_str(func)
        tracer.graph._graph_namespace.create_name(name, None)
        steps.append(name)
        compute = functools.partial(proxy_tensor._compute_proxy, tracer, func=func, args=args, out=out)
        proxy_tensor.set_proxy_slot(out, tracer, _Named(compute))

    @functools.wraps(make)
    def wrapped(cls: type, elem: torch.Tensor, mode: Any) -> Any:
        tracer = getattr(proxy_tensor.get_proxy_mode(), "tracer", None)
        is_plain = isinstance(tracer, proxy_tensor.PythonKeyTracer) and not tracer.enable_thunkify
        if not is_plain or elem.layout != torch.strided:
            return make(cls, elem, mode)
        all_sizes = (*elem.shape, *elem.stride(), elem.storage_offset())
        sizes = [size for size in all_sizes if isinstance(size, torch.SymInt)]
        known = tracer.__dict__.setdefault("_steps", {})
        key = tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in all_sizes)
        key = (elem.dtype, elem.ndim, *key)
        steps = known.get(key)
        if not sizes or (steps is not None and None in steps):
            return make(cls, elem, mode)
        if steps is None:
            wrapping.append((sizes, known.setdefault(key, [])))
            try:
                return make(cls, elem, mode)
            finally:
                wrapping.pop()
        for step in steps:
            if isinstance(step, str):
                tracer.graph._graph_namespace.create_name(step, None)
            else:
                has_name_alone(sizes[step], tracer)
        wanted.append(1)
        try:
            return make(cls, elem, mode)
        finally:
            wanted.pop()

    @functools.wraps(make_wrapper)
    def make_wrapper_of_no_size(*args: Any, **named: Any) -> Any:
        return make_wrapper(*args, **named, **({"storage_size": wanted[-1]} if wanted else {}))

    put(FunctionalTensor, "__new__", wrapped)
    put(proxy_tensor, "_sym_register", named)
    put(torch.Tensor, "_make_wrapper_subclass", staticmethod(make_wrapper_of_no_size))


aten = torch.ops.aten
# Operators whose result shares its memory with nothing else.
_FRESH = {
    *(aten.linear.default, aten.matmul.default, aten.addmm.default, aten.bmm.default, aten.mm.default),
    *(
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.cat.default,
        aten.tanh.default,
    ),
    *(aten.layer_norm.default, aten.scaled_dot_product_attention.default, aten.conv2d.default),
}


class _Known(PropagateUnbackedSymInts):
    """A graph that does not run to say which of its inputs it changes, where it changes none.

    torch runs it for that before it runs it once more to decompose it. What it gives is known from its
    tracing.
    """

    def run(self, *given: Any, **options: Any) -> Any:
        graph = self.module.graph
        if proxy_tensor.get_proxy_mode() is not None or options or not _is_pure(graph):
            return super().run(*given, **options)
        (results,) = graph.output_node().args
        made: dict[torch.fx.Node, Any] = {}

        def result(node: torch.fx.Node) -> Any:
            if node not in made:
                value = node.meta["val"]
                is_tensor = isinstance(value, torch.Tensor)
                made[node] = FunctionalTensor.to_functional(value) if is_tensor else value
            return made[node]

        return graph.process_outputs(torch.fx.node.map_arg(results, result))


def _is_pure(graph: torch.fx.Graph) -> bool:
    """Return True if no node changes a tensor or makes a size, and the results are tensors of their own."""
    for node in graph.nodes:
        if "unbacked_bindings" in node.meta or node.op == "call_method":
            return False
        if node.op == "call_module" and node.target != "_guards_fn":
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        is_known = isinstance(node.target, torch._ops.OpOverload) and node.target != aten.detach_.default
        if is_known and node.target._schema.is_mutable:
            return False
    return all(_is_fresh(node) for node in graph.output_node().all_input_nodes)


def _is_fresh(node: torch.fx.Node) -> bool:
    while node.op == "call_function" and node.target not in _FRESH:
        is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        if not ((is_view or node.target == aten.dropout.default) and isinstance(node.args[0], torch.fx.Node)):
            return False
        node = node.args[0]
    return node.op == "call_function"
