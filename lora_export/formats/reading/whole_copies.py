"""Find which parameters a whole copy in a PEFT file replaces: one, or all that are tied to it.

For a module in ``modules_to_save``, PEFT makes a second module beside the base's, and the copy belongs only
to that one. PEFT loads every other copy (an embedding that is also saved, a bias) over the base's own
parameter: if the base ties that to others, the copy replaces all of them.

Source: PEFT 0.21, ``utils/other.py`` (``_set_trainable`` compares the ends of module paths, as plain text),
``utils/save_and_load.py`` (``set_peft_model_state_dict``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lora_export.adapter import Adapter
from lora_export.formats.reading.wrappers import unwrap_config

KEY = "modules_to_save"
# Parameters that a copy replaces: the named one, all that share its weight, or unknown.
Reach = Literal["one", "all", "unknown"]
_LOADED, _OWN = ".base_layer.", f".{KEY}."


def saved_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the modules that were trained whole, by a PEFT config."""
    names = unwrap_config(config, []).get(KEY) or ()
    return [names] if isinstance(names, str) else [name for name in names if isinstance(name, str)]


def is_in_module(parameter: str, name: str) -> bool:
    """Return whether a parameter belongs to a module, or to one inside it, whose path ends in a name."""
    module = parameter.rpartition(".")[0]
    while module:
        if module.endswith(name):
            return True
        module = module.rpartition(".")[0]
    return False


def is_saved(adapter: Adapter, parameter: str) -> bool:
    """Return whether a parameter belongs to a module that was trained whole, by the adapter's config."""
    return any(is_in_module(parameter, name) for name in saved_names(adapter.config))


def copy_reach(adapter: Adapter, parameter: str) -> Reach:
    """Return which parameters a whole copy in an adapter's file replaces.

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
