"""Check that adapters fit the models, as far as files tell: no model is opened or put on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.bench.contenders import AdapterChoice
from lora_export.bench.model import BenchModel
from lora_export.binding.base_weights import GraphWeights, WeightOf
from lora_export.binding.bind import bind_adapter, slot_blocks
from lora_export.errors import AdapterError, LoraExportError
from lora_export.formats import load_adapter
from lora_export.graph.exposed import LoraRecord
from lora_export.untrusted.places import exists
from lora_export.untrusted.shown import command, limited

# Largest number of problems of one adapter that are listed.
_LISTED = 10

# Options of convert-adapter, as errors name them: for what a file doesn't state, and for leaving modules out.
OPTIONS = ("alpha", "rank", "rslora", "format", "component", "any-base", "allow-unmatched")


def adapter_problems(adapters: Sequence[AdapterChoice], models: Sequence[BenchModel]) -> list[str]:
    """Return the reasons why adapters can't be used.

    Args:
        adapters: Adapters that the user named.
        models: The models.
    """
    names = [adapter.name for adapter in adapters]
    problems = [f"--adapter {name}: named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if adapters and not any(model.mode for model in models):
        listed = ", ".join(model.label for model in models)
        return [*problems, f"--adapter: {listed} takes no adapter: merged, or without exposed LoRA (omit it)"]
    for number, adapter in enumerate(adapters):
        if not adapter.name or adapter.path == Path():
            shown = f"={adapter.path}" if not adapter.name else f"{adapter.name}="
            problems.append(f"--adapter {shown}: give NAME=PATH")
            continue
        problems += _slot_problems(adapter, models)
        problems += _file_problems(adapter, names[:number], models)
    return problems


def _slot_problems(adapter: AdapterChoice, models: Sequence[BenchModel]) -> Iterator[str]:
    for model in models:
        if adapter.name in model.slots or not model.mode:
            continue
        if adapter.path is None:
            yield f"--adapter {adapter.name}: {model.label} needs its file: {_named(adapter.name)}"
        elif model.mode == "bank" and not model.takes_files:
            yield (
                f"--adapter {adapter.name}: {model.label} has no such slot; it has: {', '.join(model.slots)}"
            )


def _file_problems(
    adapter: AdapterChoice, before: Sequence[str], models: Sequence[BenchModel]
) -> Iterator[str]:
    if adapter.path is None:
        return
    try:
        loaded = load_adapter(adapter.path)
    except LoraExportError as error:
        yield f"--adapter {adapter.name}: {_nested(error)}{_converted(adapter, error, models)}"
        return
    for model in models:
        if model.exposed is None or not model.takes_files:
            continue
        try:
            _bind(loaded, adapter.name, before=before, model=model, exposed=model.exposed)
        except LoraExportError as error:
            yield f"--adapter {adapter.name}: {_nested(error)}{_converted(adapter, error, models)}"


def _bind(adapter: Adapter, name: str, before: Sequence[str], model: BenchModel, exposed: LoraRecord) -> None:
    """Make an adapter's tensors as loading does, and discard them.

    Raises:
        LoraExportError: The adapter doesn't fit the model, or any slot of a bank that it may get.
    """
    weight_of = GraphWeights(model.path) if model.kind == "graph" else _no_weights(model)
    if exposed.mode == "swap":
        bind_adapter(adapter, exposed, where=model.label, weight_of=weight_of)
        return
    failed: LoraExportError | None = None
    for slot in _slots_for(name, before, exposed):
        try:
            slot_blocks(adapter, exposed, slot, where=model.label, weight_of=weight_of)
        except LoraExportError as error:
            failed = failed or error
        else:
            return
    if failed:
        raise failed


def _slots_for(name: str, before: Sequence[str], exposed: LoraRecord) -> Sequence[int]:
    """Return the slots that an adapter may get: its own, unless an earlier adapter may have taken it."""
    names = [slot.name for slot in exposed.slots]
    if name in names and all(earlier in names for earlier in before):
        return [names.index(name)]
    return range(len(names))


def _no_weights(model: BenchModel) -> WeightOf:
    def refuse(name: str) -> Array:
        raise AdapterError(
            f"the adapter needs the base's weight {name}, which {model.label}, an engine, can't provide",
            "convert the adapter for the engine's graph with convert-adapter, and give the converted file",
        )

    return refuse


def _named(given: str) -> str:
    """Return ``NAME=PATH`` for an adapter given without a path; what was given may be the path itself."""
    path = Path(given)
    return f"{path.stem}={given}" if exists(path) else f"{given}=PATH"


def _converted(adapter: AdapterChoice, error: LoraExportError, models: Sequence[BenchModel]) -> str:
    """Return a text for an error that asks for options, which convert-adapter has and bench does not."""
    takers = [model.path for model in models if model.kind == "graph" and model.takes_files]
    if not takers or not any(f"--{word}" in str(error) for word in OPTIONS):
        return ""
    to = Path(f"{adapter.name}.onnx_adapter")
    words = command(["lora-export", "convert-adapter", adapter.path, "--for", takers[0], "-o", to])
    return (
        "; bench has no such options: convert the adapter with them, and give the converted file: "
        f"{words or 'convert-adapter'}"
    )


def _nested(error: LoraExportError) -> str:
    """Return an error with its hint and problems as one line."""
    hint = f" ({error.hint})" if error.hint else ""
    listed = "; ".join(limited(error.problems, most=_LISTED))
    return error.message + hint + (f": {listed}" if listed else "")
