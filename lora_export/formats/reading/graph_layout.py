"""Read tensors in a graph's layout as an adapter: the common part of the converted formats.

``<module>.lora_A.weight`` ``(in_dim, rank)``, ``.lora_B.weight`` ``(rank, out_dim)`` with the scaling in it,
``.lora_B.bias`` and ``.lora_scale.weight`` ``(out_dim,)``; for a convolution as in PyTorch. See
`lora_export.graph.exposed`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.formats.provenance import LAYOUT, LAYOUT_KEY
from lora_export.formats.reading.pairs import Parts, PartsTable, adapter_of, build_module, raise_problems
from lora_export.formats.reading.source import AdapterSource, ReadOptions
from lora_export.formats.reading.tensors import value_problems
from lora_export.untrusted.documents import DocumentError, parse_json
from lora_export.untrusted.fields import FieldError, check_plain

_NAME = re.compile(
    r"^(?P<path>.+)\.(?P<part>lora_A|lora_B(?:\.(?P<cut>\d+))?|lora_scale)(?:\.MatMul)?"
    r"\.(?P<leaf>weight|(?<=B\.)bias)$"
)
_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_scale": "scale"}
_FOLDED = "is already folded into the file's lora_B; omit the option"
EXPECTS = "<module>.lora_A.weight (in_dim, rank), .lora_B.weight (rank, out_dim)"


def has_names(tensors: Mapping[str, Array]) -> bool:
    """Return whether tensors have the names of a graph's LoRA inputs."""
    return any(_NAME.match(name) for name in tensors)


def read_converted(
    source: AdapterSource, options: ReadOptions, format: str, config: Mapping[str, Any]
) -> Adapter:
    """Make an adapter from tensors in a graph's layout; the scaling is 1, the factors are views.

    Args:
        source: The file.
        options: The user's options; alpha and rslora are refused.
        format: Key of the format that reads it.
        config: The file's metadata, with ``kinds`` as JSON if not all modules are linear.

    Raises:
        AdapterError: The file breaks rules; all problems are listed.
    """
    table = PartsTable()
    for key, value in (("alpha", options.alpha), ("rslora", options.rslora)):
        if value is not None:
            table.problems.append(f"{key}: {_FOLDED}")
    kinds = _kinds(config, table.problems)
    for name, values in source.tensors.items():
        if match := _NAME.match(name):
            part = "lora_bias" if match["leaf"] == "bias" else _PARTS[match["part"].partition(".")[0]]
            part += f".{match['cut']}" if match["cut"] else ""
            _add(table, match["path"], part=part, name=name, values=values, kinds=kinds)
        else:
            table.unknown([name], f"not {EXPECTS}")
    modules = {}
    for parts in table.rows.values():
        _join_cuts(parts)
        parts.rank = options.rank
        scale = parts.tensors.pop("scale", None)
        lora_a = parts.tensors.get("lora_a")
        module = build_module(
            parts, float(lora_a.shape[0] or 1) if lora_a is not None else 1.0, False, table.problems
        )
        if module:
            known = module.kind == "conv" or "kinds" in config
            module = replace(module, kind_by="file" if known else "name")
            modules[module.key] = _with_scale(module, scale, table.problems)
    raise_problems(source, table.problems, "convert the original adapter again")
    notes = []
    if not config.get("base_sha256") and not config.get("base_version"):
        notes.append("the file doesn't state the base it was converted for, so this can't be checked")
    made = adapter_of(
        source, format, table=table, modules=modules, config={LAYOUT_KEY: LAYOUT, **config}, notes=notes
    )
    return replace(made, base_model=config.get("base") or None)


def _add(table: PartsTable, path: str, part: str, name: str, values: Array, kinds: Mapping[str, str]) -> None:
    kind = kinds.get(path)
    row = table.add(path, part, name, values.T if values.ndim == 2 and kind != "conv" else values)
    if kind == "embedding":
        row.kind = "embedding"


def _join_cuts(parts: Parts) -> None:
    """Join the tensors ``.lora_B.0.weight``, ``.lora_B.1.weight`` … that the B of a pack was cut into."""
    cuts = sorted((int(part.partition(".")[2]), part) for part in parts.tensors if part.startswith("lora_b."))
    if cuts and [number for number, _ in cuts] == list(range(len(cuts))):
        values = [parts.tensors.pop(part) for _, part in cuts]
        if len({value.shape[1:] for value in values}) == 1:
            parts.tensors["lora_b"] = np.concatenate(values)


def _kinds(config: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    text = config.get("kinds") or "{}"
    try:
        found: dict[str, str] = check_plain(Mapping[str, str], parse_json(text), "metadata kinds")
    except (DocumentError, FieldError) as error:
        problems += error.problems if isinstance(error, FieldError) else [
            f"metadata kinds: {text[:80]!r} is not a JSON object"
        ]  # fmt: skip
        return {}
    return found


def _with_scale(module: LoraModule, scale: Array | None, problems: list[str]) -> LoraModule:
    # Without DoRA, all scales are 1.
    if scale is None or (scale == 1).all():
        return module
    problems += value_problems([(f"{module.path} lora_scale", scale)])
    if scale.shape != (module.lora_b.shape[0],):
        problems.append(
            f"{module.path}: lora_scale {scale.shape}, wanted one value for each of {module.lora_b.shape[0]}"
        )
    return replace(module, scale=scale)
