"""Read PEFT's own format: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

Tensor names (PEFT 0.21, ``utils/save_and_load.py``), behind ``base_model.model.<module path>``:
``.lora_A.weight``, ``.lora_B.weight``, ``.lora_B.bias``, ``.lora_embedding_A``, ``.lora_embedding_B``,
``.lora_magnitude_vector``; everything else is a whole parameter that replaces the base's on loading:
``modules_to_save``, ``bias``, and the embeddings that PEFT also saves if they are targeted or resized.

Such whole parameters become `Adapter.extras` under the parameter's own path (``….base_layer.weight`` is the
base's ``….weight``): **first the replacement, then the low-rank change on top of it**, as PEFT does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.errors import AdapterError
from lora_export.formats.reading.diffusion_names import follows_diffusers, strip_denoiser
from lora_export.formats.reading.experts import expert_layout, is_target_module, nesting, parameter_names
from lora_export.formats.reading.lora_config import (
    BLOCK_LISTS,
    UNMERGEABLE,
    LoraRules,
    check_switches,
    pattern_values,
    too_many_names,
)
from lora_export.formats.reading.pairs import (
    Parts,
    PartsTable,
    Room,
    adapter_of,
    build_module,
    raise_problems,
    select_component,
)
from lora_export.formats.reading.pattern_keys import misplaced_keys
from lora_export.formats.reading.source import CONFIG_NAME, FORMAT_OPTION, AdapterSource, Format, ReadOptions
from lora_export.formats.reading.stated import check_claims, stated_of, where_to_look
from lora_export.formats.reading.targeting import is_targeted
from lora_export.formats.reading.tensors import value_problems
from lora_export.formats.reading.token_rows import is_rows, read_rows
from lora_export.formats.reading.wrappers import PREFIX, unwrap_config

# Limit of names in one message.
_SHOWN = 3
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
    r"(?P<leaf>\.weight|\.bias)?$"
)
# Needed only in training: VeLoRA's projection, Monteclora's sampler, the untrained copy of a module to save,
# a batch norm's count of batches.
_ASIDE = re.compile(
    r"\.(lora_velora_embed|lora_monteclora_sampler|original_module)(\.|$)|\.num_batches_tracked$"
)
_PROMPT_TUNERS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT",
                  "CPT", "CARTRIDGE")  # fmt: skip


def recognises(source: AdapterSource) -> bool:
    """Return whether the file has PEFT's name beside a PEFT config, or has PEFT's tensor names."""
    if source.peft_config is not None:
        return True
    paths = source.paths.values()
    lora = [path for path in paths if (match := _LORA.match(path)) and _part(match)]
    if any(path.startswith(PREFIX) for path in lora):
        return True
    return bool(lora) and source.config is None and not follows_diffusers(paths, source.metadata)


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from a PEFT file, with its config or with a stated alpha.

    Raises:
        AdapterError: The file is another tuner's, breaks rules, or has unsupported parts; all problems are
            listed.
    """
    table = PartsTable()
    notes: list[str] = []
    if source.peft_config is not None:
        config = dict(source.peft_config)
    else:
        config = _config_from(source, options, table.problems, notes)
    _refuse_other_tuners(source, config)
    # A config may name modules of the wrapped model; the paths here have no wrappers any more.
    unwrapped = unwrap_config(config, table.problems)
    rules = LoraRules(unwrapped, options)
    table.problems += rules.problems
    if too_many := too_many_names(unwrapped):
        raise_problems(
            source, [*table.problems, *too_many], "save it again with the names of its modules only"
        )
    inside = {name: path.removeprefix(PREFIX) for name, path in source.paths.items()}
    rows = {path: (name, source.tensors[name]) for name, path in inside.items() if is_rows(path)}
    extras, extra_tensors = _sort_tensors(source, table)
    _check_patterns(table, unwrapped)
    token_rows = read_rows(rows, config, table.problems)
    if any(component for component, _ in table.rows):
        notes += select_component(source, table, options.component)
    _refuse_attention(table)
    _name_parameters(table, rules, config)
    table.problems += misplaced_keys(unwrapped, [_pattern_path(parts) for parts in table.rows.values()])
    modules = _build_modules(table, rules, config, Room(source.tensors))
    if not table.rows and not extras and not rows:
        table.problems.append("the file has no LoRA tensors")
    _check_experts(modules, table.problems)
    if source.peft_config is not None:
        check_switches(modules.values(), config, table.problems)
    else:
        check_claims(source, modules.values(), table.problems)
    table.problems += value_problems((n, v) for n, v in extras.items() if v.dtype.kind not in "iub")
    raise_problems(source, table.problems, _hint(config, set(table.problems)))
    notes += rules.notes
    if source.peft_config is not None:
        notes += _left_out_by_config(modules, unwrapped)
    notes += _notes_on_experts(modules, config)
    notes += _notes_on_extras([source.paths[name] for name in extra_tensors.values()], table, config)
    notes += [f"{path}: {len(row.indices)} single rows are replaced" for path, row in token_rows.items()]
    if table.aside:
        notes.append(f"ignored, needed only in training: {', '.join(table.aside)}")
    return replace(
        adapter_of(source, "peft", table=table, modules=modules, config=config, notes=notes),
        extras=extras,
        extra_tensors=extra_tensors,
        token_rows=token_rows,
        base_model=_base_named(config),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _base_named(config: Mapping[str, Any]) -> str | None:
    """Return the base that a config names; trainers write a name, null or nothing: all else is none."""
    named = config.get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _hint(config: Mapping[str, Any], problems: Collection[str]) -> str:
    """Return a hint for a file's problems: what only PEFT can run can neither be fixed nor merged."""
    others = [remedy for key, remedy in UNMERGEABLE.items() if config.get(key)]
    if not others:
        return "fix the listed problems, or merge with PEFT's merge_and_unload"
    return "; ".join([*others, *(["fix the other problems"] if len(problems) > len(others) else [])])


def _left_out_by_config(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> list[str]:
    """Return a note on a file's modules that PEFT would not load: the config or the file was edited."""
    paths = [module.path for module in modules.values() if module.parameter == "weight"]
    named = [name for name in config.get("target_parameters") or () if isinstance(name, str)]
    left = [path for path in paths if not is_targeted(config, path) and not _is_named(path, named)]
    if config.get("ensure_weight_tying"):
        # PEFT gives the tied ends of a targeted embedding its change, whatever the config calls them.
        tables = [one for one in modules.values() if one.kind == "embedding" and one.path not in left]
        tied = {m.path for m in modules.values() if any(_is_same_change(m, one) for one in tables)}
        left = [path for path in left if path not in tied]
    if not left:
        return []
    shown = ", ".join(left[:_SHOWN]) + (", …" if len(left) > _SHOWN else "")
    keys = [
        k for k in ("target_modules", "exclude_modules", "layers_to_transform") if config.get(k) is not None
    ]
    return [
        f"the config's {', '.join(keys)} leave out {len(left)} of the file's {len(paths)} modules ({shown}), "
        "which PEFT would not load; they are read anyway"
    ]


def _is_named(path: str, targets: Sequence[str]) -> bool:
    """Return whether ``target_parameters`` name a module's weight (PEFT's ``_inject_parameters``)."""
    return any(f".{path}.weight".endswith(f".{target}") for target in targets)


def _is_same_change(one: LoraModule, two: LoraModule) -> bool:
    return one.weight_shape == two.weight_shape and all(map(np.array_equal, one.factors(), two.factors()))


def _notes_on_experts(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> list[str]:
    if config.get("peft_version") is not None or all(module.experts <= 1 for module in modules.values()):
        return []
    return [
        "the config has no peft_version: lora_A of stacked experts is taken to act on their first axis, as "
        "PEFT before 0.18 wrote it, unless the base's shapes show otherwise"
    ]


def _notes_on_extras(paths: Sequence[str], table: PartsTable, config: Mapping[str, Any]) -> list[str]:
    """Return notes on whole parameters, of which these are the paths in the file."""
    notes = []
    if config.get("modules_to_save") and not paths:
        notes.append(f"the config lists modules_to_save {config['modules_to_save']}, but the file has none")
    if copies := _base_copies(paths, table):
        notes.append(
            f"the file also holds {copies} weights of the base (….base_layer.weight): they replace those of "
            "the given base, and the low-rank change is added to them"
        )
    return notes


def _pattern_path(parts: Parts) -> str:
    """Return the path that PEFT matches its patterns against: the module, or target_parameters' parameter."""
    return f"{parts.path}.{parts.parameter}" if parts.kind == "parameter" else parts.path


def _build_modules(
    table: PartsTable, rules: LoraRules, config: Mapping[str, Any], room: Room
) -> dict[str, LoraModule]:
    modules: dict[str, LoraModule] = {}
    for parts in table.rows.values():
        pattern_path = _pattern_path(parts)
        parts.rank = rules.rank(pattern_path)
        if isinstance(config.get("use_bdlora"), Mapping):
            _expand_blocks(parts, config["use_bdlora"], room, table.problems)
        module = build_module(parts, rules.alpha(pattern_path), rules.rslora, table.problems)
        if module and module.experts > 1:
            turned, layout = expert_layout(config.get("peft_version"))
            module = replace(module, turned=turned, layout=layout)
        if module:
            modules[module.key] = module
    return modules


def _config_from(
    source: AdapterSource, options: ReadOptions, problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """Make up for a missing config: ranks come from the tensors, alpha from the option or from the file."""
    ranks = {
        match["path"].removeprefix(PREFIX): int(source.tensors[name].shape[0])
        for name, path in source.paths.items()
        if (match := _LORA.match(path)) and match["part"].endswith("_A") and source.tensors[name].ndim
    }
    stated = stated_of(source, options, problems, ranks=ranks.values())
    notes += stated.notes
    if stated.alpha is None and stated.scaling is None:
        hint = "give --alpha (and --rslora if used), or put the config beside adapter_model.safetensors"
        if not any(path.startswith(PREFIX) for path in source.paths.values()):
            hint += (
                f"; {FORMAT_OPTION} diffusers if a diffusion tool wrote it (no alpha means scaling 1 there), "
                "converted if it was converted for a graph"
            )
        hint += "".join(f"; {note}" for note in source.notes if CONFIG_NAME in note)
        raise AdapterError(
            f"adapter '{source.name}' has no {CONFIG_NAME} beside it, and its file doesn't state alpha"
            f"{where_to_look(source)}",
            hint,
            problems,
        )
    rank = stated.rank or min(ranks.values(), default=1)
    # If the ranks differ, alpha/rank differs by module, as in a config whose rank_pattern lists them.
    differ = stated.rank is None and len(set(ranks.values())) > 1
    alphas = {path: stated.alpha_of(rows) for path, rows in ranks.items()} if stated.alpha is None else {}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": stated.alpha if stated.alpha is not None else stated.alpha_of(rank),
        "use_rslora": stated.rslora,
        "rank_pattern": {"^" + re.escape(path): rows for path, rows in ranks.items()} if differ else {},
        "alpha_pattern": {"^" + re.escape(path): alpha for path, alpha in alphas.items()} if differ else {},
    }


def _refuse_other_tuners(source: AdapterSource, config: Mapping[str, Any]) -> None:
    tuner = str(config.get("peft_type")).upper()
    if tuner == "LORA":
        return
    if tuner in _PROMPT_TUNERS:
        raise AdapterError(
            f"adapter '{source.name}' is {tuner}: it changes the model's input, not its weights",
            "it can't be merged; train a LoRA instead",
        )
    raise AdapterError(
        f"adapter '{source.name}' is {tuner}, not LoRA",
        f"if PEFT can convert {tuner}: from peft import save_as_lora; "
        "save_as_lora(FOLDER, model, rank=R), then use FOLDER; otherwise merge with PEFT's merge_and_unload",
    )


def _part(match: re.Match[str]) -> str | None:
    return _PARTS.get(match["part"] + (match["leaf"] or ""))


def _sort_tensors(source: AdapterSource, table: PartsTable) -> tuple[dict[str, Array], dict[str, str]]:
    """Sort the tensors into modules' parts, whole parameters (with their tensors' names) and ignored ones."""
    extras: dict[str, Array] = {}
    names: dict[str, str] = {}
    are_of_embedding: dict[int, bool] = {}
    for name, unwrapped, values in source.entries():
        # diffusion-pipe puts ComfyUI's name for the denoiser in front, but its config has PEFT's own paths.
        component, path = strip_denoiser(unwrapped.removeprefix(PREFIX))
        match = _LORA.match(path)
        part = _part(match) if match else None
        if match and part:
            row = table.add(match["path"], part, name=name, values=values, component=component)
            is_embedding = "embedding" in match["part"]
            if is_embedding:
                row.kind = "embedding"
            if part != "magnitude" and are_of_embedding.setdefault(id(row), is_embedding) != is_embedding:
                table.problems.append(
                    f"{row.label}: {' and '.join(row.names)} are an embedding's and another layer's: no pair"
                )
        elif _ASIDE.search(path):
            table.aside.append(name)
        elif is_rows(path):
            continue  # read by token_rows
        elif ".lora_" in path:
            table.unknown([name], "not a tensor of a LoRA adapter; merge with PEFT's merge_and_unload")
        else:
            target = path.replace(".token_adapter.base_layer.", ".")
            target = target.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if target not in extras:
                extras[target] = values
                names[target] = name
            elif np.array_equal(extras[target], values):
                table.aside.append(name)  # PEFT saves the bias of a module to save twice
            else:
                table.unknown([name], f"a second, different value of {target}")
    return extras, names


def _check_patterns(table: PartsTable, config: Mapping[str, Any]) -> None:
    """Refuse patterns that fit a path only without a leading ``module``, which may be DataParallel's.

    PEFT around DataParallel matched them against the path with it, DataParallel around the model inside of
    PEFT against the path without it.
    """
    for _, path in table.rows:
        inner = path.removeprefix("module.")
        for key in ("rank_pattern", "alpha_pattern") if inner != path else ():
            if pattern_values(config, key, inner) and not pattern_values(config, key, path):
                table.problems.append(
                    f"{path}: config {key} has a key that fits only without 'module.' in front; if "
                    "that is DataParallel's, save the model inside of it (model.module)"
                )


def _base_copies(paths: Iterable[str], table: PartsTable) -> int:
    """Count the base's weights from a state dict of the whole model; PEFT itself saves only embeddings so."""
    kinds = {path: parts.kind for (_, path), parts in table.rows.items()}
    copies = [path.partition(".base_layer.")[0] for path in paths if ".base_layer." in path]
    return sum(kinds.get(path.removeprefix(PREFIX)) != "embedding" for path in copies)


def _refuse_attention(table: PartsTable) -> None:
    suffix = ".base_layer.out_proj"
    for key in [key for key in table.rows if key[1].endswith(suffix)]:
        module = key[1].removesuffix(suffix)
        table.problems.append(
            f"{module}: LoRA on nn.MultiheadAttention; PEFT's merge counts out_proj's change twice (0.21), "
            "so the meaning of the numbers depends on its version; merge with the PEFT that trained it"
        )
        del table.rows[key]


def _name_parameters(table: PartsTable, rules: LoraRules, config: Mapping[str, Any]) -> None:
    """Set the parameter that each nested pair of ``target_parameters`` changes."""
    levels: dict[str, list[Parts]] = {}
    for parts in table.rows.values():
        levels.setdefault(parts.path.replace(".base_layer", ""), []).append(parts)
    for path, rows in levels.items():
        names = parameter_names(path, rules.target_parameters, len(rows))
        plain = len(rows) == 1 and rows[0].path == path
        if plain and (not names or is_target_module(path, config)):
            continue
        rows.sort(key=lambda parts: parts.path.count(".base_layer"))
        for parts, name in zip(rows, nesting(path, names, len(rows), table.problems), strict=False):
            parts.path, parts.kind, parts.parameter = path, "parameter", name


def _check_experts(modules: Mapping[str, LoraModule], problems: list[str]) -> None:
    """Check the nesting of experts by their shapes: ``down_proj``'s outputs are ``gate_up_proj``'s inputs.

    Factors that act on the other axis (see `lora_export.formats.reading.experts`) have the two exchanged. The
    number of experts may differ: LongCat-Flash has down_proj only for those that compute something.
    """
    for key, up in modules.items():
        down = modules.get(key.removesuffix("gate_up_proj") + "down_proj")
        if up.kind != "parameter" or up.parameter != "gate_up_proj" or down is None:
            continue
        (up_in, up_out), (down_in, down_out) = _sizes(up), _sizes(down)
        straight = up_in == down_out
        exchanged = up_out == down_in and up_in == 2 * down_out
        if not (straight or exchanged):
            problems.append(
                f"{up.path}: gate_up_proj ({up_out}, {up_in}) × {up.experts} and down_proj "
                f"({down_out}, {down_in}) × {down.experts} don't fit together: nested in an unknown order"
            )


def _sizes(module: LoraModule) -> tuple[int, int]:
    """Return the inputs of lora_A and the outputs of lora_B."""
    return int(module.lora_a.shape[1]), int(module.lora_b.shape[0])


def _expand_blocks(parts: Parts, blocks: Mapping[str, Any], room: Room, problems: list[str]) -> None:
    """Turn BD-LoRA's stacked blocks into the block-diagonal matrix they mean (``lora/variants.py``)."""
    count = blocks.get("nblocks")
    if not isinstance(count, int) or count < 1:
        problems.append(f"config use_bdlora: nblocks is {count!r}, wanted a whole number above 0")
        return
    for part, key in zip(("lora_a", "lora_b"), BLOCK_LISTS, strict=True):
        if part not in parts.tensors or not any(str(word) in parts.path for word in blocks.get(key) or []):
            continue
        stacked = parts.tensors[part]
        if stacked.ndim != 2 or stacked.shape[0] % count:
            problems.append(
                f"{parts.label}: {part} {stacked.shape} is not {count} stacked blocks (use_bdlora)"
            )
            continue
        rows, cols = stacked.shape[0] // count, stacked.shape[1]
        if not room.take(stacked, count, f"{parts.label}: {part}", problems):
            continue
        full = np.zeros((rows * count, cols * count), stacked.dtype)
        for i in range(count):
            full[i * rows : (i + 1) * rows, i * cols : (i + 1) * cols] = stacked[i * rows : (i + 1) * rows]
        parts.tensors[part] = full


FORMAT = Format(
    expects=f"{PREFIX}<module>.lora_A.weight, .lora_B.weight beside {CONFIG_NAME}",
    recognises=recognises,
    read=read,
)
