"""Read files of a hand-written LoRA layer: two ``nn.Linear(bias=False)`` called ``A`` and ``B``.

``<module>.A.weight`` is ``(rank, in_dim)``, ``<module>.B.weight`` ``(out_dim, rank)``; the change of the
weight is ``scaling * B @ A``. The file is a bare state dict, or a dict that also holds alpha, r or scaling.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lora_export.adapter import Adapter
from lora_export.formats.reading.pairs import PartsTable, adapter_of, build_module, raise_problems
from lora_export.formats.reading.source import AdapterSource, Format, ReadOptions
from lora_export.formats.reading.stated import stated_of, where_to_look

_LORA = re.compile(r"^(?P<path>.+)\.(?P<part>[AB])\.weight$")


def recognises(source: AdapterSource) -> bool:
    """Return whether tensors are named ``….A.weight`` and ``….B.weight``."""
    parts = {match["part"] for path in source.paths.values() if (match := _LORA.match(path))}
    return parts == {"A", "B"}


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from ``….A.weight`` and ``….B.weight``.

    Raises:
        AdapterError: alpha is stated nowhere, or the file breaks rules; all problems are listed.
    """
    table = PartsTable()
    for name, path, values in source.entries():
        if match := _LORA.match(path):
            table.add(match["path"], f"lora_{match['part'].lower()}", name, values)
        else:
            table.unknown([name], "not A.weight or B.weight; save only these")
    ranks = [parts.rows for parts in table.rows.values() if parts.rows is not None]
    stated = stated_of(source, options, table.problems, ranks=ranks)
    if stated.alpha is None and stated.scaling is None:
        table.problems.append(f"alpha: stated nowhere in the file; give --alpha{where_to_look(source)}")
    modules = {}
    for parts in table.rows.values():
        parts.rank = stated.rank
        module = build_module(parts, stated.alpha_of(parts.rows), stated.rslora, table.problems)
        if module:
            modules[module.key] = replace(module, kind_by="layers")
    raise_problems(
        source, table.problems, "fix the listed problems; the file holds A.weight, B.weight, alpha"
    )
    return adapter_of(
        source, "plain", table=table, modules=modules, config=dict(source.settings), notes=stated.notes
    )


FORMAT = Format(
    expects="<module>.A.weight, <module>.B.weight of two nn.Linear(bias=False), and --alpha",
    recognises=recognises,
    read=read,
)
