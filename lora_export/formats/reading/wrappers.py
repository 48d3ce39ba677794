"""Remove the names that training tools put around a model.

A wrapper keeps the wrapped module as a submodule, and a state dict that was taken from outside carries that
submodule's name: ``torch.compile`` (``_orig_mod``), FSDP (``_fsdp_wrapped_module``), activation
checkpointing (``_checkpoint_wrapped_module``), Lightning Fabric (``_forward_module``), DataParallel and
DeepSpeed (``module``), Opacus (``_module``), and whatever attribute holds a PEFT model in a LightningModule
or in TRL's model with a value head. They are removed before a name is read, so that a config's patterns meet
the paths that PEFT matched them against.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "base_model.model."
# Private names of the tools, which no model uses for a submodule of its own.
_PRIVATE = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_fpw_module",
)
_FRONT = r"(?:_?module\.)"
_DOUBLED = re.compile(rf"^(?:{_FRONT}*{re.escape(PREFIX)})+")
_OUTER = re.compile(rf"^((?:.+?\.)?){re.escape(PREFIX)}")
_IN_PATTERN = re.compile(rf"(?:{'|'.join(_PRIVATE)})\\?\.")
_FLAT = re.compile(rf"(?:(?<=_)|^)(?:{'|'.join(_PRIVATE)})_")
# Words of a parameter's path: real ones have twenty, and what compares paths takes the square of it.
MOST_WORDS = 128
_SEPARATOR = re.compile(r"[._/]")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LISTS = ("target_parameters", "modules_to_save", "target_modules")


@dataclass(frozen=True)
class Unwrapped:
    """Names without wrappers.

    Attributes:
        paths: Name → name without wrappers, in the order of the names.
        problems: A line for each name that equals another one without wrappers.
    """

    paths: Mapping[str, str]
    problems: tuple[str, ...] = ()


def strip_wrappers(path: str) -> str:
    """Return a dotted path without the wrappers that are certain from this path alone.

    These are the tools' private names anywhere, ``module`` in front of ``base_model.model``, and all but one
    of several ``base_model.model``. An ordinary submodule called ``module`` stays.
    """
    left = ".".join(part for part in path.split(".") if part not in _PRIVATE)
    return _DOUBLED.sub(PREFIX, left) or path


def is_too_deep(path: str) -> bool:
    """Return whether a path, dotted or flattened, has more words than any parameter's."""
    return len(path) > MOST_WORDS and sum(1 for _ in _SEPARATOR.finditer(path)) >= MOST_WORDS


def strip_flat_wrappers(path: str) -> str:
    """Return a path whose dots are underscores without the tools' private names."""
    return _FLAT.sub("", path) or path


def unwrap(names: Iterable[str]) -> Unwrapped:
    """Remove every wrapper from the names of one file.

    Rules, in this order:
    1. Remove the wrappers that `strip_wrappers` removes.
    2. Remove an attribute in front of ``base_model.model`` if all of the file's PEFT names have the same one.
    3. Two names that become one are a problem.

    A ``module`` elsewhere may be DataParallel's or the model's own: that shows when the paths are looked up
    in a base, not here.
    """
    paths = {name: strip_wrappers(name) for name in names}  # rule 1
    problems = _strip_attribute(paths)  # rule 2
    owners: dict[str, str] = {}
    for name, path in paths.items():
        first = owners.setdefault(path, name)
        if first != name:  # rule 3
            problems.append(f"{name}: the same as {first} once the names of wrappers are removed ({path})")
    return Unwrapped(paths, tuple(problems))


def unwrap_config(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return a PEFT config whose patterns and names are free of the tools' private names, too.

    Args:
        config: The config.
        problems: Gets a line for each two keys of a pattern that become one and have different numbers,
            unless the first fits the module's path with wrappers and without: PEFT takes the first that fits.
    """
    made = dict(config)
    for key in _PATTERNS:
        if isinstance(pattern := config.get(key), Mapping):
            made[key] = _unwrap_pattern(key, pattern, problems)
    for key in _LISTS:
        if isinstance(listed := config.get(key), list):
            made[key] = [_IN_PATTERN.sub("", one) if isinstance(one, str) else one for one in listed]
    return made


def _unwrap_pattern(key: str, pattern: Mapping[Any, Any], problems: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name, value in pattern.items():
        plain = _IN_PATTERN.sub("", str(name))
        first = owners.setdefault(plain, str(name))
        if made.setdefault(plain, value) != value and first != plain:
            problems.append(
                f"config {key}: {first!r} says {made[plain]!r} and {str(name)!r} {value!r}, and they are one "
                "once the names of wrappers are removed; keep the one that the training used"
            )
    return made


def _strip_attribute(paths: dict[str, str]) -> list[str]:
    """Remove the attribute in front of ``base_model.model``, in place; return problems."""
    outer = {name: match[1] for name, path in paths.items() if (match := _OUTER.match(path))}
    fronts = sorted(set(outer.values()))
    if len(fronts) > 1:
        listed = ", ".join(f"{front}{PREFIX}" for front in fronts)
        return [f"the file holds several PEFT models ({listed}); save one of them alone"]
    for name, front in outer.items():
        paths[name] = strip_wrappers(paths[name][len(front) :])
    if fronts in ([], [""]):
        return []
    # Names beside the PEFT model: a head of the outer model may have the name of a module inside of it.
    return [
        f"{name}: not part of the PEFT model, whose names begin with {fronts[0]}{PREFIX}; save without it"
        for name in paths
        if name not in outer
    ]
