"""Exports that are broken on purpose, one maker for each way, and the good ones beside them.

Most breaks are a wrong adapter under the right one's name (`DAMAGES`): merged, made resident in a bank, or
bound to a swap graph by a runtime that is wrong (`break_binding`). The others change the graph's constants or
its wires (`edited` and its users).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import numpy_helper

from lora_export import Adapter, LoraModule, bank_onnx, capture_onnx, load_adapter, merge_onnx, swap_onnx
from lora_export.binding import bind as binding
from lora_export.runtimes import swap_adapters

Array = tiny.Array
Damage = Callable[[Adapter], Adapter]
DTYPES = ("float32", "float16")
MODES = ("merged", "swap", "bank")
_EMBEDDING = "model.embed_tokens.weight"
_OVERFLOW = {
    "model.layers.1.self_attn.v_proj.weight": 2.0**15,
    "model.layers.1.self_attn.o_proj.weight": 2.0**-15,
}


# --- good ones ---------------------------------------------------------------------------------------


def base(arch: str, dtype: str = "float32", kv_cache: bool = False) -> Path:
    """Return the captured graph of a checkpoint of the zoo; do not change it."""
    return _captured(arch, dtype, kv_cache)


@functools.cache
def _captured(arch: str, dtype: str, kv_cache: bool) -> Path:
    output = tiny.cache_folder() / arch / f"captured-{dtype}{'-cache' * kv_cache}" / "base.onnx"
    with tiny.quiet():
        if arch == "qwen2_moe":
            _export_experts(dtype, output)
        else:
            capture_onnx(tiny.checkpoint(arch), output, dtype=dtype, kv_cache=kv_cache)
    return output


def _export_experts(dtype: str, output: Path) -> None:
    """Do what capture can't: the default dispatches tokens to experts in a loop over data."""
    spec, model = tiny.ARCHITECTURES["qwen2_moe"], tiny.build("qwen2_moe").to(getattr(torch, dtype))
    model.set_experts_implementation("batched_mm")
    output.parent.mkdir(parents=True)
    given = {"kwargs": spec.inputs(), "dynamic_shapes": spec.dynamic, "output_names": ["logits"]}
    torch.onnx.export(model, (), str(output), **given, dynamo=True, verbose=False)


def adapter(
    arch: str, feature: str = "plain", seed: int = 0, *, name: str = "a", strength: float = 1
) -> Adapter:
    """Return an adapter of the zoo; ``strength`` multiplies its B (and its bias)."""
    loaded = load_adapter(tiny.adapter(arch, feature, seed), name=name)
    return loaded if strength == 1 else _each(loaded, lambda module: _scaled(module, strength))


def export(mode: str, graph: Path, adapters: Mapping[str, Adapter], folder: Path) -> Path:
    """Write the first adapter merged, a swap graph that takes all of them, or a bank of them."""
    output = folder / f"{mode}.onnx"
    with tiny.quiet():
        if mode == "merged":
            merge_onnx(graph, next(iter(adapters.values())), output)
        elif mode == "swap":
            swap_onnx(graph, output, adapter=list(adapters.values()))
        else:
            bank_onnx(graph, adapters, output)
    return output


def exported(mode: str, graph: Path, adapters: Mapping[str, Adapter]) -> Path:
    """Return an `export` of what `base` returns, made once for equal adapters; do not change it."""
    content = pickle.dumps((mode, str(graph), list(adapters.items())))
    folder = tiny.cache_folder() / "exports" / hashlib.sha256(content).hexdigest()
    output = folder / f"{mode}.onnx"
    return output if output.exists() else export(mode, graph, adapters, folder)


# --- wrong adapters under the right one's name -------------------------------------------------------


def _each(given: Adapter, change: Callable[[LoraModule], LoraModule], paths: Collection[str] = ()) -> Adapter:
    """Return an adapter with these modules changed, or all of them."""
    modules = {
        key: change(module) if not paths or module.path in paths else module
        for key, module in given.modules.items()
    }
    assert not paths or {module.path for module in modules.values()} >= set(paths)
    return dataclasses.replace(given, modules=modules)


def _scaled(module: LoraModule, factor: float) -> LoraModule:
    bias = None if module.lora_bias is None else module.lora_bias * np.float32(factor)
    return dataclasses.replace(module, lora_b=module.lora_b * np.float32(factor), lora_bias=bias)


def alpha_over_rank(given: Adapter) -> Adapter:
    """Scale rsLoRA by alpha/r in place of alpha/√r."""
    return _each(given, lambda module: dataclasses.replace(module, rslora=False))


def without_alpha_pattern(given: Adapter) -> Adapter:
    """Give every module the alpha of the config, in place of its own."""
    return _each(given, lambda module: dataclasses.replace(module, alpha=given.config["lora_alpha"]))


def without(path: str) -> Damage:
    """Leave a module out."""

    def damage(given: Adapter) -> Adapter:
        kept = {key: module for key, module in given.modules.items() if module.path != path}
        assert len(kept) == len(given.modules) - 1
        names = tuple(name for module in kept.values() for name in module.tensor_names)
        return dataclasses.replace(given, modules=kept, tensor_names=names)

    return damage


def exchanged(one: str, two: str) -> Damage:
    """Give two modules of the same shape each other's factors."""

    def damage(given: Adapter) -> Adapter:
        by_path = {module.path: module for module in given.modules.values()}
        turned = {one: by_path[two], two: by_path[one]}
        return _each(given, lambda module: dataclasses.replace(turned[module.path], path=module.path), turned)

    return damage


def delta_transposed(path: str) -> Damage:
    """Add (BA)ᵀ to a square module."""
    return lambda given: _each(
        given,
        lambda module: dataclasses.replace(
            module,
            lora_a=np.ascontiguousarray(module.lora_b.T),
            lora_b=np.ascontiguousarray(module.lora_a.T),
        ),
        [path],
    )


def a_transposed(path: str) -> Damage:
    """Transpose an A that is square: its rank is its module's in_dim."""

    def change(module: LoraModule) -> LoraModule:
        assert module.lora_a.shape[0] == module.lora_a.shape[1]
        return dataclasses.replace(module, lora_a=np.ascontiguousarray(module.lora_a.T))

    return lambda given: _each(given, change, [path])


def b_scaled(path: str, factor: float = 2) -> Damage:
    """Scale a module once more: its scaling is in B already."""
    return lambda given: _each(given, lambda module: _scaled(module, factor), [path])


def doubled(given: Adapter) -> Adapter:
    """Add the adapter twice."""
    return _each(given, lambda module: _scaled(module, 2))


def not_applied(given: Adapter) -> Adapter:
    """Keep B at 0, as it was before the training."""
    return _each(given, lambda module: _scaled(module, 0))


def of_another_task(other: Adapter) -> Damage:
    """Put another adapter's factors under this one's name and file."""
    return lambda given: dataclasses.replace(given, modules=other.modules, extras=other.extras)


def expert_shifted(path: str, parameter: str) -> Damage:
    """Give expert 1 of a stack the A of expert 2."""

    def change(module: LoraModule) -> LoraModule:
        if module.parameter != parameter:
            return module
        stack = module.lora_a.reshape(module.experts, module.rank, -1).copy()
        stack[1] = stack[2]
        return dataclasses.replace(module, lora_a=stack.reshape(module.lora_a.shape))

    return lambda given: _each(given, change, [path])


def bias_twice(path: str) -> Damage:
    """Add the bias of a module's branch twice."""

    def change(module: LoraModule) -> LoraModule:
        assert module.lora_bias is not None
        return dataclasses.replace(module, lora_bias=2 * module.lora_bias)

    return lambda given: _each(given, change, [path])


def extra_twice(name: str) -> Damage:
    """Add a bias that the adapter replaces twice."""
    return lambda given: dataclasses.replace(given, extras={**given.extras, name: 2 * given.extras[name]})


def widened(given: Adapter, path: str, rank: int) -> Adapter:
    """Return a good adapter in which a module has another rank, its delta as large as before."""
    rng = np.random.default_rng(7)

    def change(module: LoraModule) -> LoraModule:
        a = rng.standard_normal((rank, module.lora_a.shape[1])) / math.sqrt(module.lora_a.shape[1])
        b = 0.05 * rng.standard_normal((module.lora_b.shape[0], rank)) * math.sqrt(module.rank / rank)
        factors = {"lora_a": a.astype(np.float32), "lora_b": b.astype(np.float32)}
        return dataclasses.replace(module, rank=rank, alpha=module.scaling * rank, **factors)

    return _each(given, change, [path])


# --- wrong runtimes ----------------------------------------------------------------------------------


def break_binding(monkeypatch: pytest.MonkeyPatch, damage: Damage, name: str = "a") -> None:
    """Let sessions of swap graphs bind a wrong adapter in place of the one of this name."""

    def bind(given: Adapter, *args: Any, **options: Any) -> binding.Binding:
        return binding.bind_adapter(damage(given) if given.name == name else given, *args, **options)

    monkeypatch.setattr(swap_adapters, "bind_adapter", bind)


def break_swaps(
    monkeypatch: pytest.MonkeyPatch, choose: Callable[[list[str | None]], str | None]
) -> list[str | None]:
    """Let sessions of swap graphs run with what ``choose`` says of the requests so far; return these."""
    asked: list[str | None] = []
    use = swap_adapters.SwapAdapters.use

    @contextmanager
    def stale(self: Any, feeds: Any, adapter: str | None, adapters: object) -> Iterator[Any]:
        asked.append(adapter)
        with use(self, feeds, choose(asked), adapters) as given:
            yield given

    monkeypatch.setattr(swap_adapters.SwapAdapters, "use", stale)
    return asked


def first_for_ever(asked: list[str | None]) -> str | None:
    """Keep the first adapter; requests without one are the base."""
    return asked[-1] and next(name for name in asked if name)


def one_behind(asked: list[str | None]) -> str | None:
    """Use the adapter of the request before."""
    return asked[-2] if len(asked) > 1 else asked[-1]


def not_without(asked: list[str | None]) -> str | None:
    """Stay with the last adapter when none is asked for."""
    return next((name for name in reversed(asked) if name), None)


def never_back(asked: list[str | None]) -> str | None:
    """Use the adapter asked for, but stay with the second one when the first is asked for again at once."""
    return asked[-2] if len(asked) > 2 and asked[-2] and asked[-1] == asked[-3] != asked[-2] else asked[-1]


# --- wrong graphs ------------------------------------------------------------------------------------


def edited(graph: Path, output: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Write a changed copy of a graph, all in one file."""
    model = onnx.load(graph)
    change(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, output)
    return output


def constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """Return an initializer."""
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def changed_constant(name: str, change: Callable[[Array], Array]) -> Callable[[onnx.ModelProto], None]:
    """Change the values of an initializer; its dtype stays."""

    def apply(model: onnx.ModelProto) -> None:
        tensor = constant(model, name)
        values = numpy_helper.to_array(tensor)
        new = np.asarray(change(values.copy()), values.dtype)
        assert new.shape == values.shape
        assert not np.array_equal(new, values)
        tensor.CopyFrom(numpy_helper.from_array(new, name))

    return apply


def without_row(row: int, name: str = _EMBEDDING) -> Callable[[onnx.ModelProto], None]:
    """Zero a row of an embedding."""

    def change(values: Array) -> Array:
        values[row] = 0
        return values

    return changed_constant(name, change)


def rewired(names: Mapping[str, str]) -> Callable[[onnx.ModelProto], None]:
    """Let every reader of a value read another one."""

    def apply(model: onnx.ModelProto) -> None:
        found = set()
        for node in model.graph.node:
            found |= set(names) & set(node.input)
            node.input[:] = [names.get(name, name) for name in node.input]
        assert found == set(names)

    return apply


def without_entry(key: str) -> Callable[[onnx.ModelProto], None]:
    """Take an entry out of a graph's metadata."""

    def apply(model: onnx.ModelProto) -> None:
        kept = [entry for entry in model.metadata_props if entry.key != key]
        assert len(kept) < len(model.metadata_props)
        del model.metadata_props[:]
        model.metadata_props.extend(kept)

    return apply


def b_doubled(path: str) -> Callable[[onnx.ModelProto], None]:
    """Let a swap graph scale a module's B by 2."""

    def apply(model: onnx.ModelProto) -> None:
        name = f"{path}.lora_B.weight"
        two = numpy_helper.to_array(constant(model, name)).dtype.type(2)
        rewired({name: f"{name}.twice"})(model)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(two), "lora.two"))
        model.graph.node.insert(0, onnx.helper.make_node("Mul", [name, "lora.two"], [f"{name}.twice"]))

    return apply


def rounded_to_bfloat16(model: onnx.ModelProto) -> None:
    """Round the weights to bfloat16 and keep them in float32."""
    for tensor in _weights(model):
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            numpy_helper.from_array(values.astype(ml_dtypes.bfloat16).astype(np.float32), tensor.name)
        )


def stored_in_bfloat16(model: onnx.ModelProto) -> None:
    """Store the weights in bfloat16 and cast them to float32, in which all else stays."""
    casts = []
    for tensor in _weights(model):
        name, values = tensor.name, numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        stored = onnx.helper.make_tensor(
            f"{name}.stored", onnx.TensorProto.BFLOAT16, values.shape, values.tobytes(), raw=True
        )
        tensor.CopyFrom(stored)
        casts.append(onnx.helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT))
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *others])


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return the float32 matrices of the base: not scalars, nor what a swap graph takes from outside."""
    inputs = {value.name for value in model.graph.input}
    return [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and tensor.name not in inputs
    ]


# --- a model that float16 can't hold -----------------------------------------------------------------


@functools.cache
def overflowing_checkpoint() -> Path:
    """Return a checkpoint whose layer 1 has values of 1e5 between v_proj and o_proj.

    In float32 it is the zoo's llama: o_proj takes back, exactly, what v_proj was multiplied with.
    """
    folder = tiny.cache_folder() / "overflowing"
    model: Any = tiny.build("llama")
    with torch.no_grad(), tiny.quiet():
        for name, factor in _OVERFLOW.items():
            model.get_parameter(name).mul_(factor)
        model.save_pretrained(folder)
    return folder


def overflowing(dtype: str, output: Path) -> Path:
    """Write the graph of `overflowing_checkpoint`."""

    def change(model: onnx.ModelProto) -> None:
        for name, factor in _OVERFLOW.items():
            changed_constant(name, lambda values, factor=factor: values * values.dtype.type(factor))(model)

    return edited(base("llama", dtype), output, change)
