"""Find files that a report must never replace: timed models, files that belong to them, adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lora_export.bench.contenders import AdapterChoice
from lora_export.bench.model import BenchModel
from lora_export.engines.record import is_engine, record_path
from lora_export.formats.reading.weights_files import files_of
from lora_export.storage.outputs import places_of, replaced_inputs
from lora_export.untrusted.places import is_file

# The file that PEFT reads beside a file of weights.
_ADAPTER_CONFIG = "adapter_config.json"


def overlap_problems(
    outputs: Mapping[str, Path],
    paths: Sequence[Path],
    models: Sequence[BenchModel],
    adapters: Sequence[AdapterChoice],
) -> list[str]:
    """Return a problem for each output that would replace a timed file; even ``--force`` doesn't allow that.

    Args:
        outputs: Option with its value → the file that it writes.
        paths: Files of all models.
        models: The models that could be read, which know their data files.
        adapters: Adapters that the user named.
    """
    found: dict[str, None] = {}  # a set in order: a model may be named twice
    for typed, output in outputs.items():
        places = places_of(output)
        for what in (*_of_models(places, paths, models), *_of_adapters(places, adapters)):
            found[f"{typed}: {what}; choose another name"] = None
        if not any(line.startswith(f"{typed}: ") for line in found):
            for file in replaced_inputs(output, files_of_models(paths, models, adapters)):  # hard links
                found[f"{typed}: it is {file}, which is timed; choose another name"] = None
    return list(found)


def files_of_models(
    paths: Sequence[Path], models: Sequence[BenchModel], adapters: Sequence[AdapterChoice]
) -> list[Path]:
    """Return the files of models and adapters, with the files that lie beside the models."""
    named = [adapter.path for adapter in adapters if adapter.path not in (None, Path())]
    found = [file for path in paths for file in (path, *_beside(path))]
    found += [file for model in models for file in model.files]
    return [*found, *(file for path in named if path is not None for file in files_of(path))]


def _of_models(places: set[Path], paths: Sequence[Path], models: Sequence[BenchModel]) -> Iterator[str]:
    read = {model.path: model.files for model in models}
    for path in paths:
        if places & places_of(path):
            yield f"it is the model {path} itself"
            continue
        beside = [file for place in places_of(path) for file in _beside(place)]
        belonging = {place for file in (*beside, *read.get(path, ())) for place in places_of(file)}
        if places & belonging:
            yield f"it belongs to the model {path}"


def _of_adapters(places: set[Path], adapters: Sequence[AdapterChoice]) -> Iterator[str]:
    for adapter in adapters:
        # An empty path, "NAME=", would mean the current folder.
        if adapter.path is None or adapter.path == Path():
            continue
        own = places_of(adapter.path)
        config = {place.with_name(_ADAPTER_CONFIG) for place in own} if is_file(adapter.path) else set()
        if any(place in own | config or not own.isdisjoint(place.parents) for place in places):
            yield f"it is, or lies in, the adapter {adapter.path}"


def _beside(model: Path) -> Iterator[Path]:
    """Yield the files that exporters and lora-export write beside a model."""
    yield model.with_name(model.name + ".data")
    yield model.with_name(model.name + "_data")
    yield model.with_suffix(".lora.json")
    if is_engine(model):
        yield record_path(model)
