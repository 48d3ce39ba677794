"""Read adapters of Apple's mlx-lm: ``adapters.safetensors`` beside its own ``adapter_config.json``.

Source: https://github.com/ml-explore/mlx-lm, ``tuner/lora.py``, ``tuner/dora.py``, ``tuner/utils.py``.
``<module>.lora_a`` is ``(in_dim, rank)``, ``.lora_b`` ``(rank, out_dim)``: the transposes of PEFT's. The
change is ``scale * (lora_a @ lora_b)ᵀ`` with the config's ``lora_parameters.scale`` as the whole factor, not
divided by the rank. DoRA's ``.m`` is the norm of each output row, as PEFT's. For an embedding, lora_a is
``(num_embeddings, rank)``, and the change applies to the weight, also in an output head that is tied to it
(``LoRAEmbedding.as_linear`` adds it there, ``fuse`` writes one weight). The file does not say which modules
are embeddings: a name is a first guess, and the base decides (`sites.kinds`). Not supported: experts
(``switch_mlp``: stacked along an axis of their own, under names that no Hugging Face checkpoint has) and
DoRA's embedding, whose norms run along the other axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats.reading.embedding_names import is_embedding_name
from lora_export.formats.reading.pairs import Parts, PartsTable, adapter_of, build_module, raise_problems
from lora_export.formats.reading.source import CONFIG_NAME, AdapterSource, Format, ReadOptions

_NAME = re.compile(r"^(?P<path>.+)\.(?P<part>lora_a|lora_b|m)$")


def recognises(source: AdapterSource) -> bool:
    """Return whether names end in ``.lora_a`` or ``.lora_b``, in lower case, or the config is mlx-lm's."""
    small = any(path.endswith((".lora_a", ".lora_b")) for path in source.paths.values())
    return small or (source.config is not None and source.peft_config is None)


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from the files of ``mlx_lm.lora``.

    Raises:
        AdapterError: The files are a full fine-tuning, have no scale, or break rules; all problems are
            listed.
    """
    config: Mapping[str, Any] = source.config if source.config is not None else {}
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"adapter '{source.name}' is mlx-lm's fine_tune_type '{kind}', not a low-rank change",
            "for 'full', the file holds whole weights: fuse it with mlx_lm.fuse and export that model",
        )
    table = PartsTable()
    scale, rank = _settings(source, config, options, table.problems)
    for name, path, values in source.entries():
        match = _NAME.match(path)
        if match is None:
            table.unknown([name], "not lora_a, lora_b or m, as mlx-lm saves them")
        elif match["part"] == "m":
            table.add(match["path"], "magnitude", name, values)
        elif values.ndim != 2:
            table.unknown([name], f"shape {values.shape}: experts of mlx-lm (switch_mlp) are not supported")
        else:
            table.add(match["path"], match["part"], name, values.T)
    modules = {}
    for parts in table.rows.values():
        _orient(parts, kind, table.problems)
        parts.rank = rank
        alpha = None if config else options.alpha
        if scale is not None and parts.rows:
            alpha = scale * parts.rows
        module = build_module(parts, alpha, False, table.problems)
        if module:
            modules[module.key] = replace(module, kind_by="name", table_everywhere=True)
    raise_problems(source, table.problems, "fix the listed problems, or fuse with mlx_lm.fuse")
    return adapter_of(source, "mlx", table=table, modules=modules, config=dict(config))


def _settings(
    source: AdapterSource, config: Mapping[str, Any], options: ReadOptions, problems: list[str]
) -> tuple[float | None, int | None]:
    """Return the factor of the change and the stated rank."""
    parameters = config.get("lora_parameters", {})
    if not isinstance(parameters, Mapping):
        problems.append(f"config lora_parameters: {parameters!r}, wanted an object with rank and scale")
        return None, None
    if options.rslora or (options.alpha is not None and config):
        problems.append("mlx-lm's scale is the whole factor; omit --alpha and --rslora")
    if parameters.get("alpha") is not None:
        # Until the middle of 2024 the factor was scale * alpha / rank; later versions read only scale.
        problems.append(
            f"config lora_parameters.alpha: {parameters['alpha']!r}; old versions of mlx-lm multiply scale "
            "by alpha / rank, new ones do not: write the whole factor as scale, and remove alpha"
        )
    rank = parameters.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(f"config lora_parameters.rank: {rank!r}, wanted a whole number above 0")
        rank = None
    if options.rank is not None and rank is not None and options.rank != rank:
        problems.append(f"rank: the config says {rank}, the option {options.rank}; omit the option")
    scale = parameters.get("scale")
    if not config:
        if options.alpha is None:
            problems.append(
                f"scale: mlx-lm's {CONFIG_NAME} is missing beside {source.file.name}; put it there (its "
                "lora_parameters.scale is the factor of the change), or give --alpha, scale times rank"
            )
    elif isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e15:
        problems.append(f"config lora_parameters.scale: {scale!r}, wanted a number above 0")
        scale = None
    return scale, options.rank or rank


def _orient(parts: Parts, kind: str, problems: list[str]) -> None:
    """Mark a module that is an embedding, and check DoRA's norms against the config."""
    if is_embedding_name(parts.path):
        parts.kind = "embedding"
        if "magnitude" in parts.tensors:
            problems.append(
                f"{parts.label}: mlx-lm's DoRA of an embedding has a norm for each token; not supported"
            )
    elif kind == "dora" and "magnitude" not in parts.tensors:
        problems.append(f"{parts.label}: has no m, but the config's fine_tune_type is dora")
    elif kind == "lora" and "magnitude" in parts.tensors:
        problems.append(f"{parts.label}: has an m (DoRA), but the config's fine_tune_type is lora")


FORMAT = Format(
    expects=f"<module>.lora_a (in_dim, rank), <module>.lora_b (rank, out_dim) beside mlx-lm's {CONFIG_NAME}",
    recognises=recognises,
    read=read,
)
