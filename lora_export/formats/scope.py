"""The part of an adapter that the user says belongs to the base: one of its models, or all below a path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError


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
        kept = _only(adapter, mine, adapter.extras, adapter.token_rows, f"not of {name!r}")
        return within(kept, path) if path else kept
    if len(components) > 1 or path:
        raise unknown_component(adapter.name, name, components)
    return within(adapter, component)


def how_to_part(adapter: Adapter) -> str:
    """Return what to do about two modules of an adapter that have one place in the base."""
    components = sorted({module.component for module in adapter.modules.values() if module.component})
    if len(components) > 1:
        return f"give --component with one of {', '.join(components)}"
    return "save the adapter without one of the modules that have the same place"


def unknown_component(adapter: str, name: str, there: Iterable[str | None]) -> AdapterError:
    """Return the error for a model that an adapter's file does not serve."""
    known = sorted(component for component in there if component)
    return AdapterError(
        f"adapter '{adapter}' has no component '{name}'",
        f"give --component with one of {', '.join(known)}" if known else "give the path of a submodel alone",
    )


def within(adapter: Adapter, scope: str) -> Adapter:
    """Return an adapter with a scope, and where some of its paths are below it, with those alone.

    Where none are, the path is the base's own for the part that the adapter is for; whether the base has it
    is known when the adapter is placed (`lora_export.sites.renaming`).

    Args:
        adapter: Of a file without components.
        scope: Path of a submodel, ``model.encoder``.
    """
    below = f"{scope}_".replace(".", "_") if adapter.flattened else f"{scope}."
    modules = [key for key, module in adapter.modules.items() if module.path.startswith(below)]
    extras = [path for path in adapter.extras if path.startswith(below)]
    rows = [path for path in adapter.token_rows if path.startswith(below)]
    if not modules and not extras and not rows:
        return replace(adapter, scope=scope)
    return replace(_only(adapter, modules, extras, rows, f"not below {scope!r}"), scope=scope)


def _only(
    adapter: Adapter, modules: Iterable[str], extras: Iterable[str], rows: Iterable[str], why: str
) -> Adapter:
    """Return an adapter with some of its changes; a note says how many were left aside."""
    kept, whole, single = set(modules), set(extras), set(rows)
    aside = [module for key, module in adapter.modules.items() if key not in kept]
    lost = {name for module in aside for name in module.tensor_names}
    lost |= {adapter.extra_tensors.get(path, path) for path in adapter.extras if path not in whole}
    lost |= {held.tensor_name for path, held in adapter.token_rows.items() if path not in single}
    count = len(aside) + len(adapter.extras) - len(whole) + len(adapter.token_rows) - len(single)
    note = (f"left aside, {why}: {count} of the adapter's modules and parameters",) if count else ()
    return replace(
        adapter,
        modules={key: module for key, module in adapter.modules.items() if key in kept},
        extras={path: values for path, values in adapter.extras.items() if path in whole},
        extra_tensors={path: name for path, name in adapter.extra_tensors.items() if path in whole},
        token_rows={path: held for path, held in adapter.token_rows.items() if path in single},
        tensor_names=tuple(name for name in adapter.tensor_names if name not in lost),
        notes=(*adapter.notes, *note),
    )
