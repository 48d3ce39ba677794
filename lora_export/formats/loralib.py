"""Read checkpoints of Microsoft's loralib: ``<module>.lora_A`` ``(rank, in)``, ``….lora_B`` ``(out, rank)``.

Source: https://github.com/microsoft/LoRA, ``loralib/layers.py``. ``lora_state_dict(model, bias)`` saves the
factors and, with ``bias="all"`` or ``"lora_only"``, biases, which replace the base's. The file states neither
alpha nor the kind of layer:

- Embedding: factors as for a Linear, but the change is transposed. A customary name is a first guess, and the
  base decides (`sites.kinds`).
- MergedLinear (GPT-2's fused qkv): ``lora_A`` stacks one factor for each enabled part, ``lora_B`` their rows.
  ``enable_lora`` in the checkpoint's dict tells the enabled parts; a file without it is refused.
- ConvLoRA: its factors make a reshaped matrix whose rank is a multiple of the stated one; it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_export.adapter import Adapter, Array
from lora_export.formats.reading.embedding_names import is_embedding_name
from lora_export.formats.reading.pairs import (
    Parts,
    PartsTable,
    Room,
    adapter_of,
    build_module,
    raise_problems,
)
from lora_export.formats.reading.source import AdapterSource, Format, ReadOptions
from lora_export.formats.reading.stated import stated_of, where_to_look
from lora_export.formats.reading.tensors import value_problems

_LORA = re.compile(r"^(?P<path>.+)\.lora_(?P<part>[AB])$")

# ``loralib/layers.py``: ``Embedding.forward`` and ``Embedding.train``.
_TABLE = (
    "loralib trains LoRA on an embedding only for the lookup, but its eval() adds it to the weight, and so "
    "also to an output head that is tied to it; here it is added only to the lookup"
)


def recognises(source: AdapterSource) -> bool:
    """Return whether a name ends in ``.lora_A`` or ``.lora_B``, outside of a PEFT folder (AdaLoRA's)."""
    return source.peft_config is None and any(_LORA.match(path) for path in source.paths.values())


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from a loralib checkpoint.

    Raises:
        AdapterError: alpha is stated nowhere, or the file breaks rules; all problems are listed.
    """
    table, extras = _sort_tensors(source)
    # A MergedLinear's lora_A stacks several factors; the columns of lora_B are the rank of each.
    factors = [parts.tensors["lora_b"] for parts in table.rows.values() if "lora_b" in parts.tensors]
    ranks = [lora_b.shape[1] for lora_b in factors if lora_b.ndim == 2]
    stated = stated_of(source, options, table.problems, ranks=ranks)
    if stated.alpha is None and stated.scaling is None:
        table.problems.append(f"alpha: stated nowhere in the file; give --alpha{where_to_look(source)}")
    modules, room = {}, Room(source.tensors)
    for parts in table.rows.values():
        parts.kind = "embedding" if is_embedding_name(parts.path) else None
        parts.rank = stated.rank
        factor = _unstack(
            parts,
            source.settings.get("enable_lora"),
            rslora=stated.rslora,
            room=room,
            problems=table.problems,
        )
        alpha = stated.alpha_of(parts.rows)
        if stated.alpha is not None:
            alpha = stated.alpha * factor
        module = build_module(parts, alpha, stated.rslora, table.problems)
        if module:
            modules[module.key] = module if factor != 1 else replace(module, kind_by="name")
    raise_problems(
        source, table.problems, "fix the listed problems; a loralib file holds lora_A, lora_B and biases"
    )
    tables = [module.path for module in modules.values() if module.kind == "embedding"]
    notes = [f"{path}, by its name an embedding: {_TABLE}" for path in tables]
    made = adapter_of(
        source,
        "loralib",
        table=table,
        modules=modules,
        config=dict(source.settings),
        notes=(*stated.notes, *notes),
    )
    named = {path: name for name, path in source.paths.items() if path in extras and path != name}
    return replace(made, extras=extras, extra_tensors=named)


def _sort_tensors(source: AdapterSource) -> tuple[PartsTable, dict[str, Array]]:
    table = PartsTable()
    extras: dict[str, Array] = {}
    for name, path, values in source.entries():
        if match := _LORA.match(path):
            table.add(match["path"], f"lora_{match['part'].lower()}", name, values)
        elif path.endswith(".bias"):
            extras[path] = values
        else:
            table.unknown(
                [name], "neither a LoRA factor nor a bias; save only loralib.lora_state_dict(model)"
            )
    table.problems += value_problems(extras.items())
    return table, extras


def _unstack(parts: Parts, enabled: Any, rslora: bool, room: Room, problems: list[str]) -> float:
    """Turn MergedLinear's stacked factors into one pair, in place.

    With ``k`` enabled parts ``lora_A`` is ``(k * rank, in)`` and ``lora_B`` ``(k * part, rank)``: part i
    of the weight gets ``lora_B[i] @ lora_A[i]``. As one pair that is a ``lora_B`` of blocks, with rows of
    zeros for the parts that are not enabled, and rank ``k * rank``.

    Returns:
        Factor for alpha that keeps the scaling.
    """
    lora_a, lora_b = parts.tensors.get("lora_a"), parts.tensors.get("lora_b")
    if lora_a is None or lora_b is None or lora_a.ndim != 2 or lora_b.ndim != 2 or not lora_b.shape[1]:
        return 1.0
    rank = lora_b.shape[1]
    stacked, rest = divmod(lora_a.shape[0], rank)
    if rest or stacked == 1:
        if parts.rank and parts.rank != rank and rank % parts.rank == 0:
            problems.append(
                f"{parts.label}: rank {parts.rank} is stated, but the factors have rank {rank} "
                "(a multiple means loralib's ConvLoRA: merge it with loralib, model.eval(), and export it)"
            )
            parts.rank = rank
        return 1.0
    if (
        not isinstance(enabled, (list, tuple))
        or sum(map(bool, enabled)) != stacked
        or lora_b.shape[0] % stacked
    ):
        problems.append(
            f"{parts.label}: lora_A {lora_a.shape} stacks {stacked} factors for lora_B {lora_b.shape}: "
            "loralib's MergedLinear; add its enable_lora to the checkpoint's dict, such as "
            "'enable_lora': [True, False, True]"
        )
        parts.rank = None
        return 1.0
    if not room.take(lora_b, len(enabled), f"{parts.label}: lora_B", problems):
        return 1.0
    parts.tensors["lora_b"] = _spread(lora_b, enabled, stacked)
    parts.rank = parts.rank and parts.rank * stacked
    return math.sqrt(stacked) if rslora else float(stacked)


def _spread(lora_b: Array, enabled: Sequence[Any], stacked: int) -> Array:
    """Put the rows of each enabled part into their place and into columns of their own; the rest is zeros."""
    part_rows, rank = lora_b.shape[0] // stacked, lora_b.shape[1]
    full = np.zeros((part_rows * len(enabled), stacked * rank), lora_b.dtype)
    slots = [slot for slot, on in enumerate(enabled) if on]
    for i, slot in enumerate(slots):
        block = lora_b[i * part_rows : (i + 1) * part_rows]
        full[slot * part_rows : (slot + 1) * part_rows, i * rank : (i + 1) * rank] = block
    return full


FORMAT = Format(
    expects="<module>.lora_A, <module>.lora_B (without .weight at the end), and --alpha",
    recognises=recognises,
    read=read,
)
