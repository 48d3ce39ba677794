"""Read files of kohya's sd-scripts: ``lora_unet_<path with _ for .>.lora_down.weight``, ``.lora_up.weight``.

Source: https://github.com/kohya-ss/sd-scripts, ``networks/lora.py``: scaling is alpha / rank, and a module
without ``.alpha`` has alpha = rank. ``.dora_scale`` is LyCORIS's DoRA
(https://github.com/KohakuBlueleaf/LyCORIS, ``modules/locon.py``), the same as PEFT's if it has one norm for
each output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from lora_export.adapter import Adapter, Array
from lora_export.formats.reading.diffusion_names import Components
from lora_export.formats.reading.pairs import (
    Parts,
    PartsTable,
    adapter_of,
    build_module,
    raise_problems,
    select_component,
    single_number,
)
from lora_export.formats.reading.source import AdapterSource, Format, ReadOptions
from lora_export.formats.reading.stated import Stated, check_alpha_tensors, check_claims, stated_of
from lora_export.formats.reading.wrappers import strip_flat_wrappers

_PARTS = {
    "lora_down.weight": "lora_a",
    "lora_up.weight": "lora_b",
    "lora_up.bias": "lora_bias",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}
_NAME = re.compile(r"^(?P<path>.+?)\.(?P<part>lora_down\.weight|lora_up\.(?:weight|bias)|alpha|dora_scale)$")
_COMPONENT = re.compile(r"^lora_(?P<component>unet|te\d?|transformer|prior|llm_adapter)_(?P<path>.+)$")
_BARE = "lora_"
_COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_REFUSED = (
    ("lora_mid.", "a Tucker-decomposed convolution (LoCon)"),
    ("hada_", "LoHa (a Hadamard product)"),
    ("lokr_", "LoKr (a Kronecker product)"),
    ("oft_", "OFT (an orthogonal factor)"),
    ("diff", "a full-weight difference"),
    ("on_input", "(IA)³"),
)


def recognises(source: AdapterSource) -> bool:
    """Return whether a tensor name ends in ``.lora_down.weight`` or begins like kohya's names."""
    return any(
        path.endswith((".lora_down.weight", ".lora_up.weight")) or (_COMPONENT.match(path) and "." in path)
        for path in source.paths.values()
    )


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from a kohya file. Paths keep their underscores: `Adapter.flattened`.

    Raises:
        AdapterError: The file breaks rules, or has unsupported parts; all problems are listed.
    """
    table = PartsTable()
    components = Components(source.paths.values())
    is_bare = _is_bare(source.paths.values())
    for name, path, values in source.entries():
        match = _NAME.match(path)
        if not match:
            table.unknown([name], _refusal(path))
            continue
        component, module_path = _split(match["path"], components, is_bare)
        table.add(module_path, _PARTS[match["part"]], name=name, values=values, component=component)
    notes = select_component(source, table, options.component)
    modules = {}
    own = [
        single_number(row.tensors["alpha"]) if "alpha" in row.tensors else None for row in table.rows.values()
    ]
    check_alpha_tensors(own, options, table.problems)
    stated = _stated(source, options, table)
    for parts in table.rows.values():
        parts.rank = options.rank
        _check_magnitude(parts, table.problems)
        alpha, rslora = _alpha(parts, stated, options, table.problems)
        module = build_module(parts, alpha, rslora, table.problems)
        if module:
            modules[module.key] = module
    check_claims(source, modules.values(), table.problems)
    raise_problems(source, table.problems, "fix the listed problems; other LyCORIS algorithms can't be read")
    return replace(
        adapter_of(
            source,
            "kohya",
            table=table,
            modules=modules,
            config=dict(source.metadata),
            notes=(*notes, *stated.notes),
        ),
        flattened=all("." not in module.path for module in modules.values()),
        base_model=source.metadata.get("ss_sd_model_name"),
    )


def _is_bare(paths: Iterable[str]) -> bool:
    """Return whether all names are ``lora_`` and a model's own path, which may begin with ``transformer``."""
    names = [match["path"] for path in paths if (match := _NAME.match(path))]
    parts = [match and match["component"] for match in map(_COMPONENT.match, names)]
    return (
        all(name.startswith(_BARE) for name in names)
        and None in parts
        and set(parts) <= {None, "transformer"}
    )


def _split(path: str, components: Components, is_bare: bool) -> tuple[str | None, str]:
    if is_bare:
        return None, strip_flat_wrappers(path.removeprefix(_BARE))
    match = _COMPONENT.match(path)
    if not match:
        return components.split(path)
    return _COMPONENTS.get(match["component"], match["component"]), strip_flat_wrappers(match["path"])


def _refusal(name: str) -> str:
    last = name.split(".", 1)[-1] if name.startswith("lora_") else name.rpartition(".")[2]
    for word, what in _REFUSED:
        if last.startswith(word) or f".{word}" in name:
            return f"{what}, not a plain LoRA pair; merge it with the tool that trained it"
    return "not a tensor name of kohya's files"


def _stated(source: AdapterSource, options: ReadOptions, table: PartsTable) -> Stated:
    """Return the stated scaling of the modules without ``.alpha``, if there are any."""
    rows = [row for row in table.rows.values() if "alpha" not in row.tensors]
    if not rows:
        return Stated()
    ranks = [row.rows for row in rows if row.rows is not None]
    return stated_of(source, options, table.problems, ranks=ranks, of_diffusion=True)


def _alpha(
    parts: Parts, stated: Stated, options: ReadOptions, problems: list[str]
) -> tuple[float | None, bool]:
    """Return alpha and rsLoRA of a module; kohya's rule is that the scaling is 1 without alpha."""
    own = parts.tensors.pop("alpha", None)
    if own is not None:
        return single_number(own), bool(options.rslora)
    alpha = stated.alpha_of(parts.rows)
    if alpha is None and options.rslora:
        problems.append(f"{parts.label}: rsLoRA is stated, but not alpha; give --alpha")
        return None, False
    if alpha is None:
        return None if parts.rows is None else float(parts.rows), False
    if options.alpha is None and parts.rows is not None and alpha != parts.rows and stated.scaling is None:
        # sd-scripts, ComfyUI and diffusers load it with scaling 1, which differs from the training.
        problems.append(
            f"{parts.label}: no .alpha tensor, so every program uses scaling 1, but the file states alpha "
            f"{alpha:g}; give --alpha {alpha:g} (as trained) or --alpha {parts.rows} (scaling 1)"
        )
        return None, False
    return alpha, stated.rslora


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
