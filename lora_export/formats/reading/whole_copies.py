"""Whole copies of parameters in a PEFT file: which of them PEFT makes a parameter of its own of.

For a module that ``modules_to_save`` names PEFT makes a second module beside the base's, and the copy is that
one's alone. Every other copy (an embedding saved along, a bias) it loads over the base's own parameter: where
the base ties that to others, all of them are the copy from then on.

Source: PEFT 0.21, ``utils/other.py`` (``_set_trainable`` compares the ends of module paths, as plain text),
``utils/save_and_load.py`` (``set_peft_model_state_dict``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lora_export.adapter import Adapter
from lora_export.formats.reading.wrappers import unwrap_config

KEY = "modules_to_save"
# Which parameters a copy replaces: the named one; all that share its weight; or that is not known.
Reach = Literal["one", "all", "unknown"]
_LOADED, _OWN = ".base_layer.", f".{KEY}."


def saved_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the modules that a PEFT config says were trained whole."""
    names = unwrap_config(config, []).get(KEY) or ()
    return [names] if isinstance(names, str) else [name for name in names if isinstance(name, str)]


def is_below(parameter: str, name: str) -> bool:
    """Whether a parameter is of a module, or of one inside it, whose path ends in a name."""
    module = parameter.rpartition(".")[0]
    while module:
        if module.endswith(name):
            return True
        module = module.rpartition(".")[0]
    return False


def is_saved(adapter: Adapter, parameter: str) -> bool:
    """Whether a parameter belongs to a module that the adapter's config says was trained whole."""
    return any(is_below(parameter, name) for name in saved_names(adapter.config))


def reach_of(adapter: Adapter, parameter: str) -> Reach:
    """Return which parameters a copy of one in an adapter's file replaces.

    Args:
        adapter: The adapter.
        parameter: The copy's path, one of its extras.
    """
    if adapter.format != "peft":
        return "one"
    tensor = adapter.extra_tensors.get(parameter, parameter)
    if _OWN in tensor or is_saved(adapter, parameter):
        return "one"
    return "all" if _LOADED in tensor or KEY in adapter.config else "unknown"
