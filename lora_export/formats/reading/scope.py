"""Select the part of an adapter that belongs to the base: one of its models, or everything below a path."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError

# Hint for several adapters that need different values of an option.
SHARED = (
    "an option applies to every --adapter: merge one after the other, each with its own options and the "
    "result as the base of the next; or load each in Python (load_adapter) and pass the results"
)


def part_of(adapter: Adapter, component: str) -> Adapter:
    """Return the named part of an adapter.

    Args:
        adapter: Any adapter.
        component: ``unet``, ``text_encoder``, … of an adapter for several models; else a submodel's path; or
            both, ``text_encoder:clip.text_model``.

    Raises:
        AdapterError: The adapter is for several models, but not for this one.
    """
    name, _, path = component.partition(":")
    components = {module.component for module in adapter.modules.values()}
    if name in components:
        mine = [key for key, module in adapter.modules.items() if module.component == name]
        others = [*adapter.extras, *adapter.token_rows]
        kept = replace(only_some(adapter, mine, others, f"not of {name!r}"), part=name)
        return within_scope(kept, path) if path else kept
    if len(components) > 1 or path:
        raise unknown_component(adapter.name, name, components)
    return within_scope(adapter, component)


def how_to_part(adapter: Adapter, parameters: Collection[str]) -> str:
    """Return a hint for modules of an adapter that change the same parameter of the base.

    Args:
        adapter: The adapter.
        parameters: Parameters of modules that share a place with another one, as the plan names them.
    """
    doubled = [m for m in adapter.modules.values() if f"{m.path}.{m.parameter}" in parameters]
    components = sorted({module.component for module in doubled if module.component})
    if len(components) > 1:
        return f"give --component with the one of {', '.join(components)} that the base is"
    return "save the adapter without one of the modules that have the same place"


def unknown_component(adapter: str, name: str, existing: Iterable[str | None]) -> AdapterError:
    """Return the error for a model that an adapter's file does not serve."""
    known = sorted(component for component in existing if component)
    return AdapterError(
        f"adapter '{adapter}' has no component '{name}'",
        f"give --component with the one of {', '.join(known)} that the base is"
        if known
        else "give the path of a submodel alone",
    )


def within_scope(adapter: Adapter, scope: str) -> Adapter:
    """Return an adapter with a scope; if some of its paths are below the scope, only those are kept.

    If none are, the scope is the base's own path of the part that the adapter is for; whether the base has it
    is found when the adapter's sites are (`lora_export.sites.naming.renaming`).

    Args:
        adapter: Adapter from a file without components.
        scope: Path of a submodel, ``model.encoder``.
    """
    below = f"{scope}_".replace(".", "_") if adapter.flattened else f"{scope}."
    modules = [
        key for key, module in adapter.modules.items() if f"{module.path}{below[-1]}".startswith(below)
    ]
    others = [path for path in (*adapter.extras, *adapter.token_rows) if path.startswith(below)]
    if not modules and not others:
        return replace(adapter, scope=scope)
    kept = only_some(adapter, modules, others, f"not below {scope!r}")
    components = {module.component for module in adapter.modules.values()}
    front = adapter.part if adapter.part and adapter.part in components else ""
    return replace(kept, scope=scope, part=f"{front}:{below[:-1]}")


def overlap(one: str | None, other: str | None, flattened: bool) -> bool:
    """Return whether two parts of one file (`Adapter.part`) have something in common.

    Args:
        one: A part; None for the whole file.
        other: Another part; None for the whole file.
        flattened: True if the file's paths have underscores for dots.
    """
    if one is None or other is None:
        return True
    # Earlier manifests have a "None" where there is no component.
    (name, path), (second, below) = (
        ("" if name == "None" else name, path) for name, _, path in (one.partition(":"), other.partition(":"))
    )
    if not (path and below):
        return name == second
    return name == second and (_is_within(path, below, flattened) or _is_within(below, path, flattened))


def _is_within(path: str, outer: str, flattened: bool) -> bool:
    return path == outer or path.startswith(outer + ("_" if flattened else "."))


def only_some(adapter: Adapter, modules: Iterable[str], others: Iterable[str], why: str) -> Adapter:
    """Return an adapter with some of its changes, and a note on the number of ignored ones.

    Args:
        adapter: The whole adapter.
        modules: Keys of the modules to keep.
        others: Paths of the whole parameters and of the embeddings with single rows to keep.
        why: Reason why the rest is ignored, for the note.
    """
    kept, whole = set(modules), set(others)
    aside = [module for key, module in adapter.modules.items() if key not in kept]
    lost = {name for module in aside for name in module.tensor_names}
    lost |= {adapter.extra_tensors.get(path, path) for path in adapter.extras if path not in whole}
    lost |= {rows.tensor_name for path, rows in adapter.token_rows.items() if path not in whole}
    count = len(aside) + len(adapter.extras) + len(adapter.token_rows) - len(whole)
    note = (f"ignored, {why}: {count} of the adapter's modules and parameters",) if count else ()
    return replace(
        adapter,
        modules={key: module for key, module in adapter.modules.items() if key in kept},
        extras={path: values for path, values in adapter.extras.items() if path in whole},
        token_rows={path: rows for path, rows in adapter.token_rows.items() if path in whole},
        extra_tensors={path: name for path, name in adapter.extra_tensors.items() if path in whole},
        tensor_names=tuple(name for name in adapter.tensor_names if name not in lost),
        notes=(*adapter.notes, *note),
    )
