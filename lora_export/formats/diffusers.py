"""The naming of diffusers' ``pytorch_lora_weights.safetensors``, old and new.

Source: https://github.com/huggingface/diffusers, ``loaders/lora_base.py``, ``utils/state_dict_utils.py``. The
first part of a name is the component (``unet``, ``transformer``, ``text_encoder``, …). Three spellings:
``….lora_A.weight`` (PEFT), ``….lora.down.weight`` and ``….lora_linear_layer.down.weight``,
``….processor.to_q_lora.down.weight``. Scaling: from the metadata ``lora_adapter_metadata`` (one JSON object
with keys such as ``unet.lora_alpha``), else from ``<module>.alpha``, else alpha = rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats.lora_config import LoraRules
from lora_export.formats.pairs import (
    Parts,
    PartsTable,
    adapter_of,
    build_module,
    number,
    raise_problems,
    select_component,
)
from lora_export.formats.source import Format, Options, Source

METADATA_KEY = "lora_adapter_metadata"
_COMPONENT = re.compile(
    r"^(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet|text_conditioner)\."
)
_LORA = re.compile(
    r"^(?P<path>.+?)(?:\.lora_(?P<new>[AB])\.(?P<leaf>weight|bias)"
    r"|(?P<end>\.lora\.|\.lora_linear_layer\.|_lora\.)(?P<old>down|up)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)?\.(?P<alpha>alpha))$"
)


def recognises(source: Source) -> bool:
    """Whether names are in one of the old spellings, or in PEFT's behind a component or with metadata."""
    if source.config is not None:
        return False
    # A model's own `save_lora_adapter` writes no component, but says in the metadata what it is.
    described = METADATA_KEY in source.metadata
    return any(
        (match := _LORA.match(name))
        and (match["old"] or (match["new"] and (described or _COMPONENT.match(name))))
        for name in source.tensors
    )


def read(source: Source, options: Options) -> Adapter:
    """Make an adapter of a diffusers file.

    Raises:
        AdapterError: A list of all that is wrong; ranks differ and nothing tells alpha.
    """
    table = PartsTable()
    for name, values in source.tensors.items():
        match = _LORA.match(name)
        part = _part(match) if match else None
        if match is None or part is None:
            table.unknown([name], "not a name that diffusers' LoRA files have")
            continue
        component, path = _split(match["path"])
        table.add(path, part, name, values, component)
    notes = select_component(source, table, options.component)
    configs = _configs(source)
    rules = {key: LoraRules(config, options) for key, config in configs.items()}
    for one in rules.values():
        table.problems += one.problems
    modules = {}
    for parts in table.rows.values():
        alpha, rslora = _scaling(parts, rules.get(parts.component, rules.get(None)), options, table)
        module = build_module(parts, alpha, rslora, table.problems)
        if module:
            modules[module.key] = module
    raise_problems(source, table.problems, "mend what is listed; the file holds LoRA pairs and their alpha")
    shown = {str(key): dict(config) for key, config in configs.items()}
    return adapter_of(source, "diffusers", table, modules, shown, notes)


def _part(match: re.Match[str]) -> str | None:
    if match["new"]:
        if match["leaf"] == "bias":
            return "lora_bias" if match["new"] == "B" else None
        return f"lora_{match['new'].lower()}"
    if match["old"]:
        return "lora_a" if match["old"] == "down" else "lora_b"
    return "magnitude" if match["magnitude"] else "alpha"


def _split(path: str) -> tuple[str | None, str]:
    """Return component and module path; ``processor.to_out_lora`` wraps the module ``to_out.0``."""
    match = _COMPONENT.match(path)
    component = match[1] if match else None
    path = path[match.end() :] if match else path
    if ".processor." in path:
        path = path.replace(".processor.", ".")
        path = re.sub(r"\.to_out$", ".to_out.0", path)
    return component, path


def _configs(source: Source) -> dict[str | None, Mapping[str, Any]]:
    text = source.metadata.get(METADATA_KEY)
    if not text:
        return {}
    try:
        flat = json.loads(text)
    except ValueError:
        flat = None
    if not isinstance(flat, dict):
        raise AdapterError(
            f"adapter '{source.name}': the metadata {METADATA_KEY} is no JSON object",
            "save the adapter again",
        )
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in flat.items():
        match = _COMPONENT.match(key)
        component, name = (match[1], key[match.end() :]) if match else (None, key)
        configs.setdefault(component, {})[name] = value
    return dict(configs)


def _scaling(
    parts: Parts, rules: LoraRules | None, options: Options, table: PartsTable
) -> tuple[float | None, bool]:
    """Return alpha and rsLoRA of a module, in diffusers' order: metadata, ``.alpha``, alpha = rank."""
    stated = parts.tensors.pop("alpha", None)
    if rules is not None:
        parts.rank = rules.rank(parts.path)
        return rules.alpha(parts.path), rules.rslora
    parts.rank = options.rank
    if stated is not None:
        return number(stated), bool(options.rslora)
    if options.alpha is not None:
        return options.alpha, bool(options.rslora)
    ranks = {
        row.tensors["lora_a"].shape[0]
        for row in table.rows.values()
        if row.component == parts.component and "lora_a" in row.tensors and row.tensors["lora_a"].ndim
    }
    if len(ranks) > 1:
        # diffusers would take the first module's rank as everybody's alpha: an accident of the file's order.
        table.problems.append(
            f"{parts.label}: no alpha in the file, and ranks {sorted(ranks)} differ; give --alpha"
        )
        return None, False
    return float(ranks.pop()) if ranks else None, bool(options.rslora)


FORMAT = Format(
    expects="unet.<module>.lora_A.weight or ….lora.down.weight (also transformer., text_encoder., …)",
    recognises=recognises,
    read=read,
)
