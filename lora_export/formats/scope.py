"""The part of an adapter that the user says belongs to the base: all below one path."""

from __future__ import annotations

from dataclasses import replace

from lora_export.adapter import Adapter


def within(adapter: Adapter, scope: str) -> Adapter:
    """Return an adapter with a scope, and where some of its paths are below it, with those alone.

    Where none are, the path is the base's own for the part that the adapter is for; whether the base has it
    is known when the adapter is placed (`lora_export.sites.renaming`).

    Args:
        adapter: Of a file without components.
        scope: Path of a submodel, ``model.encoder``.
    """
    below = f"{scope}_".replace(".", "_") if adapter.flattened else f"{scope}."
    modules = {key: module for key, module in adapter.modules.items() if module.path.startswith(below)}
    extras = {path: values for path, values in adapter.extras.items() if path.startswith(below)}
    if not modules and not extras:
        return replace(adapter, scope=scope)
    aside = [module for key, module in adapter.modules.items() if key not in modules]
    lost = {name for module in aside for name in module.tensor_names}
    lost |= {adapter.extra_tensors.get(path, path) for path in adapter.extras if path not in extras}
    count = len(aside) + len(adapter.extras) - len(extras)
    note = (
        (f"left aside, not below {scope!r}: {count} of the adapter's modules and parameters",)
        if count
        else ()
    )
    return replace(
        adapter,
        modules=modules,
        extras=extras,
        extra_tensors={path: name for path, name in adapter.extra_tensors.items() if path in extras},
        scope=scope,
        tensor_names=tuple(name for name in adapter.tensor_names if name not in lost),
        notes=(*adapter.notes, *note),
    )
