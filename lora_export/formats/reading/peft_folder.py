"""Write an adapter as the folder that PEFT's ``from_pretrained`` reads.

The inverse of `lora_export.formats.peft`: ranks and alphas become ``r``, ``lora_alpha`` and patterns with one
anchored key for each module that differs. Anything that PEFT's config can't express is refused by name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.errors import AdapterError
from lora_export.formats.reading.experts import REGISTERED, expert_layout
from lora_export.formats.reading.source import CONFIG_NAME, WEIGHT_NAMES
from lora_export.formats.reading.tensors import write_safetensors
from lora_export.formats.reading.token_rows import KEY as ROWS
from lora_export.formats.reading.token_rows import TENSOR as ROWS_TENSOR
from lora_export.formats.reading.token_rows import stated_rows
from lora_export.formats.reading.weights_files import files_of
from lora_export.formats.reading.whole_copies import copy_reach
from lora_export.storage.outputs import OutputSet, output_errors, refuse_replacing

_PREFIX = "base_model.model."
# One version for each layout of stacked experts' factors.
_VERSIONS = ("0.18.1", "0.19.0", "0.19.1", "0.19.1.dev0")
_TIES = "ensure_weight_tying"
_SETTLED = "settled for one base"
# Names that PEFT itself adds to ``modules_to_save`` for a task, and matches with the ends of paths
# (``peft_model.py``, 0.21): no module inside of one may be named as well.
_CLASSIFIERS = ("classifier", "score")
_HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}


def write_folder(adapter: Adapter, folder: Path, force: bool) -> Path:
    """Write both files; see `lora_export.formats.save_adapter`."""
    problems = _problems(adapter)
    if problems:
        raise AdapterError(
            f"adapter '{adapter.name}' can't be saved in PEFT's format",
            "export it in parts, or merge it",
            problems,
        )
    config, tensors = _config(adapter), _tensors(adapter)
    weights_file, config_file = folder / WEIGHT_NAMES[0], folder / CONFIG_NAME
    reads = files_of(adapter.source)
    refuse_replacing([weights_file, config_file], force, reads)
    with OutputSet(force, reads) as outputs, output_errors(weights_file):
        write_safetensors(outputs.stage(weights_file), tensors, {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        outputs.stage(config_file).write_text(text, encoding="utf-8")
        outputs.commit()
    return folder


def _problems(adapter: Adapter) -> list[str]:
    modules = list(adapter.modules.values())
    problems = [] if modules else ["it has no LoRA modules"]
    problems += [
        f"{module.path}: mlx-lm's change of an embedding also applies to a tied head, but PEFT's does not"
        for module in modules
        if module.everywhere
    ]
    problems += [
        f"{module.path}: PEFT has no bias of lora_B for an embedding"
        for module in modules
        if module.kind == "embedding" and module.lora_bias is not None
    ]
    components = sorted({module.component for module in modules if module.component})
    if len(components) > 1:
        problems.append(
            f"components {', '.join(components)}: one PEFT folder serves one model; load one of them"
        )
    if adapter.flattened:
        problems.append("flattened names: kohya's files have no dots, but PEFT needs the modules' real paths")
    if any(module.scale is not None for module in modules):
        problems.append(
            "DoRA's factors were computed for a graph, but PEFT keeps the magnitude; save the original"
        )
    for label, having in (
        ("a DoRA magnitude", [m for m in modules if m.magnitude is not None]),
        ("a bias of lora_B", [m for m in modules if m.lora_bias is not None]),
    ):
        if having and len(having) < len(modules):
            without = next(m for m in modules if all(m is not other for other in having))
            problems.append(
                f"{having[0].path} has {label}, but {without.path} has none: PEFT's switch is for all modules"
            )
    versions = {_version(module) for module in modules} - {None}
    if len(versions) > 1 or _SETTLED in versions:
        problems.append(
            "the factors of stacked experts have a layout of no PEFT version; save the adapter as loaded"
        )
    for path, names in _parameters(modules).items():
        if len(names) > 1 and any(name not in REGISTERED for name in names):
            problems.append(f"{path}: the order in which PEFT nests {', '.join(names)} is unknown")
    return problems


def _parameters(modules: Iterable[LoraModule]) -> dict[str, list[str]]:
    """Return module path → its changed parameters, in the order in which PEFT nests them, outermost first."""
    found: dict[str, list[str]] = {}
    for module in modules:
        if module.kind == "parameter":
            found.setdefault(module.path, []).append(module.parameter)
    for names in found.values():
        if all(name in REGISTERED for name in names):
            names.sort(key=REGISTERED.index, reverse=True)
    return found


def _config(adapter: Adapter) -> dict[str, Any]:
    modules = list(adapter.modules.values())
    rslora = all(module.rslora for module in modules)
    # If only some use √rank, all are written with the plain rule: the same scaling, another alpha.
    alphas = {m.key: m.alpha if rslora or not m.rslora else m.scaling * m.rank for m in modules}
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    biases = [name for name in adapter.extras if _is_bias(name, adapter.extras)]
    targeted = {module.path for module in modules}
    # A copy that PEFT loads over the base's own weight is not a module to save.
    own = [name for name in adapter.extras if name not in biases and copy_reach(adapter, name) != "all"]
    saved = {_head_of(name.rpartition(".")[0], adapter) for name in own} - targeted
    config = {
        "peft_type": "LORA",
        "peft_version": _stated_version(adapter),
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain_number(alpha),
        "use_rslora": rslora,
        "rank_pattern": {_pattern(m): m.rank for m in modules if m.rank != rank},
        "alpha_pattern": {
            _pattern(m): _plain_number(alphas[m.key]) for m in modules if alphas[m.key] != alpha
        },
        "target_modules": sorted({m.path for m in modules if m.kind != "parameter"}),
        "target_parameters": sorted(f"{m.path}.{m.parameter}" for m in modules if m.kind == "parameter")
        or None,
        "modules_to_save": sorted(p for p in saved if not any(p.startswith(f"{q}.") for q in saved)) or None,
        "bias": "none" if not biases else "lora_only" if _bases(biases) <= targeted else "all",
        "use_dora": any(module.magnitude is not None for module in modules),
        "lora_bias": any(module.lora_bias is not None for module in modules),
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
    if adapter.token_rows:
        config |= {ROWS: stated_rows(adapter), _TIES: bool(adapter.config.get(_TIES))}
    return config


def _head_of(path: str, adapter: Adapter) -> str:
    """Return the module that PEFT saves whole for the adapter's task, if one is or contains this one."""
    ends = _HEADS.get(str(adapter.config.get("task_type")), ())
    parts = path.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((one for one in above if ends and one.endswith(ends)), path)


def _stated_version(adapter: Adapter) -> str | None:
    """Return the PEFT version that tells a reader the layout of stacked experts' factors."""
    versions = {_version(module) for module in adapter.modules.values()} - {None}
    stated = adapter.config.get("peft_version") if adapter.format == "peft" else None
    if not versions:
        return stated
    (version,) = versions
    same = stated is not None and expert_layout(stated) == expert_layout(version)
    return str(stated) if same else version


def _version(module: LoraModule) -> str | None:
    """Return a version with the layout of a module's factors; None if all versions have it."""
    if module.experts == 1:
        return None
    laid = (module.turned, module.layout)
    return next((version for version in _VERSIONS if expert_layout(version) == laid), _SETTLED)


def _pattern(module: LoraModule) -> str:
    path = f"{module.path}.{module.parameter}" if module.kind == "parameter" else module.path
    return "^" + re.escape(path)


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _bases(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _is_bias(name: str, extras: Mapping[str, Array]) -> bool:
    """Return whether ``bias=…`` trained a parameter: a bias that is saved without a weight."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and f"{module}.weight" not in extras


def _tensors(adapter: Adapter) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    nested = _parameters(adapter.modules.values())
    for module in adapter.modules.values():
        level = nested[module.path].index(module.parameter) if module.kind == "parameter" else 0
        path = f"{_PREFIX}{module.path}{'.base_layer' * level}"
        if module.kind == "embedding":
            tensors[f"{path}.lora_embedding_A"] = module.lora_a
            tensors[f"{path}.lora_embedding_B"] = module.lora_b
        else:
            tensors[f"{path}.lora_A.weight"] = module.lora_a
            tensors[f"{path}.lora_B.weight"] = module.lora_b
        if module.lora_bias is not None:
            tensors[f"{path}.lora_B.bias"] = module.lora_bias
        if module.magnitude is not None:
            # PEFT keeps a convolution's magnitude in the shape in which it multiplies the weight's outputs.
            shape = (1, -1, *(1,) * (module.lora_a.ndim - 2)) if module.kind == "conv" else (-1,)
            tensors[f"{path}.lora_magnitude_vector"] = module.magnitude.reshape(shape)
    for name, rows in adapter.token_rows.items():
        tensors[f"{_PREFIX}{name.rpartition('.')[0]}.{ROWS_TENSOR}"] = rows.values
    targeted = {module.path for module in adapter.modules.values()}
    for name, values in adapter.extras.items():
        parent, _, leaf = name.rpartition(".")
        inner = f"{parent}.base_layer" if parent in targeted else parent
        front = _PREFIX + (f"{inner}." if parent else "")
        tensors[front + leaf] = values
        if leaf == "running_mean":
            # A batch norm's count of training steps: reading ignores it, but PEFT won't load without it.
            tensors[f"{front}num_batches_tracked"] = np.zeros((), np.int64)
    return tensors
