"""Find the quantised weights of a checkpoint by the tensors beside them, and by its config.

Codes of eight bits with scales are understood (`lora_export.storage.scales`). Parameters in other formats are
refused, with the format's name. A weight beside them that is stored as plain floats is merged into as usual:
attention beside MXFP4 experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.adapter import Array
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.packed import packed
from lora_export.errors import CheckpointError
from lora_export.plan import Refusal
from lora_export.storage.safetensors import FLOATS, StoredTensor
from lora_export.storage.scales import dequantise, grid_of, looks_scaled

_QUANTISED = "stored quantised"
HINT = "merge into the unquantised base and quantise the result, or keep the adapter apart"
CONFIG_KEYS = ("quantization_config", "compression_config")
# Methods whose tensors tell by themselves what is quantised and how.
_BY_TENSORS = {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4"}
_CODES = {"F8_E4M3", "F8_E5M2", "I8"}
_FLOAT_SCALES = {"F64", "F32", "F16", "BF16"}
# Formats of `packed` that transformers needs further packages for.
_NOT_CAPTURED = ("GPTQ", "AWQ", "compressed-tensors")
# Scales of the layer's inputs, which stay as they are.
_OF_INPUTS = re.compile(r"(^|_)(input|activation|act)(_|$)|^scale_(input|output)$|^(output|k|v|q)_scale$")
# Only these, beside codes, never change what they stand for. Whatever else a format puts there may: scales,
# zeros, an order of the columns (``weight_g_idx``), factors of the inputs.
_HARMLESS = re.compile(r"(^|_)(weight|bias)$")
# ModelOpt's factors of a layer's inputs, by which it has divided the weight: it is not what was trained on.
_DIVIDED = "pre_quant_scale"
_SHOWN = 4
# ComfyUI's marks in a file with scaled weights.
_MARKS = {"scaled_fp8", "comfy_quant"}


@dataclass(frozen=True)
class Scaled:
    """Weight of codes and scales.

    Attributes:
        codes: The stored codes.
        scales: Scales of the codes.
        grid: Number of elements along each axis that share a scale.
        inputs: Names of fixed scales of the layer's inputs.
    """

    codes: StoredTensor
    scales: StoredTensor
    grid: tuple[int, ...]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantised:
    """Quantised weights of a checkpoint.

    Attributes:
        checkpoint: The checkpoint.
        scaled: Name of a weight → codes and scales that are understood.
        refused: Name of a stored weight → reason why it is not understood.
        packed: Parameter that is not stored as a tensor of its own → format and its tensors.
    """

    checkpoint: Checkpoint
    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    packed: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, tensor: str) -> Refusal | None:
        """Return the reason why a stored weight can't be merged into; None if it can."""
        if tensor in self.scaled:
            return None
        if tensor in self.refused:
            return Refusal("quantised", f"{_QUANTISED} ({self.refused[tensor].detail})")
        if tensor in self.packed:
            return Refusal("quantised", f"{_QUANTISED} ({self.packed[tensor]})")
        stored = self.checkpoint.tensors[tensor]
        if stored.code not in FLOATS:
            reason = f"{tensor} is stored as {stored.code}: a quantised weight can't be merged into"
            return Refusal("quantised", reason)
        if stored.code in _CODES and looks_scaled(self.checkpoint.read(tensor)):
            return Refusal(
                "quantised",
                f"{_QUANTISED} ({tensor} is {stored.code} up to its end, as codes with a scale are, "
                "but there is no scale for it)",
            )
        return None

    def packed_at(self, parameter: str) -> Refusal | None:
        """Return the refusal of a parameter that is only stored packed; None for others."""
        for name, kind in self.packed.items():
            if f".{name}".endswith(f".{parameter}") or f".{parameter}".endswith(f".{name}"):
                return Refusal("quantised", f"{_QUANTISED} ({kind})")
        return None

    def read(self, tensor: str) -> tuple[Array, Array]:
        """Return codes and scales of a weight in ``scaled``."""
        scaled = self.scaled[tensor]
        return self.checkpoint.read(scaled.codes.name), self.checkpoint.read(scaled.scales.name)

    def values(self, tensor: str) -> Array:
        """Return the values that a stored tensor stands for; those of ``scaled`` in float32.

        Raises:
            CheckpointError: The tensor is quantised in a way that is not understood.
        """
        if tensor in self.scaled:
            return dequantise(*self.read(tensor), self.scaled[tensor].grid)
        if (tensor in self.refused or tensor in self.packed) and (refusal := self.refusal(tensor)):
            raise CheckpointError(
                f"{self.checkpoint.folder}: {tensor} is {refusal.detail}: its values can't be compared",
                "give the unquantised folder with --checkpoint, or --no-checkpoint (checkpoint=False)",
            )
        return self.checkpoint.read(tensor)

    @property
    def closed(self) -> dict[str, str]:
        """Weights whose values are unknown, with the reason."""
        tensors = self.checkpoint.tensors
        found = {n: why.detail for n, why in self.refused.items() if tensors[n].code not in _FLOAT_SCALES}
        bare = [n for n, tensor in tensors.items() if tensor.code in _CODES and tensor.code in FLOATS]
        found |= {name: refusal.detail for name in bare if (refusal := self.refusal(name))}
        return {**self.packed, **found}

    @property
    def beside(self) -> set[str]:
        """Names of all tensors that have no meaning without the codes: scales and marks."""
        found = {scaled.scales.name for scaled in self.scaled.values()}
        found |= {name for scaled in self.scaled.values() for name in scaled.inputs}
        return found | {n for n in self.checkpoint.tensors if n.rpartition(".")[2] in _MARKS}


def find_quantised(checkpoint: Checkpoint) -> Quantised:
    """Find quantised weights by the names and shapes of all tensors.

    Raises:
        CheckpointError: The config names a method that the tensors alone don't explain.
    """
    tensors = checkpoint.tensors
    kinds = dict(packed(tensors))
    _refuse_methods(checkpoint, kinds)
    blocks = _block_size(checkpoint.config)
    beside: dict[str, list[str]] = {}
    for name in tensors:
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    scaled: dict[str, Scaled] = {}
    refused: dict[str, Refusal] = {}
    for name, tensor in tensors.items():
        if name in kinds or len(tensor.shape) < 2:
            continue
        scales = [tensors[scale] for scale in _scale_names(name) if scale in tensors]
        near = [*beside[name.rpartition(".")[0]], *beside.get(name, ())]
        if tensor.code not in _CODES and not scales:
            if refusal := _divided(name, near):
                refused[name] = refusal
            continue
        found = _judged(tensor, scales, [tensors[n] for n in near], blocks)
        if isinstance(found, Scaled):
            scaled[name] = found
        elif found is not None:
            refused[name] = found
    return Quantised(checkpoint, scaled, refused, kinds)


def _judged(
    tensor: StoredTensor, scales: list[StoredTensor], near: list[StoredTensor], blocks: tuple[int, ...]
) -> Scaled | Refusal | None:
    """Return codes with scales, a refusal for what is not understood, or None for plain values."""
    if tensor.code not in _CODES:
        if tensor.code in FLOATS:
            reason = f"{scales[0].name} is beside {tensor.code} values, which need no scale"
            return Refusal("quantised", reason)
        return Refusal("quantised", f"{tensor.code} with {scales[0].name}")
    of_weight = [other for other in near if other is not tensor and _is_of_weight(other.name, tensor.name)]
    unknown = [other.name for other in of_weight if other not in scales]
    if not scales:
        return Refusal("quantised", f"{tensor.code} with {', '.join(unknown)}") if unknown else None
    if len(scales) > 1 or unknown:
        listed = ", ".join([*(s.name for s in scales), *unknown])
        return Refusal("quantised", f"{tensor.code} with {listed}")
    scale = scales[0]
    if scale.code not in _FLOAT_SCALES:
        return Refusal("quantised", f"{tensor.code} with {scale.name} of type {scale.code}")
    grid = grid_of(tensor.shape, scale.shape, blocks)
    if grid is None:
        return Refusal(
            "quantised",
            f"{tensor.code} of shape {tensor.shape} with {scale.name} of shape {scale.shape}: how many "
            "values share a scale is unknown",
        )
    inputs = tuple(o.name for o in near if _OF_INPUTS.search(o.name.rpartition(".")[2]) and o not in scales)
    return Scaled(tensor, scale, grid, inputs)


def _divided(name: str, near: list[str]) -> Refusal | None:
    """Return the refusal of a weight of plain values that another tensor is a part of; None for others."""
    module, _, leaf = name.rpartition(".")
    factors = f"{module}.{_DIVIDED}"
    if leaf != "weight" or factors not in near:
        return None
    return Refusal("quantised", f"divided by {factors}")


def _scale_names(name: str) -> Iterator[str]:
    yield f"{name}_scale"
    yield f"{name}_scale_inv"
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        yield f"{module}.scale_weight"
        yield f"{module}.qscale_weight"


def _is_of_weight(name: str, weight: str) -> bool:
    """Return True if a tensor beside a weight may define the values of its codes."""
    leaf, own = name.rpartition(".")[2], weight.rpartition(".")[2]
    if _OF_INPUTS.search(leaf) or leaf in _MARKS or _HARMLESS.search(leaf):
        return False
    # Tensors of ``down_proj`` are beside ``gate_up_proj`` as well.
    return own == "weight" or leaf.startswith(own)


def _levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def _methods(config: Mapping[str, Any]) -> Iterator[Any]:
    for level in _levels(config):
        yield from (level[key] for key in CONFIG_KEYS if level.get(key))


def _block_size(config: Mapping[str, Any]) -> tuple[int, ...]:
    for method in _methods(config):
        size = method.get("weight_block_size") if isinstance(method, dict) else None
        if isinstance(size, list) and all(isinstance(n, int) and n > 0 for n in size):
            return tuple(size)
    return ()


def _refuse_methods(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> None:
    for method in _methods(checkpoint.config):
        name = str(method.get("quant_method", "unknown")) if isinstance(method, dict) else "unknown"
        if name not in _BY_TENSORS:
            count = {kind: list(kinds.values()).count(kind) for kind in dict.fromkeys(kinds.values())}
            raise CheckpointError(
                f"the base {checkpoint.folder} is quantised ({name})",
                HINT,
                [f"{number} weights as {kind}" for kind, number in count.items()],
            )
        if isinstance(method, dict) and method.get("transform_config"):
            raise CheckpointError(
                f"the base {checkpoint.folder} has weights that are rotated ({name}'s transform_config): the "
                "adapter was trained on others",
                HINT,
            )


def refuse_bare_codes(folder: Path) -> None:
    """Refuse a folder of codes with scales whose config doesn't say so: loading would take codes for values.

    Raises:
        CheckpointError: The folder is one.
    """
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:  # without safetensors; loading it says what is wrong
        return
    if any(True for _ in _methods(checkpoint.config)):
        return
    found = find_quantised(checkpoint)
    odd = [*(scaled.scales.name for scaled in found.scaled.values()), *found.refused, *found.packed]
    if odd:
        raise CheckpointError(
            f"{folder} holds {len(odd)} quantised weights, and its config doesn't say so: transformers would "
            "take their codes for values",
            "give the unquantised base; merge --dtype bfloat16 writes codes with scales as values",
            odd[:_SHOWN],
        )


def refuse_packed(folder: Path) -> None:
    """Refuse a folder of packed codes that a capture would need other packages for, or take for values.

    Raises:
        CheckpointError: Weights are stored as `_NOT_CAPTURED` stores them.
    """
    try:
        kinds = dict(packed(Checkpoint.open(folder).tensors))
    except CheckpointError:  # without safetensors; loading it says what is wrong
        return
    found = {name: kind for name, kind in kinds.items() if kind.startswith(_NOT_CAPTURED)}
    if found:
        count = {kind: list(found.values()).count(kind) for kind in dict.fromkeys(found.values())}
        raise CheckpointError(
            f"{folder} is quantised already, and its codes are not read into a graph",
            "give the unquantised model, and quantise its graph: --quantize int4, or quantize-onnx",
            [f"{number} weights as {kind}" for kind, number in count.items()],
        )


def dequantised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without its entries on quantisation, at all levels."""
    kept = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    return {k: dequantised_config(v) if isinstance(v, dict) else v for k, v in kept.items()}


def quantised_notes(quantised: Quantised, changed: Collection[str]) -> Iterator[str]:
    """Yield notes on changed tensors that are float8 or int8."""
    scaled = [quantised.scaled[name] for name in sorted(changed) if name in quantised.scaled]
    if scaled:
        kinds = ", ".join(sorted({one.codes.code for one in scaled}))
        yield (
            f"{len(scaled)} of the changed weights are {kinds} codes with scales ({scaled[0].scales.name} "
            "…): summed in float32, and quantised again by the same rule unless --dtype is given"
        )
    fixed = [one for one in scaled if one.inputs]
    if fixed:
        yield (
            f"{len(fixed)} of them have a fixed scale of their inputs ({fixed[0].inputs[0]} …), which was "
            "measured without the adapter: check the answers, or write --dtype bfloat16"
        )
    tensors = quantised.checkpoint.tensors
    plain = [
        n for n in sorted(changed) if n in tensors and n not in quantised.scaled and tensors[n].code in _CODES
    ]
    if plain:
        yield f"{len(plain)} of the changed weights are float8 without a scale, and stay so ({plain[0]} …)"
