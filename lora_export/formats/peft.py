"""PEFT's own format: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

Tensor names (PEFT 0.21, ``utils/save_and_load.py``), behind ``base_model.model.<module path>``:
``.lora_A.weight``, ``.lora_B.weight``, ``.lora_B.bias``, ``.lora_embedding_A``, ``.lora_embedding_B``,
``.lora_magnitude_vector``; everything else is a whole parameter that loading puts in the base's place:
``modules_to_save``, ``bias``, and the embeddings that PEFT saves along when they are targeted or resized.

Such whole parameters become `Adapter.extras` under the parameter's own path (``….base_layer.weight`` is the
base's ``….weight``): **first the replacement, then the low-rank change on top of it**, as PEFT does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.errors import AdapterError
from lora_export.formats.experts import is_target_module, layout_of, nesting, parameters_of
from lora_export.formats.lora_config import LoraRules
from lora_export.formats.pairs import Parts, PartsTable, adapter_of, build_module, raise_problems
from lora_export.formats.source import CONFIG_NAME, WEIGHT_NAMES, Format, Options, Source
from lora_export.formats.tensors import value_problems

PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # before the DoRA layer was a module of its own
}
_LORA = re.compile(
    r"^(?P<path>.+?)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?$"
)
# Needed to train only: VeLoRA's projection, Monteclora's sampler, the untrained copy of a module to save.
_ASIDE = re.compile(r"\.(lora_velora_embed|lora_monteclora_sampler|original_module)(\.|$)")
_PROMPT_TUNERS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT",
                  "CPT", "CARTRIDGE")  # fmt: skip


def recognises(source: Source) -> bool:
    """Whether the file lies beside a PEFT config under PEFT's name, or has PEFT's tensor names."""
    if source.config is not None and source.file.name in WEIGHT_NAMES:
        return True
    return any(name.startswith(PREFIX) and _LORA.match(name) for name in source.tensors) or (
        source.config is not None and any(_LORA.match(name) for name in source.tensors)
    )


def read(source: Source, options: Options) -> Adapter:
    """Make an adapter of a PEFT file, with its config or with stated alpha.

    Raises:
        AdapterError: Another tuner, or a list of all that is wrong or not supported, each with its reason.
    """
    config = dict(source.config) if source.config is not None else _config_from(source, options)
    _refuse_other_tuners(source, config)
    rules = LoraRules(config, options)
    table = PartsTable()
    table.problems += rules.problems
    extras, extra_tensors = _sort_tensors(source.tensors, table)
    _refuse_attention(table)
    _name_parameters(table, rules, config)
    modules = _build_modules(table, rules, config)
    if not table.rows and not extras:
        table.problems.append("the file has no LoRA tensors")
    _check_experts(modules, table.problems)
    if source.config is not None:
        _check_switches(modules, config, table.problems)
    table.problems += value_problems((n, v) for n, v in extras.items() if v.dtype.kind not in "iub")
    raise_problems(source, table.problems, "mend what is listed, or merge with PEFT's merge_and_unload")
    notes = list(rules.notes)
    if config.get("peft_version") is None and any(module.experts > 1 for module in modules.values()):
        notes.append(
            "the config names no peft_version: lora_A of stacked experts is taken to act on their first "
            "axis, as PEFT before 0.18 wrote it, unless the base's shapes say otherwise"
        )
    if config.get("modules_to_save") and not extras:
        notes.append(f"the config names modules_to_save {config['modules_to_save']}, and the file holds none")
    if table.aside:
        notes.append(f"left aside, needed in training only: {', '.join(table.aside)}")
    return replace(
        adapter_of(source, "peft", table, modules, config, notes),
        extras=extras,
        extra_tensors=extra_tensors,
        base_model=config.get("base_model_name_or_path") or None,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _build_modules(table: PartsTable, rules: LoraRules, config: Mapping[str, Any]) -> dict[str, LoraModule]:
    modules: dict[str, LoraModule] = {}
    for parts in table.rows.values():
        # PEFT matches its patterns against the module, and for target_parameters against the parameter.
        pattern_path = f"{parts.path}.{parts.parameter}" if parts.kind == "parameter" else parts.path
        parts.rank = rules.rank(pattern_path)
        if isinstance(config.get("use_bdlora"), Mapping):
            _expand_blocks(parts, config["use_bdlora"], table.problems)
        module = build_module(parts, rules.alpha(pattern_path), rules.rslora, table.problems)
        if module and module.experts > 1:
            turned, layout = layout_of(config.get("peft_version"))
            module = replace(module, turned=turned, layout=layout)
        if module:
            modules[module.key] = module
    return modules


def _config_from(source: Source, options: Options) -> dict[str, Any]:
    """Stand in for a missing config: rank from the option or the tensors, alpha from the option alone."""
    ranks = {
        int(v.shape[0]) for n, v in source.tensors.items() if re.search(r"\.lora_(embedding_)?A(\.|$)", n)
    }
    if options.alpha is None:
        raise AdapterError(
            f"adapter '{source.name}' has no {CONFIG_NAME} beside it, and its tensors don't tell alpha",
            "give --alpha (and --rslora where it was used), or put the config beside the file",
        )
    if options.rank is None and len(ranks) > 1:
        # alpha/rank then differs by module, just as it does in a config whose rank_pattern lists them.
        pattern = {
            "^" + re.escape(match["path"].removeprefix(PREFIX)): int(values.shape[0])
            for name, values in source.tensors.items()
            if (match := _LORA.match(name)) and match["part"].endswith("_A")
        }
    else:
        pattern = {}
    return {
        "peft_type": "LORA",
        "r": options.rank or (min(ranks) if ranks else 1),
        "lora_alpha": options.alpha,
        "use_rslora": bool(options.rslora),
        "rank_pattern": pattern,
    }


def _refuse_other_tuners(source: Source, config: Mapping[str, Any]) -> None:
    tuner = str(config.get("peft_type")).upper()
    if tuner == "LORA":
        return
    if tuner in _PROMPT_TUNERS:
        raise AdapterError(
            f"adapter '{source.name}' is {tuner}: it changes the model's input, not its weights",
            "nothing of it can be merged; train a LoRA instead",
        )
    raise AdapterError(
        f"adapter '{source.name}' is {tuner}, not LoRA",
        f"where PEFT can convert {tuner}: from peft import save_as_lora; "
        "save_as_lora(FOLDER, model, rank=R), then use FOLDER; otherwise merge with PEFT's merge_and_unload",
    )


def _sort_tensors(tensors: Mapping[str, Array], table: PartsTable) -> tuple[dict[str, Array], dict[str, str]]:
    """Give each tensor its place: a module's part, a whole parameter (with its tensor's name), or aside."""
    extras: dict[str, Array] = {}
    names: dict[str, str] = {}
    for name, values in tensors.items():
        path = name.removeprefix(PREFIX)
        match = _LORA.match(path)
        part = _PARTS.get(match["part"] + (match["leaf"] or "")) if match else None
        if match and part:
            row = table.add(match["path"], part, name, values)
            if "embedding" in match["part"]:
                row.kind = "embedding"
        elif _ASIDE.search(path):
            table.aside.append(name)
        elif ".token_adapter." in path or ".lora_" in path:
            table.unknown([name], "not a tensor that a LoRA adapter has; merge with PEFT's merge_and_unload")
        else:
            target = path.replace(".base_layer.", ".")
            target = re.sub(r"\.modules_to_save\.(default\.)?", ".", target)
            if target not in extras:
                extras[target] = values
                names[target] = name
            elif np.array_equal(extras[target], values):
                table.aside.append(name)  # PEFT saves the bias of a module to save twice
            else:
                table.unknown([name], f"a second, different value of {target}")
    return extras, names


def _refuse_attention(table: PartsTable) -> None:
    suffix = ".base_layer.out_proj"
    for key in [key for key in table.rows if key[1].endswith(suffix)]:
        module = key[1].removesuffix(suffix)
        table.problems.append(
            f"{module}: LoRA on nn.MultiheadAttention; PEFT's merge counts out_proj's change twice (0.21), "
            "so what the numbers mean depends on its version; merge with the PEFT that trained it"
        )
        del table.rows[key]


def _name_parameters(table: PartsTable, rules: LoraRules, config: Mapping[str, Any]) -> None:
    """Say which parameter each nested pair of ``target_parameters`` changes."""
    levels: dict[str, list[Parts]] = {}
    for parts in table.rows.values():
        levels.setdefault(parts.path.replace(".base_layer", ""), []).append(parts)
    for path, rows in levels.items():
        names = parameters_of(path, rules.target_parameters, len(rows))
        plain = len(rows) == 1 and rows[0].path == path
        if plain and (not names or is_target_module(path, config)):
            continue
        rows.sort(key=lambda parts: parts.path.count(".base_layer"))
        for parts, name in zip(rows, nesting(path, names, len(rows), table.problems), strict=False):
            parts.path, parts.kind, parts.parameter = path, "parameter", name


def _check_switches(
    modules: Mapping[str, LoraModule], config: Mapping[str, Any], problems: list[str]
) -> None:
    """PEFT loads a magnitude or a bias only where its switch is on, and starts anew where it is missing."""
    for switch, attribute, kinds in (
        ("use_dora", "magnitude", ("linear", "conv", "embedding")),
        ("lora_bias", "lora_bias", ("linear", "conv")),
    ):
        for module in modules.values():
            there = getattr(module, attribute) is not None
            if there and not config.get(switch):
                problems.append(f"{module.path}: has a {attribute}, but the config's {switch} is off")
            elif config.get(switch) is True and not there and module.kind in kinds:
                problems.append(f"{module.path}: has no {attribute}, but the config's {switch} is on")


def _check_experts(modules: Mapping[str, LoraModule], problems: list[str]) -> None:
    """A wrong nesting shows in the shapes: ``down_proj`` puts out what ``gate_up_proj`` takes in.

    Factors that act on the other axis (see `lora_export.formats.experts`) have the two exchanged.
    """
    for key, up in modules.items():
        down = modules.get(key.removesuffix("gate_up_proj") + "down_proj")
        if up.kind != "parameter" or up.parameter != "gate_up_proj" or down is None:
            continue
        (up_in, up_out), (down_in, down_out) = _sizes(up), _sizes(down)
        straight = up_in == down_out
        exchanged = up_out == down_in and up_in == 2 * down_out
        if up.experts != down.experts or not (straight or exchanged):
            problems.append(
                f"{up.path}: gate_up_proj ({up_out}, {up_in}) × {up.experts} and down_proj "
                f"({down_out}, {down_in}) × {down.experts} don't fit together: nested in an unknown order"
            )


def _sizes(module: LoraModule) -> tuple[int, int]:
    """Return what lora_A takes and what lora_B gives."""
    return int(module.lora_a.shape[1]), int(module.lora_b.shape[0])


def _expand_blocks(parts: Parts, blocks: Mapping[str, Any], problems: list[str]) -> None:
    """Make BD-LoRA's stacked blocks the block-diagonal matrix they stand for (``lora/variants.py``)."""
    count = blocks.get("nblocks")
    if not isinstance(count, int) or count < 1:
        problems.append(f"config use_bdlora: nblocks is {count!r}, wanted a whole number above 0")
        return
    for part, key in (("lora_a", "target_modules_bd_a"), ("lora_b", "target_modules_bd_b")):
        if part not in parts.tensors or not any(str(word) in parts.path for word in blocks.get(key) or []):
            continue
        stacked = parts.tensors[part]
        if stacked.ndim != 2 or stacked.shape[0] % count:
            problems.append(
                f"{parts.label}: {part} {stacked.shape} is not {count} stacked blocks (use_bdlora)"
            )
            continue
        rows, cols = stacked.shape[0] // count, stacked.shape[1]
        full = np.zeros((rows * count, cols * count), stacked.dtype)
        for i in range(count):
            full[i * rows : (i + 1) * rows, i * cols : (i + 1) * cols] = stacked[i * rows : (i + 1) * rows]
        parts.tensors[part] = full


FORMAT = Format(
    expects=f"{PREFIX}<module>.lora_A.weight, .lora_B.weight beside {CONFIG_NAME}",
    recognises=recognises,
    read=read,
)
