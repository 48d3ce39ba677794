"""The part of an adapter that the user says belongs to the base: one of its models, or all below a path."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError

# What to do where a hint's option does not fit all of several adapters.
SHARED = (
    "an option holds for every --adapter: merge one after the other, each with its own options and the "
    "result as the base of the next; or load each in Python (load_adapter) and give these"
)


def part_of(adapter: Adapter, component: str) -> Adapter:
    """Return the part of an adapter that is named.

    Args:
        adapter: Any.
        component: ``unet``, ``text_encoder``, … of an adapter for several models; else a submodel's path; or
            both, ``text_encoder:clip.text_model``.

    Raises:
        AdapterError: The adapter is for several models, and not for this one.
    """
    name, _, path = component.partition(":")
    components = {module.component for module in adapter.modules.values()}
    if name in components:
        mine = [key for key, module in adapter.modules.items() if module.component == name]
        others = [*adapter.extras, *adapter.token_rows]
        kept = replace(_only(adapter, mine, others, f"not of {name!r}"), part=name)
        return within(kept, path) if path else kept
    if len(components) > 1 or path:
        raise unknown_component(adapter.name, name, components)
    return within(adapter, component)


def how_to_part(adapter: Adapter, parameters: Collection[str]) -> str:
    """Return what to do about modules of an adapter that have one place in the base.

    Args:
        adapter: The adapter.
        parameters: What has a place that something else has as well, as the plan calls it.
    """
    doubled = [m for m in adapter.modules.values() if f"{m.path}.{m.parameter}" in parameters]
    components = sorted({module.component for module in doubled if module.component})
    if len(components) > 1:
        return f"give --component with the one of {', '.join(components)} that the base is"
    return "save the adapter without one of the modules that have the same place"


def unknown_component(adapter: str, name: str, there: Iterable[str | None]) -> AdapterError:
    """Return the error for a model that an adapter's file does not serve."""
    known = sorted(component for component in there if component)
    return AdapterError(
        f"adapter '{adapter}' has no component '{name}'",
        f"give --component with the one of {', '.join(known)} that the base is"
        if known
        else "give the path of a submodel alone",
    )


def within(adapter: Adapter, scope: str) -> Adapter:
    """Return an adapter with a scope, and where some of its paths are below it, with those alone.

    Where none are, the path is the base's own for the part that the adapter is for; whether the base has it
    is known when the adapter is placed (`lora_export.sites.naming.renaming`).

    Args:
        adapter: Of a file without components.
        scope: Path of a submodel, ``model.encoder``.
    """
    below = f"{scope}_".replace(".", "_") if adapter.flattened else f"{scope}."
    modules = [key for key, module in adapter.modules.items() if module.path.startswith(below)]
    others = [path for path in (*adapter.extras, *adapter.token_rows) if path.startswith(below)]
    if not modules and not others:
        return replace(adapter, scope=scope)
    kept = _only(adapter, modules, others, f"not below {scope!r}")
    components = {module.component for module in adapter.modules.values()}
    front = adapter.part if adapter.part in components else ""
    return replace(kept, scope=scope, part=f"{front}:{below[:-1]}")


def share(one: str | None, other: str | None, flattened: bool) -> bool:
    """Whether two parts of one file (`Adapter.part`) have something in common.

    Args:
        one: A part; None for the whole file.
        other: Another.
        flattened: The file's paths have underscores for dots.
    """
    if one is None or other is None:
        return True
    (name, _, path), (second, _, below) = one.partition(":"), other.partition(":")
    if not (path and below):
        return name == second
    return name == second and (_is_within(path, below, flattened) or _is_within(below, path, flattened))


def _is_within(path: str, outer: str, flattened: bool) -> bool:
    return path == outer or path.startswith(outer + ("_" if flattened else "."))


def _only(adapter: Adapter, modules: Iterable[str], others: Iterable[str], why: str) -> Adapter:
    """Return an adapter with some of its changes; a note says how many were left aside.

    Args:
        adapter: All of them.
        modules: Keys of the modules to keep.
        others: Paths of the whole parameters and of the embeddings with single rows to keep.
        why: Why the rest is left aside.
    """
    kept, whole = set(modules), set(others)
    aside = [module for key, module in adapter.modules.items() if key not in kept]
    lost = {name for module in aside for name in module.tensor_names}
    lost |= {adapter.extra_tensors.get(path, path) for path in adapter.extras if path not in whole}
    lost |= {rows.tensor_name for path, rows in adapter.token_rows.items() if path not in whole}
    count = len(aside) + len(adapter.extras) + len(adapter.token_rows) - len(whole)
    note = (f"left aside, {why}: {count} of the adapter's modules and parameters",) if count else ()
    return replace(
        adapter,
        modules={key: module for key, module in adapter.modules.items() if key in kept},
        extras={path: values for path, values in adapter.extras.items() if path in whole},
        token_rows={path: rows for path, rows in adapter.token_rows.items() if path in whole},
        extra_tensors={path: name for path, name in adapter.extra_tensors.items() if path in whole},
        tensor_names=tuple(name for name in adapter.tensor_names if name not in lost),
        notes=(*adapter.notes, *note),
    )
