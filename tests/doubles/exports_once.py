"""torch's dynamo exporter, run once for the same module in a run of the tests, whichever worker comes first.

Most of the time that the tests take is torch tracing the same tiny models. What it returned is kept in a
folder that the workers share, under a hash of everything that it depends on: the module's classes and their
code, its settings, every value of its parameters and buffers, the inputs, the options. All that lora-export
does itself (what it asks for, its own passes, what it writes) runs in every test.

An export that is not optimised copies parameters as they are. Modules that differ in their values alone share
one, and each gets its own values, if what the exporter made of the first one's says that it did so. With
``optimize``, the exporter's own optimiser is run on that, as the exporter does.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import json
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from light_tracing import trace_lightly

# What decides about a graph. With any other option, or another kind of module, the exporter is run.
_OPTIONS = frozenset(
    {
        *(
            "f",
            "kwargs",
            "verbose",
            "input_names",
            "output_names",
            "opset_version",
            "dynamo",
            "external_data",
        ),
        *("dynamic_shapes", "optimize", "export_params", "keep_initializers_as_inputs"),
    }
)
# What is no larger may be equal to a parameter by chance.
_CONSTANT_BYTES = 16
# Where a module was loaded from.
_PLACES = ("name_or_path", "_name_or_path")
_HERE = str(Path(__file__).resolve().parents[1])
Export = Callable[..., Any]


def share_exports(folder: Path, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let torch's exporter run once for the same module in all processes that share a folder.

    Args:
        folder: What was exported.
        put: Puts a value in the place of an attribute.
    """
    folder.mkdir(exist_ok=True)
    put(torch.onnx, "export", exported_once(torch.onnx.export, folder))
    _remember_operators(put)
    _do_less(put)
    trace_lightly(put)


def _remember_operators(put: Callable[[Any, str, Any], None]) -> None:
    """Let the exporter learn once what each export learns again: a third of the time of a small one.

    The source of onnxscript's operators, their signatures, torch's operators that its dispatcher has, and by
    their signatures which of them may be kept.
    """
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration, _schemas

    operators, materialize = _registration.onnxscript_apis, utils._materialize_cpp_cia_ops

    @functools.lru_cache(maxsize=1)
    def materialized(*_: int) -> None:
        materialize()

    def materialize_new() -> None:
        # Operators come with a library that is loaded, or from Python.
        library = torch.library
        loaded = (len(sys.modules), len(torch.ops.loaded_libraries))
        materialized(*loaded, len(library._defs), len(library._impls))

    put(operators, "get_torchlib_ops", functools.cache(operators.get_torchlib_ops))
    put(_schemas, "op_signature_from_function", functools.cache(_schemas.op_signature_from_function))
    put(utils, "_materialize_cpp_cia_ops", materialize_new)
    put(utils, "_check_valid_to_preserve", functools.cache(utils._check_valid_to_preserve))


def _do_less(put: Callable[[Any, str, Any], None]) -> None:
    """Let the exporter and its optimiser leave out work that has no effect: most of a small export's time.

    - Each decomposition gives hundreds of operators a kernel for every device that torch has heard of, by a
      method whose annotations are computed whenever it is called.
    - Each rule of the optimiser looks through the whole graph for its second output before it compares the
      first one's operator.
    - Each node says in the metadata from which line of Python it comes, which no test reads.
    - Each node is run once more to see what it gives after promotion of its inputs, promoted or not.
    """
    put(torch.fx.proxy, "CapturedTraceback", _NoTraceback)
    _promote_without_running(put)
    from onnxscript.rewriter import _basics, _matcher
    from torch.export import exported_program

    keys = ["_BACKEND_KEYS_TO_OVERRIDE", "_AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE"]
    if not torch.cuda.is_available():
        for name in keys:
            kept = [key for key in getattr(exported_program, name) if key.name.endswith(("CPU", "Meta"))]
            assert len(kept) == 2
            put(exported_program, name, kept)

    base = torch._ops.OperatorBase
    source = textwrap.dedent(inspect.getsource(base.py_impl))
    flag = annotations.compiler_flag
    made: dict[str, Any] = {}
    exec(compile(source, torch._ops.__file__, "exec", flag, dont_inherit=True), vars(torch._ops), made)
    put(base, "py_impl", functools.wraps(base.py_impl)(made["py_impl"]))

    match = _matcher.SimplePatternMatcher.match

    @functools.wraps(match)
    def match_first(self: Any, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        wanted = self.pattern.output_nodes[0]
        if wanted.op.matches(node.op_type) and wanted.domain.matches(node.domain):
            return match(self, model, graph, node, **options)
        return _basics.MatchResult().fail("another operator")

    put(_matcher.SimplePatternMatcher, "match", match_first)


class _NoTraceback:
    """A stack of calls that nobody looks at."""

    @classmethod
    def extract(cls, **_: Any) -> _NoTraceback:
        return cls()

    def summary(self) -> list[Any]:
        return []


def _promote_without_running(put: Callable[[Any, str, Any], None]) -> None:
    """Let the exporter's promotion of dtypes run nodes that it changes; it knows what the others give."""
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter = type_promotion._TypePromotionInterpreter
    run_node = interpreter.run_node

    @functools.wraps(run_node)
    def run_changed(self: Any, n: torch.fx.Node) -> Any:
        if n.op != "call_function" or "val" not in n.meta:
            return run_node(self, n)
        with self._set_current_node(n):
            if rule := type_promotion.get_type_promotion_rule(n, self.type_promotion_table):
                self._maybe_promote_node(n, rule)  # runs it and keeps what it gives, if it changes it
        return n.meta["val"]

    put(interpreter, "run_node", run_changed)


def exported_once(export: Export, folder: Path) -> Export:
    """Return `torch.onnx.export`, which exports what is not yet in ``folder``."""

    @functools.wraps(export)
    def once(model: Any, args: Any = (), f: Any = None, **options: Any) -> Any:
        known = isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule)
        if not (known and options.get("dynamo", True) and options.keys() <= _OPTIONS):
            return export(model, args, f, **options)
        given = {name: value for name, value in options.items() if name not in ("external_data", "verbose")}
        plain = {"optimize": False}
        own = folder / key_of(model, args, given)

        def make() -> torch.onnx.ONNXProgram:
            """Return what is shared with modules of this structure, with own values, optimised if asked."""
            alike = folder / key_of(model, args, given | plain, values=False)
            program = _kept(alike, model, lambda: export(model, args, **options | plain))
            names = json.loads((alike / "parameters.json").read_text())
            if names is None:
                return export(model, args, **options)
            parameters = dict(model.named_parameters(remove_duplicate=False))
            parameters |= dict(model.named_buffers(remove_duplicate=False))
            for name in names:
                value = ir.tensor_adapters.TorchTensor(parameters[name].detach().clone(), name)
                program.model.graph.initializers[name].const_value = value
            if options.get("optimize", True):
                program.optimize()
            return program

        program = _kept(own, model, make) if options.get("optimize", True) else make()
        if f is not None:
            program.save(
                f,
                include_initializers=options.get("export_params", True),
                keep_initializers_as_inputs=options.get("keep_initializers_as_inputs", False),
                external_data=options.get("external_data", True),
            )
        return program

    return once


def _without_values(graph: ir.Model) -> list[str]:
    """Give a module without values (on the meta device) zeros, so that it can be saved; return the names."""
    names = []
    for name, value in graph.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and raw.device.type == "meta":
            value.const_value = ir.tensor(torch.zeros(raw.shape, dtype=raw.dtype), name=name)
            names.append(name)
    return names


def _kept(place: Path, model: torch.nn.Module, make: Callable[[], Any]) -> Any:
    """Return what a folder keeps, made if it isn't there: the same for the first and for all others."""
    with locked(place.with_suffix(".lock")):
        if not place.exists():
            program = make()
            made = place.with_suffix(".new")
            made.mkdir()
            (made / "parameters.json").write_text(
                json.dumps(_without_values(program.model) or _copied(program.model, model))
            )
            ir.save(program.model, made / "model.onnx", external_data="model.data")
            made.rename(place)
    return torch.onnx.ONNXProgram(ir.load(place / "model.onnx"), None)


def _copied(graph: ir.Model, model: torch.nn.Module) -> list[str] | None:
    """Return the initializers that are parameters under their own names; None if others may come from one."""
    parameters = {
        name: parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    held = {name: value.const_value.tobytes() for name, value in graph.graph.initializers.items()}
    names = [name for name in held if name in parameters]
    others = {held[name] for name in held.keys() - names if len(held[name]) > _CONSTANT_BYTES}
    if any(held[name] != parameters[name] for name in names) or others & set(parameters.values()):
        return None
    return names


class locked:
    """A lock that other processes respect, for as long as a block lasts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._handle = os.open(self._path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)


def key_of(model: torch.nn.Module, args: Any, options: Mapping[str, Any], values: bool = True) -> str:
    """Return a hash of what an export depends on; the values of parameters are left out if asked."""
    digest = hashlib.sha256()
    for part in (*_of_module(model, values), *_plain((args, dict(options)))):
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _of_module(model: torch.nn.Module, values: bool) -> Iterator[str | bytes]:
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        yield f"{name} {kind.__module__}.{kind.__qualname__} {module.training}"
        for code in kind.__mro__:
            if code.__module__.split(".")[0] not in ("torch", "builtins") and "forward" in vars(code):
                yield from _code(vars(code)["forward"])
        for attribute, value in sorted(vars(module).items()):
            if attribute.endswith("_hooks"):
                for hook in value.values():
                    yield from _code(hook)
            elif attribute not in ("_parameters", "_buffers", "_modules", *_PLACES):
                yield attribute
                yield from _plain(value)
    shared: dict[int, int] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        yield f"{name} {shared.setdefault(id(tensor), len(shared))}"
        if values or not isinstance(tensor, torch.nn.Parameter):
            yield from _plain(tensor)
        else:
            yield f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad} {tensor.stride()}"


def _plain(value: Any, depth: int = 0) -> Iterator[str | bytes]:
    """Yield what a value holds: data, settings, functions; of other objects the class and their settings."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {value.requires_grad} {value.device}"
        if value.device.type == "meta":
            return
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, str | int | float | bool | bytes | type(None) | torch.dtype | torch.device):
        yield repr(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield repr(key)
            yield from _plain(inner, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        yield f"{type(value).__name__} {len(value)}"
        for inner in items:
            yield from _plain(inner, depth + 1)
    elif isinstance(value, torch.nn.Module):
        yield f"{type(value).__module__}.{type(value).__qualname__}"
    elif inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, functools.partial):
        yield from _code(value, depth)
    elif isinstance(value, types.ModuleType):
        yield value.__name__
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}"
        yield from _settings(value, depth)


def _settings(value: Any, depth: int) -> Iterator[str | bytes]:
    if depth > 6:
        return
    if hasattr(value, "to_json_string"):  # a config of transformers, and what it keeps to itself
        yield repr(json.loads(value.to_json_string(use_diff=False), object_pairs_hook=_placeless))
        yield repr(getattr(value, "_attn_implementation", None))
        yield repr(getattr(value, "_experts_implementation", None))
    elif isinstance(getattr(value, "__dict__", None), dict):
        for name, inner in sorted(vars(value).items()):
            if name in _PLACES:
                continue
            yield name
            yield from _plain(inner, depth + 1)
    else:
        text = repr(value)
        yield "" if " at 0x" in text else text


def _placeless(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [pair for pair in pairs if pair[0] not in _PLACES]


def _code(function: Any, depth: int = 0) -> Iterator[str | bytes]:
    """Yield a function's code, what it holds of the code around it, and those of ours that it calls."""
    if isinstance(function, functools.partial):
        yield from _plain((function.args, function.keywords), depth + 1)
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType) or depth > 6:
        yield getattr(function, "__qualname__", type(function).__qualname__)
        return
    yield function.__qualname__
    yield from _instructions(function.__code__)
    for cell in function.__closure__ or ():
        try:
            yield from _plain(cell.cell_contents, depth + 1)
        except ValueError:  # empty
            yield ""
    yield from _plain(function.__defaults__, depth + 1)
    for name in function.__code__.co_names:
        inner = function.__globals__.get(name)
        is_ours = isinstance(inner, types.FunctionType) and inner.__code__.co_filename.startswith(_HERE)
        if is_ours or isinstance(inner, str | int | float | bool | tuple | torch.Tensor):
            yield name
            yield from _plain(inner, depth + 1)


def _instructions(code: types.CodeType) -> Iterator[str | bytes]:
    yield code.co_code
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)
        else:
            yield repr(constant)
