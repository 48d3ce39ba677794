"""Recognise packed quantised weights by the names of their tensors, and name their formats.

The names are those that the formats' own tools write: GPTQ and AWQ (AutoGPTQ, GPTQModel, AutoAWQ),
bitsandbytes (``functional.QuantState.as_dict``), compressed-tensors, MXFP4 (gpt-oss), ModelOpt, HQQ, AQLM,
VPTQ, quanto.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

# Format → tensors that a module has all of. The first format that fits counts.
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "GPTQ": ("qweight", "qzeros", "g_idx"),
    "AWQ": ("qweight", "qzeros"),
    "GPTQ or Marlin": ("qweight",),
    "bitsandbytes, 4 bits": ("weight.absmax",),
    "bitsandbytes, 8 bits": ("SCB",),
    "compressed-tensors": ("weight_packed",),
    "compressed-tensors, sparse": ("compressed", "bitmask"),
    "NVFP4": ("weight_scale_2",),
    "HQQ": ("W_q", "scale", "zero"),
    "AQLM": ("codes", "codebooks"),
    "VPTQ": ("indices", "centroids"),
    "quanto": ("weight._data",),
    "torchao": ("_weight_qdata",),
    "EETQ": ("weight_scales",),
}
# Further tensors of a format, shown with it if they are there.
_MORE = re.compile(
    r"^(scales|weight_scale|weight_zero_point|weight_shape|weight_global_scale|weight\.quant_map"
    r"|weight\.quant_state\..*|weight\.nested_.*|weight_format|qzeros|g_idx|weight\._scale|_weight_scale)$"
)
_BLOCKS = "_blocks"
_SCALES = "_scales"


def packed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(parameter, format and its tensors)`` for each parameter that is stored packed."""
    known = set(names)
    modules: dict[str, set[str]] = {}
    for name in known:
        module, leaf = _split(name)
        modules.setdefault(module, set()).add(leaf)
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in known:
            parameter = name.removesuffix(_BLOCKS)
            last = parameter.rpartition(".")[2]
            yield parameter, f"MXFP4: {last}{_BLOCKS}, {last}{_SCALES}"
    for module, leaves in modules.items():
        for kind, needed in _BESIDE.items():
            if leaves.issuperset(needed):
                more = sorted(leaf for leaf in leaves if _MORE.match(leaf) and leaf not in needed)
                yield f"{module}.weight", f"{kind}: {', '.join([*needed, *more])}"
                break


def _split(name: str) -> tuple[str, str]:
    """Return the module and the rest of a name; ``weight.absmax`` is one word."""
    module, dot, leaf = name.partition(".weight.")
    if dot:
        return module, f"weight.{leaf}"
    module, _, leaf = name.rpartition(".")
    return module, leaf
