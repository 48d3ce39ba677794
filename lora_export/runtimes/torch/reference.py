"""Run a Hugging Face checkpoint in PyTorch with adapters beside its weights, as the reference for exports.

Inputs and outputs have the names that `capture_checkpoint` gives those of a graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.adapter import Adapter, Array
from lora_export.base.capture.cache import switch_cache
from lora_export.base.capture.export import first_line, named_tensors, quiet, require
from lora_export.base.capture.loading import load_model
from lora_export.base.capture.prepared import example_inputs
from lora_export.errors import AdapterError, BackendError
from lora_export.runtimes.torch.find_parameters import ModelParameters, OwnedTensor
from lora_export.runtimes.torch.float64 import in_float64
from lora_export.runtimes.torch.hooks import Bound, applied, bind
from lora_export.runtimes.torch.products import array_of, tensor_of

if TYPE_CHECKING:
    import torch

DTYPES = ("float64", "float32", "float16", "bfloat16")
# Adapters that act at once, with their weights.
State = tuple[tuple[str, float], ...]
_PAST, _PRESENT = "past_key_values.", "present."


class TorchReference:
    """One model in memory with adapters that are never merged into it. Not for several threads at once.

    Args:
        folder: Folder that ``save_pretrained`` wrote.
        dtype: One of `DTYPES`: the type of weights, products and floating inputs.
        adapters: Name → adapter.

    Attributes:
        made_up: Parameters that the checkpoint lacks and only an adapter brings: without the adapter their
            values are random, and the base's outputs mean nothing.

    Raises:
        BackendUnavailable: torch or transformers is missing.
        BackendError: The dtype is unknown.
        CheckpointError: The folder can't be loaded, lacks weights, or they don't fit into the dtype.
        AdapterError: Parts of the adapters have no site in the model, or another shape; all are listed.
    """

    def __init__(self, folder: Path, dtype: str, adapters: Mapping[str, Adapter]) -> None:
        require("torch", "transformers")
        if dtype not in DTYPES:
            raise BackendError(f"can't run in dtype {dtype!r}", f"give one of: {', '.join(DTYPES)}")
        replaced = [name for adapter in adapters.values() for name in adapter.extras]
        model, self.made_up = load_model(folder, dtype, replaced)
        if dtype == "float64" and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the default, torch's grouped_mm, takes no float64
        switch_cache(model, False)  # as in a captured graph
        self._start(model, adapters, folder, ())

    @classmethod
    def of_module(
        cls,
        module: torch.nn.Module,
        adapters: Mapping[str, Adapter],
        output_names: Sequence[str] = (),
    ) -> TorchReference:
        """Make a reference from a given module; its inputs are the parameters of ``forward``.

        Args:
            module: The module, in the mode and dtype to run in; each run leaves it unchanged.
            adapters: Name → adapter.
            output_names: Names of the outputs, for a module that returns tensors instead of a mapping.

        Raises:
            AdapterError: Parts of the adapters have no site in the module, or another shape; all are listed.
        """
        made = cls.__new__(cls)
        made.made_up = ()
        made._start(module, adapters, None, output_names)
        return made

    def _start(
        self, model: Any, adapters: Mapping[str, Adapter], folder: Path | None, names: Sequence[str]
    ) -> None:
        self._model, self._folder, self._names = model, folder, tuple(names)
        self._accepted = inspect.signature(model.forward).parameters
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        self._bound = _bind_all(model, adapters, folder)

    @property
    def module(self) -> torch.nn.Module:
        """The model itself, without adapters; don't change it."""
        return self._model

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs of a run without a cache, in order."""
        if self._folder is None:
            return self._names
        inputs = example_inputs(self._model, self._folder)
        return tuple(self._call(inputs, cached=False))

    @cached_property
    def changed_embeddings(self) -> dict[str, OwnedTensor]:
        """Path of each embedding that an adapter changes or replaces → owner of its table."""
        from torch import nn

        changed = {
            owner
            for bound in self._bound.values()
            for owner in (*(branch.owner for branch in bound.branches), *(owner for owner, _ in bound.extras))
        }
        return {
            path: OwnedTensor(module, "weight")
            for path, module in self._model.named_modules()
            if isinstance(module, nn.Embedding) and OwnedTensor(module, "weight") in changed
        }

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids; None for a model that reads no tokens."""
        config = getattr(self._model, "config", None)
        if config is None or getattr(self._model, "main_input_name", "") == "pixel_values":
            return None
        size = getattr(config.get_text_config(), "vocab_size", None)
        return None if size is None else int(size)

    def run(
        self, feeds: Mapping[str, Array], state: State = (), outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return the model's outputs.

        With ``past_key_values.N.key`` and ``….value`` among the feeds, or ``present.…`` among the requested
        outputs, the cache is returned as well.

        Args:
            feeds: Input name → values; floating values are cast to the model's dtype.
            state: (name, weight) of the active adapters; empty: the base.
            outputs: Names of the outputs in the order to return; by default all.

        Returns:
            Name → values in the model's dtype; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            AdapterError: An adapter is unknown, or they can't be active together.
            BackendError: The model doesn't take the inputs, lacks the outputs, or fails on the feeds.
        """
        inputs, past = self._inputs(feeds)
        cached = past is not None or (
            "past_key_values" in self._accepted and any(name.startswith(_PRESENT) for name in outputs or ())
        )
        with self._active(state):
            results = self._call(inputs, cached, past)
        if unknown := [name for name in outputs or () if name not in results]:
            raise BackendError(
                f"{self._title} has no output {', '.join(unknown)}", f"it has: {', '.join(results)}"
            )
        return {name: array_of(results[name]) for name in outputs or results}

    def run_with_modules(
        self, feeds: Mapping[str, Array], state: State, modules: Collection[str]
    ) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
        """Run, and return the inputs and outputs of modules, with the adapters' changes.

        Args:
            feeds: As for `run`.
            state: As for `run`.
            modules: Paths, as in any of the adapters (`LoraModule.path`) or in the model.

        Returns:
            The outputs, and path → (first input tensor, first output tensor). The calls of a module that runs
            several times are joined along the first axis or, if their shapes don't fit together, as flattened
            values. A module that does not run is left out.

        Raises:
            AdapterError: As for `run`.
            BackendError: As for `run`, or a module is unknown.
        """
        inputs, past = self._inputs(feeds)
        seen: dict[str, list[tuple[Any, Any]]] = {}
        with self._active(state), self._watched(modules, seen):
            results = self._call(inputs, past is not None, past)
        taken = {
            path: (_joined([call[0] for call in calls]), _joined([call[1] for call in calls]))
            for path, calls in seen.items()
        }
        return {name: array_of(values) for name, values in results.items()}, taken

    # Feeds.

    def _inputs(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Any], list[tuple[Any, Any]] | None]:
        """Return the arguments of ``forward``, and the cache's keys and values or None."""
        past = {name: values for name, values in feeds.items() if name.startswith(_PAST)}
        plain = {name: self._tensor(values) for name, values in feeds.items() if name not in past}
        problems = [f"{name}: not an input of the model" for name in plain if name not in self._accepted]
        layers = range((len(past) + 1) // 2)
        pairs = [(f"{_PAST}{layer}.key", f"{_PAST}{layer}.value") for layer in layers]
        problems += [f"{name}: missing" for pair in pairs for name in pair if name not in past]
        known = {name for pair in pairs for name in pair}
        problems += [f"{name}: not a key or value of layers 0, 1, …" for name in past if name not in known]
        if past and "past_key_values" not in self._accepted:
            problems.append("past_key_values: the model has no key-value cache")
        if problems:
            taken = ", ".join(self._accepted)
            raise BackendError(f"the feeds don't fit {self._title}", f"it takes: {taken}", problems)
        cache = [(self._tensor(past[key]), self._tensor(past[value])) for key, value in pairs]
        return plain, cache if past else None

    def _tensor(self, values: Array) -> torch.Tensor:
        tensor = tensor_of(values)
        if tensor.is_floating_point():
            return tensor.to(self._dtype)
        return tensor if tensor.dtype.itemsize == 1 else tensor.long()

    # Runs.

    def _call(
        self, inputs: Mapping[str, Any], cached: bool, past: Sequence[tuple[Any, Any]] | None = None
    ) -> dict[str, Any]:
        import torch

        arguments = dict(inputs)
        if cached:
            from transformers import DynamicCache

            # Without the config, as in a graph: with it, layers with a sliding window would drop old tokens.
            arguments |= {"past_key_values": DynamicCache(past or ()), "use_cache": True}
        wide = in_float64() if self._dtype == torch.float64 else contextlib.nullcontext()
        with quiet(), torch.inference_mode(), wide:
            try:
                result = self._model(**arguments)
            except Exception as error:  # whatever the model's own code raises
                raise BackendError(
                    f"{self._title} fails on the feeds: {first_line(error)}",
                    "give the graph's inputs, with fitting shapes",
                ) from error
        return self._named(result) | (_present(result) if cached else {})

    def _named(self, result: Any) -> dict[str, Any]:
        if isinstance(result, Mapping):
            return named_tensors(result)
        tensors = [result] if hasattr(result, "shape") else [v for v in result if hasattr(v, "shape")]
        names = list(self._names) or [f"output_{number}" for number in range(len(tensors))]
        return dict(zip(names, tensors, strict=True))

    @contextlib.contextmanager
    def _active(self, state: State) -> Iterator[None]:
        if unknown := [name for name, _ in state if name not in self._bound]:
            raise AdapterError(
                f"no adapter named {', '.join(unknown)}", f"there are: {', '.join(self._bound) or 'none'}"
            )
        with applied([(self._bound[name], weight) for name, weight in state]):
            yield

    @contextlib.contextmanager
    def _watched(self, modules: Collection[str], seen: dict[str, list[tuple[Any, Any]]]) -> Iterator[None]:
        paths = {path: where for bound in self._bound.values() for path, where in bound.paths.items()}
        own = dict(self._model.named_modules(remove_duplicate=False))
        if unknown := [path for path in modules if paths.get(path, path) not in own]:
            raise BackendError(f"{self._title} has no such modules", "give paths of an adapter", unknown)

        def keep(_: Any, args: Any, kwargs: Any, output: Any, path: str) -> None:
            seen.setdefault(path, []).append((_first([*args, *kwargs.values()]), _first([output])))

        handles = []
        try:
            for path in modules:
                # Registered after the adapters' hooks, so that the output contains what they add.
                hook = functools.partial(keep, path=path)
                module = own[paths.get(path, path)]
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _title(self) -> str:
        return type(self._model).__name__


def _bind_all(model: Any, adapters: Mapping[str, Adapter], folder: Path | None) -> dict[str, Bound]:
    places = ModelParameters(model, folder)
    bound, problems = {}, dict[str, str]()
    for name, adapter in adapters.items():
        bound[name], found = bind(model, adapter, places)
        problems |= {f"{name}: {problem}": hint for problem, hint in found.items()}
    if problems:
        raise AdapterError(
            f"{len(problems)} parts of adapters don't fit {folder or type(model).__name__}",
            "; ".join(dict.fromkeys(problems.values())),
            list(problems),
        )
    return bound


def _present(result: Any) -> dict[str, Any]:
    """Return the cache by the names of a graph's outputs."""
    layers = getattr(result.get("past_key_values"), "layers", ())
    return {
        f"{_PRESENT}{number}.{part}": state
        for number, layer in enumerate(layers)
        for part, state in (("key", layer.keys), ("value", layer.values))
    }


def _first(values: Sequence[Any]) -> Any:
    """Return a copy of the first tensor: later modules may write into the tensor itself."""
    for value in values:
        if hasattr(value, "detach"):
            return value.detach().clone()
        if isinstance(value, tuple | list) and (inner := _first(value)) is not None:
            return inner
    return None


def _joined(calls: Sequence[Any]) -> Array:
    import torch

    calls = [torch.empty(0) if call is None else call for call in calls]
    if len({tuple(call.shape[1:]) for call in calls}) > 1:
        calls = [call.flatten() for call in calls]
    return array_of(torch.cat(list(calls)) if len(calls) > 1 else calls[0])
