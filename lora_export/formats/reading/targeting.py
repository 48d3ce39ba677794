"""Find the modules that a PEFT config targets, and those among them that a file lacks.

The rule is PEFT's (``peft.tuners.tuners_utils.check_target_module_exists``): a module is a target if its path
matches ``target_modules`` (a regular expression for the whole path, or a list of ends), ``exclude_modules``
does not, and it lies in one of ``layers_to_transform``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats.reading.name_ends import has_end, names_inside, names_of
from lora_export.formats.reading.patterns import fullmatch, match, remembered, within
from lora_export.formats.reading.whole_copies import saved_names

# The keys with these rules.
RULES = ("target_modules", "exclude_modules", "layers_to_transform")
_WEIGHT = ".weight"
_NUMBERS = re.compile(r"\.\d+(?=\.|$)")
_ALL_LINEAR = "all-linear"
_EXAMPLES = 2


def is_targeted(config: Mapping[str, Any], path: str) -> bool:
    """Return whether PEFT would make a LoRA layer at ``path``; True if the config doesn't decide it.

    Args:
        config: PEFT's config.
        path: Path of a module in the base.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _matches("exclude_modules", excluded, path):
        return False
    if not targets or targets == _ALL_LINEAR:
        return True
    if not _matches("target_modules", targets, path):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or isinstance(targets, str) or path in names_of(targets):
        return True
    return _layer_of(path, config.get("layers_pattern")) in _numbers(layers)


def _numbers(layers: Any) -> frozenset[int | None]:
    """Return the numbers of ``layers_to_transform``."""
    if not isinstance(layers, list):
        return frozenset({layers} if isinstance(layers, int) else ())
    return remembered(layers, lambda: frozenset(n for n in layers if n is None or isinstance(n, int)))


def untouched(config: Mapping[str, Any], paths: Collection[str], known: Iterable[str]) -> list[str]:
    """Return modules like the adapter's, in other layers, that its config targets but the file lacks.

    A file saved by one of several processes, or for a shorter model, has only some layers. PEFT warns about
    them ("Found missing adapter keys").

    Args:
        config: PEFT's config.
        paths: Paths of the adapter's modules.
        known: The base's parameters.
    """
    held = {_NUMBERS.sub(".#", path) for path in paths}
    modules = {name.removesuffix(_WEIGHT) for name in known if name.endswith(_WEIGHT)}
    if not modules.issuperset(paths):
        return []  # The base has other names for them, so the targeted layers are unknown.
    alike = (path for path in modules.difference(paths) if _NUMBERS.sub(".#", path) in held)
    return sorted(path for path in alike if is_targeted(config, path))


def unsaved(config: Mapping[str, Any], held: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names in ``modules_to_save`` that the base has modules for, but the file has no tensors.

    PEFT refuses such a file. A name that the base has no module for doesn't count: PEFT itself adds
    ``classifier`` and ``score`` for every classifier.

    Args:
        config: PEFT's config.
        held: Paths of all parameters that the file changes.
        known: The base's parameters.
    """
    names = saved_names(config)
    if not names or config.get("ensure_weight_tying"):
        return []  # What is tied is stored once.
    inside = list(held)
    saved = names_inside(inside, names)
    missing = [name for name in names if name not in saved]
    there = names_inside(known, missing)
    return [name for name in missing if name in there]


def refuse_unsaved(adapter: Adapter, known: Collection[str]) -> None:
    """Raise `AdapterError` if the base's own untrained module would stay in place of a trained one.

    Args:
        adapter: The adapter.
        known: The base's parameters.
    """
    if adapter.format != "peft" or adapter.scope:
        return
    held = [
        *adapter.extras,
        *adapter.token_rows,
        *(f"{m.path}.{m.parameter}" for m in adapter.modules.values()),
    ]
    if missing := unsaved(adapter.config, held, known):
        raise AdapterError(
            f"adapter '{adapter.name}' lacks modules that its config lists in modules_to_save",
            "save it again with all of its tensors (DeepSpeed and FSDP have to gather them first); if a "
            "module was not trained, remove its name from modules_to_save in adapter_config.json",
            [f"{name}: the base has it, but the file has no tensor of it" for name in missing],
        )


def half_saved(adapter: Adapter, known: Collection[str]) -> list[str]:
    """Return a note on modules of the base that a PEFT file's config targets but the file lacks.

    Args:
        adapter: The adapter.
        known: The base's parameters.
    """
    paths = {module.path for module in adapter.modules.values() if module.parameter == "weight"}
    if adapter.format != "peft" or adapter.scope or not adapter.config.get("target_modules"):
        return []
    with within(f"adapter '{adapter.name}' ({adapter.source})"):
        left = untouched(adapter.config, paths, known)
    if not left:
        return []
    return [
        f"its config targets {len(left)} more modules of this base ({', '.join(left[:_EXAMPLES])}"
        f"{', …' if len(left) > _EXAMPLES else ''}), but the file has no tensors for them: they don't change"
    ]


def _matches(key: str, wanted: Any, path: str) -> bool:
    if isinstance(wanted, str):
        try:
            return fullmatch(key, wanted, path) is not None
        except re.error:
            return True
    return not isinstance(wanted, list) or not names_of(wanted) or has_end(path, wanted)


def _layer_of(path: str, pattern: Any) -> int | None:
    """Return the number after one of the patterns, by default after any name."""
    patterns = [pattern] if isinstance(pattern, str) else pattern if isinstance(pattern, list) else []
    for name in patterns or [r"[^.]*"]:
        try:
            found = match("layers_pattern", rf".*\.{name}\.(\d+)\.", path)
        except re.error:
            continue
        if found:
            # If the pattern has a group, that is the first one, and PEFT uses it.
            number = found.group(1)
            return int(number) if number and number.isdecimal() else None
    return None
