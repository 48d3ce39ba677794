"""The naming of a hand-written LoRA layer: two ``nn.Linear(bias=False)`` called ``A`` and ``B``.

``<module>.A.weight`` is ``(rank, in_dim)``, ``<module>.B.weight`` ``(out_dim, rank)``; the change of the
weight is ``scaling * B @ A``. The file is a bare state dict, or a dict that also holds alpha, r or scaling.
"""

from __future__ import annotations

import math
import re

from lora_export.adapter import Adapter
from lora_export.formats.pairs import PartsTable, adapter_of, build_module, raise_problems, stated_alpha
from lora_export.formats.source import Format, Options, Source

_LORA = re.compile(r"^(?P<path>.+)\.(?P<part>[AB])\.weight$")


def recognises(source: Source) -> bool:
    """Whether tensors are named ``….A.weight`` and ``….B.weight``."""
    parts = {match["part"] for name in source.tensors if (match := _LORA.match(name))}
    return parts == {"A", "B"}


def read(source: Source, options: Options) -> Adapter:
    """Make an adapter of ``….A.weight`` and ``….B.weight``.

    Raises:
        AdapterError: alpha is stated nowhere, or a list of all that is wrong.
    """
    table = PartsTable()
    for name, values in source.tensors.items():
        if match := _LORA.match(name):
            table.add(match["path"], f"lora_{match['part'].lower()}", name, values)
        else:
            table.unknown([name], "not A.weight or B.weight; save only these")
    settings = source.settings
    alpha = stated_alpha(options, settings.get("alpha"), table.problems)
    scaling = settings.get("scaling")
    rslora = bool(settings.get("rslora") if options.rslora is None else options.rslora)
    if alpha is None and scaling is None:
        table.problems.append("alpha: stated nowhere in the file; give --alpha")
    modules = {}
    for parts in table.rows.values():
        parts.rank = options.rank or settings.get("rank")
        own = alpha
        lora_a = parts.tensors.get("lora_a")
        if own is None and scaling is not None and lora_a is not None:
            rows = int(lora_a.shape[0])
            own = float(scaling) * (math.sqrt(rows) if rslora else rows)
        module = build_module(parts, own, rslora, table.problems)
        if module:
            modules[module.key] = module
    raise_problems(source, table.problems, "mend what is listed; the file holds A.weight, B.weight and alpha")
    return adapter_of(source, "plain", table, modules, dict(settings))


FORMAT = Format(
    expects="<module>.A.weight, <module>.B.weight of two nn.Linear(bias=False), and --alpha",
    recognises=recognises,
    read=read,
)
