"""Which modules a PEFT config says that it changes.

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
from lora_export.formats.reading.patterns import fullmatch, match, within
from lora_export.formats.reading.whole_copies import is_below, saved_names

# The keys that say it.
RULES = ("target_modules", "exclude_modules", "layers_to_transform")
_WEIGHT = ".weight"
_NUMBERS = re.compile(r"\.\d+(?=\.|$)")
_ALL_LINEAR = "all-linear"
_EXAMPLES = 2


def is_targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT would make a LoRA layer at ``path``; True where the config doesn't tell.

    Args:
        config: PEFT's.
        path: Of a module, in the base.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _matches("exclude_modules", excluded, path):
        return False
    if not targets or targets == _ALL_LINEAR:
        return True
    if not _matches("target_modules", targets, path):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or isinstance(targets, str) or path in targets:
        return True
    return _layer_of(path, config.get("layers_pattern")) in (layers if isinstance(layers, list) else [layers])


def untouched(config: Mapping[str, Any], paths: Collection[str], known: Iterable[str]) -> list[str]:
    """Return modules like an adapter's that its config means, and for which it has nothing.

    A file that was saved by one process of several, or for a shorter model, has some layers only. PEFT warns
    of them ("Found missing adapter keys").

    Args:
        config: PEFT's.
        paths: The adapter's modules.
        known: The base's parameters.
    """
    held = {_NUMBERS.sub(".#", path) for path in paths}
    modules = {name.removesuffix(_WEIGHT) for name in known if name.endswith(_WEIGHT)}
    if not modules.issuperset(paths):
        return []  # The base has other names for them: which layers are meant can't be told.
    alike = (path for path in modules.difference(paths) if _NUMBERS.sub(".#", path) in held)
    return sorted(path for path in alike if is_targeted(config, path))


def unsaved(config: Mapping[str, Any], held: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names of ``modules_to_save`` that a base has modules of, and a file nothing.

    PEFT stops at such a file. A name that no module of the base has is none: PEFT itself adds ``classifier``
    and ``score`` for every classifier.

    Args:
        config: PEFT's.
        held: All that the file changes, as parameter paths.
        known: The base's parameters.
    """
    names = saved_names(config)
    if not names or config.get("ensure_weight_tying"):
        return []  # What is tied is stored once.
    inside = list(held)
    missing = [name for name in names if not any(is_below(path, name) for path in inside)]
    return [name for name in missing if any(is_below(path, name) for path in known)] if missing else []


def refuse_unsaved(adapter: Adapter, known: Collection[str]) -> None:
    """Raise `AdapterError` where the base's own untrained module would be left in place of a trained one.

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
            f"adapter '{adapter.name}' lacks what its config says was trained whole (modules_to_save)",
            "save it again with all of its tensors (DeepSpeed and FSDP have to gather them first); where it "
            "was not trained, take the name out of modules_to_save in adapter_config.json",
            [f"{name}: the base has it, and the file holds nothing of it" for name in missing],
        )


def half_saved(adapter: Adapter, known: Collection[str]) -> list[str]:
    """Say for which of the base's modules a PEFT file has nothing although its config means them.

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
        f"its config means {len(left)} more modules of this base ({', '.join(left[:_EXAMPLES])}"
        f"{', …' if len(left) > _EXAMPLES else ''}), for which the file has no tensors: they stay as they are"
    ]


def _matches(key: str, wanted: Any, path: str) -> bool:
    if isinstance(wanted, str):
        try:
            return fullmatch(key, wanted, path) is not None
        except re.error:
            return True
    ends = [end for end in wanted if isinstance(end, str)] if isinstance(wanted, list) else []
    return not ends or any(path == end or path.endswith(f".{end}") for end in ends)


def _layer_of(path: str, pattern: Any) -> int | None:
    """Return the number behind one of the patterns, by default behind any name."""
    patterns = [pattern] if isinstance(pattern, str) else pattern if isinstance(pattern, list) else []
    for name in patterns or [r"[^.]*"]:
        try:
            found = match("layers_pattern", rf".*\.{name}\.(\d+)\.", path)
        except re.error:
            continue
        if found:
            # A group of the pattern's own comes first, and PEFT takes it.
            number = found.group(1)
            return int(number) if number and number.isdecimal() else None
    return None
