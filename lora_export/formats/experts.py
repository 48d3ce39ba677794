"""Which parameter a nested LoRA wrapper belongs to (PEFT's ``target_parameters``).

PEFT 0.21, ``BaseTuner._inject_parameters`` wraps the targeted parameters of a module one around the other in
the order in which the module registered them: the last is the outermost and owns ``<module>.lora_A.weight``,
the one inside it ``<module>.base_layer.lora_A.weight``, and so on. The file keeps the nesting and the set of
names, not the order, so that is known here for the modules that exist.
"""

from __future__ import annotations

from collections.abc import Sequence

# Registration order in transformers' expert modules (and DBRX's w1, v1, w2).
REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "down_proj", "w2")


def parameters_of(path: str, targets: Sequence[str]) -> list[str]:
    """Return the names of the parameters of module ``path`` that ``targets`` mean.

    PEFT matches ``<module>.<parameter>`` against a target as a whole, or by its end from a dot on.
    """
    names = []
    for target in targets:
        module, _, parameter = target.rpartition(".")
        if (not module or path == module or path.endswith(f".{module}")) and parameter not in names:
            names.append(parameter)
    return names


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
