"""Refuse Python code that a checkpoint names as its own: it is never run, and nobody is asked to allow it.

A config's ``auto_map`` names classes in files of the folder, or of another repository, and transformers
imports them if ``trust_remote_code`` is true. If it is not given, transformers asks on the terminal, and a
``y`` on stdin is a yes (``dynamic_module_utils.resolve_trust_remote_code``, transformers 5). Every call of
ours gives False; calls that transformers makes itself (for a part of a composite model) don't give it, so
there is `never_asked`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import CheckpointError
from lora_export.machines.held_setting import HeldSetting

_KEY = "auto_map"
# Keys that name a kernel, one of the hub if it has a "/" (transformers ``integrations/hub_kernels.py``).
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_SHOWN = 3


def named_code(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a config, or a part of it, names in code of its own: ``modeling_x.XModel``."""
    found = [name for level in _levels(config) for name in _texts(level.get(_KEY))]
    return list(dict.fromkeys(found))


def code_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on a config that names code of its own; none for others."""
    named = named_code(config)
    if not named:
        return ()
    return (f"the base's config.json names Python code of its own ({_listed(named)}): it is not run",)


def why_not_built(config: Mapping[str, Any]) -> str:
    """Return the reason why transformers can't build a model without running foreign code, or "".

    Raises:
        ImportError: transformers is missing.
    """
    kernels = [name for level in _levels(config) for key in _KERNELS for name in _texts(level.get(key))]
    if fetched := [name for name in kernels if "/" in name]:
        return f"its config names a kernel to fetch and run: {_listed(fetched)}"
    named = named_code(config)
    if not named:
        return ""
    import transformers

    start = f"its config's {_KEY} names Python code of its own ({_listed(named)}), which is never run, and "
    known = transformers.CONFIG_MAPPING
    for level in (level for level in _levels(config) if level.get(_KEY)):
        kind = level.get("model_type")
        # A part without a type is read by its owner's class, not through the table.
        if (kind is not None or level is config) and not (isinstance(kind, str) and kind in known):
            return f"{start}transformers {transformers.__version__} has no model_type {kind!r}"
    names = config.get("architectures") or []
    if not any(model_class(name) for name in names):
        return f"{start}transformers {transformers.__version__} has none of the architectures {names}"
    return ""


def refuse_own_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if transformers can't build a model without running foreign code."""
    try:
        why = why_not_built(config)
    except ImportError:
        return  # Loading it says what is missing.
    if why:
        raise CheckpointError(
            f"{folder} can't be loaded: {why}",
            "update transformers if it knows the model by now; or read the code, export the model yourself "
            "and go on with that .onnx (lora-export merge takes the folder: it builds no model)",
        )


def model_class(name: str) -> Any:
    """Return transformers' model class of a name; None if it has none.

    Raises:
        ImportError: A package that the class needs is missing.
    """
    import transformers

    kind = getattr(transformers, name, None)
    if not isinstance(kind, type):
        return None
    if issubclass(kind, transformers.PreTrainedModel):
        return kind
    # A stand-in for a class whose package is missing raises here; others (AutoModel) are not a model's.
    kind._from_config  # type: ignore[attr-defined]  # noqa: B018
    return None


def _ask_no_more() -> Callable[[], None]:
    """Set transformers' time limit for an answer to 0, so that it does not ask."""
    from transformers import dynamic_module_utils as asking

    before, asking.TIME_OUT_REMOTE_CODE = asking.TIME_OUT_REMOTE_CODE, 0

    def put_back() -> None:
        asking.TIME_OUT_REMOTE_CODE = before

    return put_back


_SWITCH = HeldSetting(_ask_no_more)


def never_asked() -> contextlib.AbstractContextManager[None]:
    """Return a context in which transformers refuses code of a checkpoint's own instead of asking for it."""
    return _SWITCH.held()


def _levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config and all mappings in it, the outermost first; not recursive: its depth is untrusted."""
    waiting: list[Any] = [config]
    while waiting:
        level = waiting.pop()
        if isinstance(level, Mapping):
            yield level
            waiting += [value for key, value in level.items() if key != _KEY]
        elif isinstance(level, list):
            waiting += level


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a value: itself, a list's, a mapping's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner if isinstance(inner, str | list) else None)
    elif isinstance(value, list):
        yield from (inner for inner in value if isinstance(inner, str))


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
