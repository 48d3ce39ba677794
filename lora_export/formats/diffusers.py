"""Read diffusers' ``pytorch_lora_weights.safetensors``, with old and new names.

Source: https://github.com/huggingface/diffusers, ``loaders/lora_base.py``, ``utils/state_dict_utils.py``. The
first part of a name is the component (``unet``, ``transformer``, ``text_encoder``, …); ai-toolkit,
diffusion-pipe and ComfyUI write ``diffusion_model``. Three spellings: ``….lora_A.weight`` (PEFT),
``….lora.down.weight`` and ``….lora_linear_layer.down.weight``, ``….processor.to_q_lora.down.weight``; XLabs'
``double_blocks.0.processor.qkv_lora1.down.weight`` is read as Black Forest Labs' name of the same module.

Scaling, in this order: the metadata ``lora_adapter_metadata`` (one JSON object with keys such as
``unet.lora_alpha``); ``<module>.alpha``; alpha in the metadata (`formats.reading.stated`); else alpha =
rank for each module, whether or not the ranks are equal (``utils/peft_utils.py``, ``get_peft_kwargs``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_export.adapter import Adapter, LoraModule
from lora_export.errors import AdapterError
from lora_export.formats.reading.diffusion_names import (
    COMPONENT,
    METADATA_KEY,
    Components,
    follows_diffusers,
    xlabs_path,
)
from lora_export.formats.reading.lora_config import PEFT_ONLY, LoraRules, check_switches
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
from lora_export.untrusted.documents import json_of

_LORA = re.compile(
    r"^(?P<path>.+?)(?:\.lora_(?P<new>[AB])\.(?P<leaf>weight|bias)"
    r"|(?P<end>\.lora\.|\.lora_linear_layer\.|_lora(?P<stream>[12]?)\.)(?P<old>down|up)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)?\.(?P<alpha>alpha))$"
)


def recognises(source: AdapterSource) -> bool:
    """Return whether names are in an old spelling, or in PEFT's with a sign that diffusers' rules hold."""
    if source.config is not None:
        return False
    paths = source.paths.values()
    if any((match := _LORA.match(path)) and match["old"] for path in paths):
        return True
    return follows_diffusers(paths, source.metadata)


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from a diffusers file.

    Raises:
        AdapterError: The file breaks rules; all problems are listed.
    """
    table = PartsTable()
    components = Components(source.paths.values())
    for name, path, values in source.entries():
        match = _LORA.match(path)
        part = _part(match) if match else None
        if match is None or part is None:
            table.unknown([name], "not a tensor name of diffusers' LoRA files")
            continue
        component, module_path = _split(match["path"], match["stream"] or "", components)
        if module_path is None:
            table.unknown([name], "not a tensor name of diffusers' or XLabs' LoRA files")
            continue
        table.add(module_path, part, name=name, values=values, component=component)
    notes = select_component(source, table, options.component)
    configs = _configs(source)
    rules = {key: LoraRules(config, options, PEFT_ONLY) for key, config in configs.items()}
    for one in rules.values():
        table.problems += one.problems
    scalings = _Scalings(source, options, table)
    modules = {}
    for parts in table.rows.values():
        alpha, rslora = scalings.of(parts, rules.get(parts.component, rules.get(None)))
        module = build_module(parts, alpha, rslora, table.problems)
        if module:
            modules[module.key] = module
    _check_configs(modules.values(), configs, table.problems)
    check_claims(source, modules.values(), table.problems)
    raise_problems(source, table.problems, "fix the listed problems; a file holds LoRA pairs and alpha")
    shown = {str(key): dict(config) for key, config in configs.items()}
    return adapter_of(
        source, "diffusers", table=table, modules=modules, config=shown, notes=(*notes, *scalings.notes)
    )


def _part(match: re.Match[str]) -> str | None:
    if match["new"]:
        if match["leaf"] == "bias":
            return "lora_bias" if match["new"] == "B" else None
        return f"lora_{match['new'].lower()}"
    if match["old"]:
        return "lora_a" if match["old"] == "down" else "lora_b"
    return "magnitude" if match["magnitude"] else "alpha"


def _split(path: str, stream: str, components: Components) -> tuple[str | None, str | None]:
    """Return component and module path; ``processor.to_out_lora`` wraps the module ``to_out.0``.

    Args:
        path: The tensor's name up to the part of the pair.
        stream: The number of the stream in XLabs' names, else an empty string.
        components: Components of the file.
    """
    component, path = components.split(path)
    if (theirs := xlabs_path(path, stream)) or stream:
        return component, theirs
    if ".processor." in path:
        path = path.replace(".processor.", ".")
        path = re.sub(r"\.to_out$", ".to_out.0", path)
    return component, path


def _configs(source: AdapterSource) -> dict[str | None, Mapping[str, Any]]:
    text = source.metadata.get(METADATA_KEY)
    if not text:
        return {}
    where = f"adapter '{source.name}': the metadata {METADATA_KEY}"
    flat = json_of(text, where, AdapterError, "save the adapter again")
    if not isinstance(flat, dict):
        raise AdapterError(f"{where} is not a JSON object", "save the adapter again")
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in flat.items():
        match = COMPONENT.match(key)
        component, name = (match[1], key[match.end() :]) if match else (None, key)
        configs.setdefault(component, {})[name] = value
    return dict(configs)


def _check_configs(
    modules: Iterable[LoraModule], configs: Mapping[str | None, Mapping[str, Any]], problems: list[str]
) -> None:
    """Each component's switches hold for its modules, as `LoraRules` do."""
    owned: dict[str | None, list[LoraModule]] = {}
    for module in modules:
        owner = module.component if module.component in configs else None
        owned.setdefault(owner, []).append(module)
    for owner, theirs in owned.items():
        if owner in configs:
            check_switches(theirs, configs[owner], problems, f"the metadata {METADATA_KEY}'s")


class _Scalings:
    """Alpha and rsLoRA of each module of one file.

    Attributes:
        notes: Origin of the numbers, if the file doesn't state them module by module.
    """

    def __init__(self, source: AdapterSource, options: ReadOptions, table: PartsTable) -> None:
        self.notes: list[str] = []
        self._source = source
        self._options = options
        self._problems = table.problems
        self._rows = list(table.rows.values())
        self._stated: dict[str | None, Stated] = {}
        own = [single_number(row.tensors["alpha"]) if "alpha" in row.tensors else None for row in self._rows]
        check_alpha_tensors(own, options, self._problems)
        # `of` takes the alpha tensors out of the parts.
        self._alphas = {
            component: [single_number(row.tensors["alpha"]) for row in self._rows
                        if row.component == component and "alpha" in row.tensors]
            for component in {row.component for row in self._rows}
        }  # fmt: skip

    def of(self, parts: Parts, rules: LoraRules | None) -> tuple[float | None, bool]:
        """Return alpha, or None after adding a problem, and whether to divide by √rank."""
        own = parts.tensors.pop("alpha", None)
        if rules is not None:
            parts.rank = rules.rank(parts.path)
            alpha = rules.alpha(parts.path)
            if own is not None and alpha is not None and single_number(own) != alpha:
                self._problems.append(
                    f"{parts.label}: .alpha is {single_number(own):g}, but the metadata {METADATA_KEY} say "
                    f"{alpha:g}"
                )
            return alpha, rules.rslora
        parts.rank = self._options.rank
        if own is not None:
            return single_number(own), bool(self._options.rslora)
        stated = self._of_component(parts.component)
        if (alpha := stated.alpha_of(parts.rows)) is not None:
            return alpha, stated.rslora
        alpha = None if parts.rows is None else float(parts.rows)
        if alpha is not None and any(other != alpha for other in self._alphas[parts.component]):
            # diffusers takes the most frequent alpha of the others here, ComfyUI scaling 1.
            self._problems.append(
                f"{parts.label}: has no .alpha, but other modules have one; programs read that differently: "
                "give --alpha for the modules without one"
            )
            return None, False
        if stated.rslora and alpha is not None:
            self._problems.append(f"{parts.label}: rsLoRA is stated, but not alpha; give --alpha")
            return None, False
        return alpha, False

    def _of_component(self, component: str | None) -> Stated:
        if component not in self._stated:
            rows = [row for row in self._rows if row.component == component]
            ranks = [row.rows for row in rows if row.rows is not None]
            stated = stated_of(
                self._source,
                self._options,
                problems=self._problems,
                component=component,
                ranks=ranks,
                of_diffusion=True,
            )
            self._stated[component] = stated
            front = f"{component}: " if component else ""
            self.notes += [front + note for note in stated.notes]
            if stated.alpha is None and stated.scaling is None and not self._alphas[component]:
                self.notes.append(f"{front}no alpha in the file: scaling 1, as diffusers and ComfyUI read it")
        return self._stated[component]


FORMAT = Format(
    expects="unet.<module>.lora_A.weight or ….lora.down.weight (also transformer., text_encoder., "
    "diffusion_model., …)",
    recognises=recognises,
    read=read,
)
