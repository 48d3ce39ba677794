"""The naming of kohya's sd-scripts: ``lora_unet_<path with _ for .>.lora_down.weight``, ``.lora_up.weight``.

Source: https://github.com/kohya-ss/sd-scripts, ``networks/lora.py``: scaling is alpha / rank, and a module
without ``.alpha`` has alpha = rank. ``.dora_scale`` is LyCORIS's DoRA
(https://github.com/KohakuBlueleaf/LyCORIS, ``modules/locon.py``), the same as PEFT's where it has one norm
for each output.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lora_export.adapter import Adapter, Array
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

_PARTS = {
    "lora_down.weight": "lora_a",
    "lora_up.weight": "lora_b",
    "lora_up.bias": "lora_bias",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}
_NAME = re.compile(r"^(?P<path>.+?)\.(?P<part>lora_down\.weight|lora_up\.(?:weight|bias)|alpha|dora_scale)$")
_COMPONENT = re.compile(r"^lora_(?P<component>unet|te\d?|transformer|prior|llm_adapter)_(?P<path>.+)$")
_COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_REFUSED = (
    ("lora_mid.", "a Tucker-decomposed convolution (LoCon)"),
    ("hada_", "LoHa (a Hadamard product)"),
    ("lokr_", "LoKr (a Kronecker product)"),
    ("oft_", "OFT (an orthogonal factor)"),
    ("diff", "a full-weight difference"),
    ("on_input", "(IA)³"),
)


def recognises(source: Source) -> bool:
    """Whether a tensor name ends in ``.lora_down.weight`` or begins as kohya's do."""
    return any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in source.tensors) or any(
        _COMPONENT.match(name) and "." in name for name in source.tensors
    )


def read(source: Source, options: Options) -> Adapter:
    """Make an adapter of a kohya file. Paths keep their underscores: `Adapter.flattened`.

    Raises:
        AdapterError: A list of all that is wrong or not supported.
    """
    table = PartsTable()
    for name, values in source.tensors.items():
        match = _NAME.match(name)
        if not match:
            table.unknown([name], _refusal(name))
            continue
        component, path = _split(match["path"])
        table.add(path, _PARTS[match["part"]], name, values, component)
    notes = select_component(source, table, options.component)
    modules = {}
    for parts in table.rows.values():
        parts.rank = options.rank
        _check_magnitude(parts, table.problems)
        module = build_module(parts, _alpha(parts, options), bool(options.rslora), table.problems)
        if module:
            modules[module.key] = module
    raise_problems(source, table.problems, "mend what is listed; other LyCORIS algorithms can't be read")
    return replace(
        adapter_of(source, "kohya", table, modules, dict(source.metadata), notes),
        flattened=all("." not in module.path for module in modules.values()),
        base_model=source.metadata.get("ss_sd_model_name"),
    )


def _split(path: str) -> tuple[str | None, str]:
    match = _COMPONENT.match(path)
    if not match:
        return None, path
    return _COMPONENTS.get(match["component"], match["component"]), match["path"]


def _refusal(name: str) -> str:
    last = name.split(".", 1)[-1] if name.startswith("lora_") else name.rpartition(".")[2]
    for word, what in _REFUSED:
        if last.startswith(word) or f".{word}" in name:
            return f"{what}, which is no plain LoRA pair; merge it with the tool that trained it"
    return "not a name that kohya's files have"


def _alpha(parts: Parts, options: Options) -> float | None:
    stated = parts.tensors.pop("alpha", None)
    if stated is not None:
        return number(stated)
    lora_a = parts.tensors.get("lora_a")
    # kohya's own rule: without alpha the scaling is 1.
    return options.alpha if options.alpha is not None else None if lora_a is None else float(lora_a.shape[0])


def _check_magnitude(parts: Parts, problems: list[str]) -> None:
    magnitude: Array | None = parts.tensors.get("magnitude")
    lora_b = parts.tensors.get("lora_b")
    if magnitude is None or lora_b is None:
        return
    if magnitude.shape[:1] != lora_b.shape[:1]:
        problems.append(
            f"{parts.label}: dora_scale {magnitude.shape} has a norm for each input; only one for each of "
            f"the {lora_b.shape[0]} outputs is supported (LyCORIS wd_on_output); merge it with the tool that "
            "trained it"
        )
        del parts.tensors["magnitude"]


FORMAT = Format(
    expects="lora_unet_<path>.lora_down.weight, .lora_up.weight, .alpha (also lora_te_, lora_te1_, …)",
    recognises=recognises,
    read=read,
)
