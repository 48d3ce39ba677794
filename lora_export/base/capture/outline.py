"""A model without its weights, cut to one layer of each kind.

A decoder of 80 layers has two or three kinds of layers. Only what differs is traced: a model that holds its
first layer and the first of each kind behind it, on torch's meta device, where no weight takes memory. Its
graph is made as deep as the model is by `copy_layers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Buffers up to so many bytes are compared by their values.
_SMALL = 1 << 16
# Settings of configs that say how many layers there are.
_NUMBERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_PLAIN = (bool, int, float, str, type(None))


class CannotCopy(Exception):
    """A rule does not hold: the model has to be traced as a whole."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that follow each other.

    Attributes:
        path: Of their ModuleList, ``model.layers``.
        depth: How many there are.
        chosen: Numbers of the layers that are traced, in their order: the first layer, and of each kind
            behind it the first and the last.
        template: Of each layer, the position in ``chosen`` of the one that it is like.
        alike: Positions in ``chosen`` of two of one kind, whose nodes have to be the same.
    """

    path: str
    depth: int
    chosen: tuple[int, ...]
    template: tuple[int, ...]
    alike: tuple[tuple[int, int], ...]


def build_outline(
    kind: Any, config: Any, dtype: torch.dtype, attention: str | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a model whose parameters and buffers are on the meta device, and its buffers' values.

    Args:
        kind: A class of transformers.
        config: Its config.
        dtype: Of the weights.
        attention: Implementation of attention; None: transformers' choice.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Empty(TorchFunctionMode):  # type: ignore[misc]
        """Makes what has no values yet, the weights, on the meta device."""

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            given = dict(kwargs or {})
            if func is torch.empty and given.get("device") is None:
                given["device"] = "meta"
            return func(*args, **given)

    chosen = {} if attention is None else {"attn_implementation": attention}
    with Empty(), torch.no_grad():
        model = kind._from_config(config, dtype=dtype, **chosen).eval()
    buffers = {name: value for name, value in model.named_buffers() if value.device.type != "meta"}
    return model.to("meta"), buffers


def find_stacks(model: torch.nn.Module, buffers: Mapping[str, torch.Tensor]) -> list[Stack]:
    """Return the outermost lists of layers of a model, with the layers that are alike."""
    import torch

    found: list[Stack] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack.path}.") for stack in found)
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1 and not inside:
            found.append(_stack(path, module, model, buffers))
    return found


def cut(model: Any, stacks: list[Stack]) -> Callable[[], None]:
    """Leave of each stack the chosen layers only, in the model and in its config.

    Returns:
        A function that gives the config its numbers of layers back: a cache is made for so many layers as the
        config says, but what the model computes with that number is meant for all of them.

    Raises:
        CannotCopy: Code outside the layers knows them by their numbers.
    """
    import torch

    numbers: list[tuple[Any, str, int]] = []
    for stack in stacks:
        if len(stack.chosen) < stack.depth:
            _refuse_numbers(model, stack)
        owner, _, name = stack.path.rpartition(".")
        layers = model.get_submodule(stack.path)
        kept = [layers[index] for index in stack.chosen]
        for position, layer in enumerate(kept):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = position
        setattr(model.get_submodule(owner), name, torch.nn.ModuleList(kept))
        for config in _configs(model):
            for name, values in list(_of_each_layer(config, stack.depth)):
                setattr(config, name, [values[index] for index in stack.chosen])
            for name in _NUMBERS:
                if vars(config).get(name) == stack.depth:
                    numbers.append((config, name, stack.depth))
                    setattr(config, name, len(stack.chosen))

    def restore() -> None:
        for config, name, number in numbers:
            setattr(config, name, number)

    return restore


def _refuse_numbers(model: Any, stack: Stack) -> None:
    """Refuse what is said of layers by their numbers, which would be others' in the cut model.

    A config's own list of numbers may be there for the layers' constructors alone: it is refused when the cut
    model asks it for one.
    """
    for path, module in model.named_modules():
        if path.startswith(f"{stack.path}.") or type(module).__module__.startswith("torch."):
            continue
        for name, value in vars(module).items():
            if isinstance(value, list) and len(value) == stack.depth and any(v != value[0] for v in value):
                raise CannotCopy(f"{path or 'the model'}.{name} has an entry for each layer")
            if isinstance(value, dict) and _are_numbers(value, stack.depth):
                raise CannotCopy(f"{path or 'the model'}.{name} has entries for single layers")
    for config in _configs(model):
        if getattr(config, "is_heterogeneous", False):
            raise CannotCopy("its config has settings for single layers (per_layer_config)")
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and _are_numbers(value, stack.depth):
                setattr(config, name, _Numbers(name, value))


class _Numbers(list[int]):
    """Numbers of layers in a config, which a cut model must not ask for one of its own."""

    def __init__(self, name: str, values: Iterable[int]) -> None:
        super().__init__(values)
        self._name = name

    def __contains__(self, number: object) -> bool:
        raise CannotCopy(f"its code asks for the numbers of layers in {self._name}")


def _are_numbers(values: Collection[object], depth: int) -> bool:
    """Return whether values may be the numbers of some layers: whole, below the depth, in their order."""
    found = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    rises = all(a < b for a, b in itertools.pairwise(found))
    return bool(found) and len(found) == len(values) < depth and rises and found[0] >= 0 and found[-1] < depth


def _configs(model: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config


def _stack(path: str, layers: torch.nn.ModuleList, model: Any, buffers: Mapping[str, torch.Tensor]) -> Stack:
    facts = [_facts(f"{path}.{index}", layer, buffers) for index, layer in enumerate(layers)]
    for config in _configs(model):
        for name, values in _of_each_layer(config, len(layers)):
            for fact, value in zip(facts, values, strict=True):
                fact["", f"config.{name}"] = repr(value)
    # What counts the layers says nothing of their kind.
    counts = {key for key in facts[0] if all(fact.get(key) == index for index, fact in enumerate(facts))}
    kinds = [frozenset((key, value) for key, value in fact.items() if key not in counts) for fact in facts]
    ends: dict[frozenset[Any], list[int]] = {}
    for index, kind in enumerate(kinds[1:], 1):
        ends[kind] = [*ends.get(kind, [])[:1], index]
    chosen = sorted({0, *(index for pair in ends.values() for index in pair)})
    places = {kind: [chosen.index(index) for index in pair] for kind, pair in ends.items()}
    return Stack(
        path=path,
        depth=len(kinds),
        chosen=tuple(chosen),
        template=tuple(
            chosen.index(index) if index in chosen else places[kind][0] for index, kind in enumerate(kinds)
        ),
        alike=tuple((pair[0], pair[1]) for pair in places.values() if len(pair) == 2),
    )


def _of_each_layer(config: Any, depth: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield the settings of a config that have an entry for each layer."""
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            yield name, list(value)


def _facts(path: str, layer: torch.nn.Module, buffers: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    """Return what tells layers apart: modules, settings, shapes of weights, values of small buffers."""
    facts: dict[Any, Any] = {}
    for name, module in layer.named_modules():
        facts[name, "class"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, _PLAIN):
                facts[name, key] = value
            elif isinstance(value, (tuple, list, set, frozenset, dict)) and not key.startswith("_"):
                facts[name, key] = repr(value)
    for name, parameter in layer.named_parameters():
        facts[name, "weight"] = (tuple(parameter.shape), parameter.dtype)
    for name, buffer in layer.named_buffers():
        values = buffers.get(f"{path}.{name}")
        small = values is not None and values.nbytes <= _SMALL
        said = values.numpy().tobytes() if values is not None and small else f"{path}.{name}"
        facts[name, "buffer"] = (tuple(buffer.shape), buffer.dtype, said)
    return facts
