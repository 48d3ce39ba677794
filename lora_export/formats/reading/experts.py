"""What a file says of LoRA on a module's own parameters (PEFT's ``target_parameters``).

PEFT, ``tuners/lora/layer.py``, ``ParamWrapper``. A parameter of two dimensions changes by ``B·A`` in every
version. Of stacked experts ``(experts, rows, cols)`` lora_A acts on one of the two axes:

============================= ==================== ==========================
written by PEFT               a module that is     any other module
                              ``is_transposed``
============================= ==================== ==========================
before 0.19.0                 rows                 rows
0.19.0                        cols                 rows
0.19.1 and later              rows                 cols
============================= ==================== ==========================

``is_transposed`` is an attribute of the module, which the file doesn't say; nor does it say the version
before 0.18. Where the matrices are not square their shape proves which axis it is
(`lora_export.sites.experts`).

Nested wrappers: ``BaseTuner._inject_parameters`` wraps the targeted parameters of a module one around the
other in the order in which the module registered them: the last is the outermost and owns
``<module>.lora_A.weight``, the one inside it ``<module>.base_layer.lora_A.weight``, and so on. The file keeps
the nesting and the set of names, not the order, so that is known here for the modules that exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.adapter import Layout
from lora_export.formats.reading.patterns import fullmatch

# Registration order in transformers' expert modules; GPT-OSS has matrices of biases, DBRX w1, v1, w2.
REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "v1", "down_proj",
              "down_proj_bias", "w2")  # fmt: skip
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(\.?\w*)")


def layout_of(version: Any) -> tuple[bool, Layout]:
    """Return whether factors of stacked experts lie turned, and what else decides it, by PEFT's version.

    Args:
        version: ``peft_version`` of the config; None where it has none.
    """
    if version is None:
        return True, "known"
    match = _VERSION.match(str(version))
    if match is None:
        return False, "unknown"
    release = (int(match[1]), int(match[2]), int(match[3] or 0))
    # A development version is what comes before a release, at an unknown day.
    if match[4] and (0, 18, 0) < release <= (0, 19, 1):
        return False, "unknown"
    if release < (0, 19, 0):
        return True, "known"
    return (False, "class inverted") if release == (0, 19, 0) else (False, "class")


def parameters_of(path: str, targets: Sequence[str], levels: int) -> list[str]:
    """Return the names of the parameters of module ``path`` that ``targets`` mean.

    PEFT matches ``<module>.<parameter>`` against a target as a whole, or by its end from a dot on. A target
    without a module means every module that has such a parameter, which the file doesn't tell: it counts
    unless those with this module's name are as many as its nested pairs.

    Args:
        path: The module.
        targets: The config's ``target_parameters``.
        levels: How many nested pairs the file has for it.
    """
    bare, named = [], []
    for target in dict.fromkeys(targets):
        module, _, parameter = target.rpartition(".")
        if not module:
            bare.append(parameter)
        elif path == module or path.endswith(f".{module}"):
            named.append(parameter)
    found = list(dict.fromkeys([*named, *bare]))
    return named if len(found) != levels and len(named) == levels else found


def is_target_module(path: str, config: Mapping[str, Any]) -> bool:
    """Whether the config's ``target_modules`` mean a module: PEFT then wraps it, and none of its parameters.

    The rule is that of PEFT's ``check_target_module_exists``: a list holds ends of paths, from a dot on, and
    a text is a regular expression for the whole path.
    """
    return _listed(path, config, "target_modules") and not _listed(path, config, "exclude_modules")


def _listed(path: str, config: Mapping[str, Any], key: str) -> bool:
    names = config.get(key)
    if isinstance(names, str):
        try:
            return fullmatch(key, names, path) is not None
        except re.error:
            return False
    if not isinstance(names, Sequence):
        return False
    return any(isinstance(name, str) and (path == name or path.endswith(f".{name}")) for name in names)


def nesting(path: str, names: Sequence[str], levels: int, problems: list[str]) -> list[str]:
    """Return the parameter of each level, outermost first.

    Args:
        path: The module.
        names: Its targeted parameters.
        levels: How many nested pairs the file has for it.
        problems: Gets a line where file and config disagree, or the order can't be known.
    """
    if len(names) != levels:
        problems.append(
            f"{path}: the file has {levels} nested LoRA pairs, and target_parameters names "
            f"{len(names)} of its parameters ({', '.join(names) or 'none'})"
        )
        return []
    if levels == 1:
        return list(names)
    unknown = [name for name in names if name not in REGISTERED]
    if unknown:
        problems.append(
            f"{path}: target_parameters {', '.join(names)} are nested in the order in which the module "
            f"registered them, which the file doesn't say and we don't know for {', '.join(unknown)}; "
            "save one adapter for each parameter"
        )
        return []
    return sorted(names, key=REGISTERED.index, reverse=True)
