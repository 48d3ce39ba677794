"""Read LoRA on a module's own parameters (PEFT's ``target_parameters``).

PEFT, ``tuners/lora/layer.py``, ``ParamWrapper``. A parameter of two dimensions changes by ``B·A`` in every
version. For stacked experts ``(experts, rows, cols)``, lora_A acts on one of the two axes:

============================= ==================== ==========================
written by PEFT               a module that is     any other module
                              ``is_transposed``
============================= ==================== ==========================
before 0.19.0                 rows                 rows
0.19.0                        cols                 rows
0.19.1 and later              rows                 cols
============================= ==================== ==========================

``is_transposed`` is an attribute of the module, which the file doesn't record; before 0.18, it doesn't
record the version either. If the matrices are not square, their shape proves the axis
(`lora_export.sites.experts`).

Nested wrappers: ``BaseTuner._inject_parameters`` wraps the targeted parameters of a module one around the
other in the order in which the module registered them: the last is the outermost and owns
``<module>.lora_A.weight``, the one inside it ``<module>.base_layer.lora_A.weight``, and so on. The file keeps
the nesting and the set of names, but not the order, so the order for the known modules is listed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.adapter import Layout
from lora_export.formats.reading.name_ends import by_module, has_end, path_ends, some
from lora_export.formats.reading.patterns import fullmatch

# Registration order in transformers' expert modules; GPT-OSS has matrices of biases, DBRX w1, v1, w2.
REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "v1", "down_proj",
              "down_proj_bias", "w2")  # fmt: skip
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(\.?\w*)")


def expert_layout(version: Any) -> tuple[bool, Layout]:
    """Return whether factors of stacked experts are turned, and how sure that is, for a PEFT version.

    Args:
        version: ``peft_version`` of the config; None if it has none.
    """
    if version is None:
        return True, "known"
    match = _VERSION.match(str(version))
    if match is None:
        return False, "unknown"
    release = (int(match[1]), int(match[2]), int(match[3] or 0))
    # A development version is from an unknown day before the release.
    if match[4] and (0, 18, 0) < release <= (0, 19, 1):
        return False, "unknown"
    if release < (0, 19, 0):
        return True, "known"
    return (False, "class inverted") if release == (0, 19, 0) else (False, "class")


def parameter_names(path: str, targets: Sequence[str], levels: int) -> list[str]:
    """Return the names of the parameters of a module that ``targets`` mean.

    PEFT matches ``<module>.<parameter>`` against a target as a whole, or by its end from a dot on. A target
    without a module means every module that has such a parameter, which the file doesn't show: it counts
    unless the targets with this module's name are as many as its nested pairs.

    Args:
        path: Path of the module.
        targets: The config's ``target_parameters``.
        levels: Number of nested pairs that the file has for it.
    """
    known = by_module(targets)
    bare = [parameter for _, parameter in known.get("", ())]
    fitting = sorted(found for end in path_ends(path) if end for found in known.get(end, ()))
    # Two may mean one parameter: ``mlp.gate.weight``, and ``gate.weight``, which PEFT adds for all-linear.
    named = list(dict.fromkeys(parameter for _, parameter in fitting))
    found = list(dict.fromkeys([*named, *bare]))
    return named if len(found) != levels and len(named) == levels else found


def is_target_module(path: str, config: Mapping[str, Any]) -> bool:
    """Return whether the config's ``target_modules`` mean a module, which PEFT then wraps as a whole.

    The rule is that of PEFT's ``check_target_module_exists``: a list holds ends of paths, from a dot on, and
    a string is a regular expression for the whole path.
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
    return has_end(path, names)


def nesting(path: str, names: Sequence[str], levels: int, problems: list[str]) -> list[str]:
    """Return the parameter of each level, outermost first.

    Args:
        path: Path of the module.
        names: Its targeted parameters.
        levels: Number of nested pairs that the file has for it.
        problems: List to add to if file and config disagree, or the order is unknown.
    """
    if len(names) != levels:
        # PEFT passes over a name that no parameter has, and the file doesn't show which one that is.
        cure = "; take out of the config's target_parameters those that the model doesn't have"
        problems.append(
            f"{path}: the file has {levels} nested LoRA pairs, but target_parameters lists "
            f"{len(names)} of its parameters ({some(names) or 'none'}){cure if len(names) > levels else ''}"
        )
        return []
    if levels == 1:
        return list(names)
    unknown = [name for name in names if name not in REGISTERED]
    if unknown:
        problems.append(
            f"{path}: target_parameters {some(names)} are nested in the order in which the module "
            f"registered them, which is unknown for {some(unknown)}; "
            "save one adapter for each parameter"
        )
        return []
    return sorted(names, key=REGISTERED.index, reverse=True)
