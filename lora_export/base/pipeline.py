"""Refuse adapters whose file names another part of a pipeline than the base is.

Parts of a pipeline may be built alike (Wan 2.2's transformers, SDXL's text encoders), so that the adapter of
one finds a site for each target in the other. The folder's name tells which part a base is: with
``model_index.json`` in the folder above or, for names that diffusers' pipelines have, without it.

Rules:

1. A component that the file names is the base's own, or the adapter is refused.
2. ``diffusion_model.`` and kohya's ``lora_unet_`` are trainers' names for any denoiser.
3. If the base's component is unknown, the first of a kind (``transformer``, ``text_encoder``) is assumed, and
   a further one (``transformer_2``) only if the user says so.
4. The user's ``--component`` decides; a note says if it contradicts the folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from lora_export.adapter import Adapter, LoraModule
from lora_export.errors import AdapterError, LoraExportError
from lora_export.formats.reading.diffusion_names import COMPONENT
from lora_export.formats.reading.scope import SHARED
from lora_export.sites.naming.towers import kinds_of_class, kinds_of_words, other_kind
from lora_export.untrusted.documents import read_json

_SHOWN = 4
INDEX = "model_index.json"
_FURTHER = re.compile(r"\w+_[2-9]|te[2-9]")
# Names of denoisers (rule 2).
_ANY_DENOISER = re.compile(r"(?:^|\.)diffusion_model[._]|^lora_unet_")
_NO_DENOISER = re.compile(
    r"\w*encoder\w*|\w*vae\w*|controlnet\w*|safety_checker|text_conditioner|tokenizer\w*"
)
# kohya's name of Anima's AnimaTextConditioner.
_SAME = {"llm_adapter": "text_conditioner"}


def component_of(folder: Path) -> str | None:
    """Return the component of a pipeline that a folder holds; None if its name doesn't tell.

    Args:
        folder: Folder of a checkpoint, or that of a graph.
    """
    # A link may have another name than the folder, and either may be the pipeline's.
    for place in dict.fromkeys((folder.absolute(), folder.resolve())):
        if place.name in _components(place.parent) or COMPONENT.fullmatch(f"{place.name}."):
            return place.name
    return None


def refuse_other_components(adapters: Iterable[Adapter], places: Sequence[Path]) -> list[str]:
    """Refuse adapters with a part for another component than a base is.

    Args:
        adapters: Adapters for the base.
        places: Folders whose names may tell the base's component, the surest first.

    Returns:
        A note for each adapter that is accepted against the base's name, as the user says.

    Raises:
        AdapterError: An adapter is not for the base; the first one is reported.
    """
    notes: list[str] = []
    adapters = list(adapters)
    place, own = next(((p, name) for p in places if (name := component_of(p))), (None, None))
    for adapter in adapters:
        named = components_named(adapter)
        if place is not None and own is not None:
            there = _components(place.absolute().parent)
            others = [name for name, modules in named.items() if not is_own(name, own, modules, there)]
            if not others:
                continue
            if adapter.part is None and adapter.scope is None:
                raise _shared(
                    _other(adapter, place, own=own, named=named, others=others),
                    adapters,
                    set(named) - set(others),
                )
            notes.append(
                f"adapter '{adapter.name}': its part {', '.join(others)} goes into the pipeline's {own}, as "
                "--component says"
            )
        elif adapter.part is None and adapter.scope is None and any(map(_FURTHER.fullmatch, named)):
            raise _shared(_unknown(adapter, places, named), adapters, set(named))
    return notes


def _shared(error: AdapterError, adapters: Sequence[Adapter], parts: Collection[str]) -> AdapterError:
    """Return an error with a hint in case ``--component`` does not fit all of several adapters."""
    if all(set(parts) <= set(components_named(adapter)) for adapter in adapters):
        return error
    return AdapterError(error.message, f"{error.hint}; {SHARED}", error.problems)


def components_named(adapter: Adapter) -> dict[str, list[LoraModule]]:
    """Return the components that a file names, each with its modules."""
    found: dict[str, list[LoraModule]] = {}
    for module in adapter.modules.values():
        if module.component is not None:
            found.setdefault(module.component, []).append(module)
    return found


def _components(pipeline: Path) -> Collection[str]:
    """Return the components of a pipeline's folder; none if it isn't one."""
    try:
        index = read_json(pipeline / INDEX)
    except LoraExportError:
        return ()
    entries = index.items() if isinstance(index, dict) else ()
    return [name for name, value in entries if isinstance(value, list)]


def is_own(name: str, own: str, modules: Sequence[LoraModule], pipeline: Collection[str]) -> bool:
    """Return True if a component that a file names is the base's (rules 1 and 2)."""
    if _SAME.get(name, name) == own:
        return True
    tensors = [tensor for module in modules for tensor in module.tensor_names]
    if all(map(_ANY_DENOISER.search, tensors)):
        return not _NO_DENOISER.fullmatch(own)
    # FLUX.1's T5 has SD 3's name: https://github.com/kohya-ss/sd-scripts ``networks/lora_flux.py``.
    is_t5 = name == "text_encoder_3" and all(tensor.startswith("lora_te3_") for tensor in tensors)
    return is_t5 and own == "text_encoder_2" and bool(pipeline) and name not in pipeline


def _other(
    adapter: Adapter, place: Path, own: str, named: Collection[str], others: Sequence[str]
) -> AdapterError:
    """Return the error for a file that names another component than the base's (rule 1)."""
    mine = [name for name in named if name not in others]
    listed = ", ".join(f"'{name}'" for name in others)
    if mine:
        return AdapterError(
            f"adapter '{adapter.name}' is for {listed} as well, and {place} is the pipeline's '{own}'",
            f"--component {mine[0]} takes the part that belongs; for the others give their folders",
            _lines(adapter, others),
        )
    meant = " or ".join(str(place.absolute().parent / name) for name in others)
    alike = [name for name in others if _kind(name) == _kind(own)]
    here = f"; if it is meant for this one, say so with --component {alike[0]}" if alike else ""
    return AdapterError(
        f"adapter '{adapter.name}' is for the pipeline's {listed}, and {place} is its '{own}'",
        f"give {meant} as the base{here}",
        _lines(adapter, others),
    )


def _unknown(adapter: Adapter, places: Sequence[Path], named: Collection[str]) -> AdapterError:
    """Return the error for a further component and a base whose component is unknown (rule 3)."""
    further = [name for name in named if _FURTHER.fullmatch(name)]
    where = f" {places[0]}" if places else ""
    fitting = [name for name in named if places and _may_hold(places[0], name)]
    says = " or ".join(f"--component {name}" for name in fitting)
    hint = f"say which part belongs to the base with {says}"
    if not fitting:
        hint = "give the base that the adapter was trained on: this one is of another kind"
    elif len(fitting) == 1:
        hint = f"if the base is the pipeline's {fitting[0]}, say so with {says}"
    return AdapterError(
        f"adapter '{adapter.name}' names {', '.join(further)}, and nothing says that the base{where} is this "
        "one of several parts that may be built alike",
        hint,
        _lines(adapter, further),
    )


def _kind(name: str) -> frozenset[str]:
    """Return the kinds of model that a component's name denotes."""
    return kinds_of_words(name.split("_")) if _NO_DENOISER.fullmatch(name) else frozenset({"denoiser"})


def _may_hold(folder: Path, name: str) -> bool:
    """Return True if a folder may hold a component, by the class that its config names."""
    try:
        config = read_json(folder / "config.json")
    except LoraExportError:
        return True
    if not isinstance(config, dict):
        return True
    if "_class_name" in config:  # diffusers: its pipelines' encoders are models of transformers
        return not re.fullmatch(r"(?:text|image)_encoder\w*", name)
    is_transformers = bool(config.get("architectures") or config.get("model_type"))
    is_denoiser = _NO_DENOISER.fullmatch(name) is None
    return not (is_transformers and (is_denoiser or other_kind(name, kinds_of_class(config), ())))


def _lines(adapter: Adapter, components: Collection[str]) -> list[str]:
    modules = [module for module in adapter.modules.values() if module.component in components]
    names = [name for module in modules for name in module.tensor_names if not name.endswith("alpha")]
    return [f"the adapter has {name}" for name in names[:_SHOWN]]
