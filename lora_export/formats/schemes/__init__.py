"""Translate other names for a family's modules: scheme → ``module:attribute``, imported when it is used.

Trainers name modules like the code that they train with (Stability's, Black Forest Labs', …). If the base is
a diffusers (or newer transformers) model, such an adapter is translated before its sites are found. A new
scheme is one module with one `Scheme`, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from lora_export.errors import AdapterError
from lora_export.formats.reading.targeting import half_saved, refuse_unsaved

if TYPE_CHECKING:
    from lora_export.adapter import Adapter
    from lora_export.formats.schemes.applying import Translation
    from lora_export.formats.schemes.known import KnownModules
    from lora_export.formats.schemes.rules import Scheme

__all__ = ["SCHEMES", "fitted", "translate"]

SCHEMES: dict[str, str] = {
    "sgm-unet": "lora_export.formats.schemes.sgm_unet:SCHEME",
    "clip-text": "lora_export.formats.schemes.clip:TEXT",
    "clip-vision": "lora_export.formats.schemes.clip:VISION",
    "flux": "lora_export.formats.schemes.flux:SCHEME",
    "flux2": "lora_export.formats.schemes.flux2:SCHEME",
    "hunyuan-video": "lora_export.formats.schemes.hunyuan_video:SCHEME",
    "sd3": "lora_export.formats.schemes.sd3:SCHEME",
    "wan": "lora_export.formats.schemes.wan:SCHEME",
    "z-image": "lora_export.formats.schemes.z_image:SCHEME",
    "lumina2": "lora_export.formats.schemes.lumina2:SCHEME",
    "ltx": "lora_export.formats.schemes.ltx:SCHEME",
    "open-clip": "lora_export.formats.schemes.open_clip:SCHEME",
}
_SHOWN = 40
# Stability's ModelSpec, which sd-scripts writes into a file's metadata.
ARCHITECTURE = "modelspec.architecture"


def translate(
    adapter: Adapter, known: Collection[str], *, others: Callable[[], Iterable[str]] | None = None
) -> tuple[Adapter, tuple[str, ...]] | None:
    """Give an adapter the base's own names, if it has those of another scheme.

    Args:
        adapter: The adapter.
        known: Dotted parameter paths of the base, possibly with an outer prefix.
        others: If ``known`` is only what a graph exposes: function that returns the names of its other
            parameters, as far as it has names; they show how its blocks are built.

    Returns:
        The adapter with dotted paths, each module split or reordered as the base stores it, and notes. None
        if no scheme applies: the names fit already, or fit no scheme.

    Raises:
        AdapterError: A scheme applies but can't translate something, which is listed; or the file states
            another family.
    """
    from lora_export.formats.schemes.applying import apply_scheme
    from lora_export.formats.schemes.known import KnownModules

    recognised = [scheme for name in SCHEMES if (scheme := _scheme(name)).recognises(adapter)]
    if not recognised:
        return None
    modules = KnownModules(known, others)
    for scheme in recognised:
        _refuse_family(scheme, adapter, modules)
    found = [
        made for scheme in _likeliest(recognised, adapter) if (made := apply_scheme(scheme, adapter, modules))
    ]
    if not found:
        return None
    # The base decides between the others; if schemes still tie, they have the same result.
    best = min(found, key=lambda made: (len(made.missing), -made.found))
    _refuse(best, adapter, complete=others is None)
    note = f"adapter '{adapter.name}': names of {best.scheme.name} converted to the base's"
    return best.adapter, (note,)


def fitted(
    adapter: Adapter,
    known: Collection[str],
    notes: list[str],
    *,
    others: Callable[[], Iterable[str]] | None = None,
) -> Adapter:
    """Return the adapter with the base's names: translated if a scheme applies, else unchanged.

    Args:
        adapter: See `translate`.
        known: See `translate`.
        notes: List to add the adapter's notes and those of the translation to.
        others: See `translate`.

    Raises:
        AdapterError: The file lacks a module that was trained whole by its config; or as in `translate`.
    """
    refuse_unsaved(adapter, known)
    notes += [f"adapter '{adapter.name}': {note}" for note in (*adapter.notes, *half_saved(adapter, known))]
    found = translate(adapter, known, others=others)
    if found is None:
        return adapter
    notes += found[1]
    # A scope is for the adapter's own paths, which are now the base's.
    return replace(found[0], scope=None)


def _likeliest(schemes: list[Scheme], adapter: Adapter) -> list[Scheme]:
    """Return the schemes that leave the fewest of an adapter's names unexplained: relatives share some names.

    Schemes of other components name other modules, and are not compared.
    """
    from lora_export.formats.schemes.rules import unexplained

    left = {scheme.name: unexplained(scheme, adapter) for scheme in schemes}
    return [
        scheme
        for scheme in schemes
        if left[scheme.name] == min(left[s.name] for s in schemes if s.components == scheme.components)
    ]


def _refuse(made: Translation, adapter: Adapter, complete: bool) -> None:
    """Raise `AdapterError` for modules that can't be cut, and for gaps that leave all others in doubt."""
    if made.problems:
        raise AdapterError(
            f"adapter '{adapter.name}' has names of {made.scheme.name} that can't be converted to the base's",
            "give --component if the file is for several models, and the base that it was trained on",
            _listed(made.problems),
        )
    if not (made.missing and made.scheme.structural and complete):
        return
    raise AdapterError(
        f"adapter '{adapter.name}' has names of {made.scheme.name}, but {len(made.missing)} of its modules "
        "have no counterpart in the base: its blocks are built differently",
        "give the base that the adapter was trained on (SDXL, SD 1.5 and SD 2 differ)",
        _listed(made.missing),
    )


def _refuse_family(scheme: Scheme, adapter: Adapter, known: KnownModules) -> None:
    """Raise `AdapterError` if a file states another family with the same names of blocks."""
    from lora_export.formats.schemes.rules import TableScheme

    if not isinstance(scheme, TableScheme):
        return
    stated = str(adapter.config.get(ARCHITECTURE, "")).lower().replace(".", "-")
    trained = next((name for name in scheme.families if stated.startswith(name)), None)
    base = [name for name, modules in scheme.families.items() if any(map(known.find, modules))]
    if trained is None or not base or trained in base:
        return
    raise AdapterError(
        f"adapter '{adapter.name}' was trained on {trained}, by its {ARCHITECTURE} "
        f"({adapter.config[ARCHITECTURE]!r}), but the base is {base[0]}: only their names are the same",
        f"give the base that it was trained on; if it is for {base[0]}, correct the file's metadata",
    )


def _listed(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"… and {more} more"] if more > 0 else lines


def _scheme(name: str) -> Scheme:
    module, _, attribute = SCHEMES[name].partition(":")
    found: Scheme = getattr(import_module(module), attribute)
    return found
