"""Tell that a tool may have folded an answer of an adapted module into another layer's weight or bias.

``conv(x) * g(c)`` on a table ``c`` of the model: a tool computes ``g(c)`` (see `answers`), and then
multiplies it into the convolution's weight, or adds it to its bias. No constant of the graph is left that is
an answer, so the other layers are compared with the checkpoint as well. One is a suspect if

1. the name of its weight or of its bias is none that an exporter gives to a parameter; TorchScript's numbers
   are its own, and it computes no products (`picked`);
2. the checkpoint has its weight, up to a factor f for each row; and
3. the checkpoint's parameters that the adapter leaves alone don't explain f, or what the bias has got besides
   f times its own values (`factors`).

Layers of other shapes than the checkpoint's (packed, split, padded) and codes of quantisers are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from lora_export.adapter import Array
from lora_export.graph.onnx_file import FLOAT_TYPES, release, shape_of
from lora_export.plan import Refusal
from lora_export.sites import operator_of
from lora_export.sites.doubts.changed import is_path, what_a_tool_did
from lora_export.sites.doubts.picked import NUMBERED
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.naming.evidence import folded_names, weight_name, weight_path
from lora_export.sites.operand import Use
from lora_export.sites.target import BaseWeights, Site
from lora_export.sites.values.codes import canonical_shape
from lora_export.sites.values.factors import Explainer, LayerChange

# Number of rows by which a weight is recognised, their least cosine, and the largest difference of any row.
_ROWS, _ALIKE, _UNLIKE = 4, 0.999, 0.05
# Least share of rows of which the factor can be told.
_CLEAR = 0.75
# Number of columns that are compared.
_COLUMNS = 64
# Least relative difference that is none by rounding, and how many times that of a value it may be for a row.
_ROUNDED, _TIMES = 2e-5, 8
# Number of values that are read at a time.
_BLOCK = 1 << 20
# Domain of ONNX Runtime's convolutions on blocks of channels, and its numbers of channels.
_BLOCKED, _BLOCKS = "com.microsoft.nchwc", (16, 8)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Product with a weight, and the bias that its node adds, if it is a constant."""

    weight: Use
    bias: Use | None

    @cached_property
    def suspects(self) -> list[Use]:
        """Uses of which no exporter gave the constants their names (rule 1)."""
        return [use for use in (self.weight, self.bias) if use is not None and not _has_own_name(use)]

    @property
    def stored(self) -> Array:
        """The weight as the graph stores it."""
        assert self.weight.root.const_value is not None
        return np.asarray(self.weight.root.const_value.numpy())

    def forms(self) -> Iterator[Array]:
        """Yield the weight as a matrix whose rows are outputs, in each layout that it may have."""
        stored, node = self.stored, self.weight.node
        if node.domain == _BLOCKED:
            yield from _unblocked(stored)
        elif node.op_type == "ConvTranspose":
            yield self._outputs_first(stored)
        else:
            matrix = stored.reshape(len(stored), -1)
            yield matrix.T if self.weight.transposed else matrix

    def same_form(self, values: Array) -> Iterator[Array]:
        """Yield a tensor of the checkpoint as such a matrix, in each orientation that it may have."""
        matrix = values.reshape(len(values), -1)
        if self.weight.node.op_type == "ConvTranspose":
            yield self._outputs_first(values)
            return
        rows, cols = canonical_shape(self.weight)
        if matrix.shape == (rows, cols):
            yield matrix
        if values.ndim == 2 and matrix.shape == (cols, rows):
            yield matrix.T

    def has_size(self, shape: tuple[int, ...]) -> bool:
        """Return True if a tensor of this shape may be the weight."""
        own = self.weight.root.const_value
        if len(shape) < 2 or own is None:
            return False
        if self.weight.operand.refusal:
            return shape == shape_of(own)
        rows, matrix = canonical_shape(self.weight), (shape[0], prod(shape[1:]))
        return matrix == rows or (len(shape) == 2 and matrix == rows[::-1])

    def _outputs_first(self, values: Array) -> Array:
        groups = self.weight.node.attributes.get_int("group", 1)
        inputs, outputs, *kernel = values.shape
        split = values.reshape(groups, inputs // groups, outputs, *kernel)
        return np.moveaxis(split, 2, 1).reshape(groups * outputs, -1)


def _unblocked(values: Array) -> Iterator[Array]:
    """Yield a weight of ONNX Runtime's NCHWc layout as PyTorch's, for each size of blocks.

    ``MlasReorderFilterOIHWBiBo`` and ``MlasReorderFilterOIHWBo`` (``mlas/lib/reorder.cpp``) write it.
    """
    outputs, inputs, *kernel = values.shape
    for block in _BLOCKS:
        if outputs % block:
            continue
        single = values.reshape(outputs // block, inputs, *kernel, block)
        yield np.moveaxis(single, -1, 1).reshape(outputs, -1)
        if inputs % block == 0:
            double = single.reshape((outputs // block, inputs // block, *kernel, block, block))
            yield np.moveaxis(double, (-1, -2), (1, 3)).reshape(outputs, -1)


def fused_answers(
    sites: Sequence[Site], uses: Sequence[Use], base: BaseWeights, changed: Set[str]
) -> Mapping[int, Refusal]:
    """Return identity of a target → reason why another layer may hold an answer of its module.

    Args:
        sites: Sites of an adapter's targets.
        uses: All uses of constants in the graph.
        base: The checkpoint.
        changed: The checkpoint's names of what the adapter changes.
    """
    compared = {
        id(part.root)
        for site in sites
        for part in site.parts
        if site.proof == "values" and all(place.row_scale is None for place in part.placements)
    }
    layers = [layer for layer in _layers(uses) if layer.suspects] if sites else []
    layers = [one for one in layers if any(id(use.root) not in compared for use in one.suspects)]
    if not layers:
        return {}
    weights, explainer = _Weights(base), Explainer(base, changed)
    found: dict[int, Refusal] = {}
    for layer in layers:
        unexplained = None
        # Of a few columns only, several weights are multiples.
        for change in weights.changes(layer):
            rest = None if change.is_none else explainer.unexplained(change)
            if rest is None:
                break
            unexplained = unexplained or (change, rest)
        else:
            if unexplained:
                change, rest = unexplained
                reason = _reason(layer, rest is change.factor)
                is_one = bool(np.ptp(rest) <= change.rounding * np.abs(rest).max())
                for site in _able(sites, change.size, is_one):
                    found.setdefault(id(site.target), reason)
    return found


def _able(sites: Sequence[Site], rows: int, is_one: bool) -> Sequence[Site]:
    """Return the sites whose answers have the size, else all; of one number only those that give one."""
    modules = [site for site in sites if site.target.kind != "vector"] or sites
    sizes = {id(site): site.target.matrix[site.target.kind == "embedding"] for site in modules}
    if is_one:
        return [site for site in modules if sizes[id(site)] == 1]
    return [site for site in modules if rows % sizes[id(site)] == 0] or modules


def _reason(layer: _Layer, is_factor: bool) -> Refusal:
    use = layer.suspects[-1] if not is_factor else layer.suspects[0]
    name = str(use.root.name)
    assert use.root.const_value is not None
    shape = list(shape_of(use.root.const_value))
    what = "times a factor" if is_factor else "plus a shift"
    return Refusal(
        "partly computed",
        f"the constant {name!r} {shape}, which {use.node.op_type} reads, holds the checkpoint's values "
        f"{what} that none of its parameters explains ({what_a_tool_did(name)}): it may be a call of this "
        "module, which would stay the base's",
    )


def _layers(uses: Sequence[Use]) -> Iterator[_Layer]:
    inputs = {(id(use.node), use.operand.index): use for use in uses if _is_float(use)}
    for use in uses:
        operator = operator_of(use.node.domain, use.node.op_type)
        if operator is None or use.operand.kind not in ("linear", "conv") or not _is_float(use):
            continue
        if use.chain if use.operand.refusal else use.refusal:
            continue
        # Convolutions of another layout have their inputs in the same order.
        weight, bias = (1, 2) if operator.is_convolution else (operator.weight, operator.bias)
        if use.operand.index == weight:
            yield _Layer(use, None if bias is None else inputs.get((id(use.node), bias)))


def _is_float(use: Use) -> bool:
    tensor = use.root.const_value
    return tensor is not None and tensor.dtype in FLOAT_TYPES and not use.quantised


def _has_own_name(use: Use) -> bool:
    name = weight_name(use)
    return is_path(weight_path(name)) or NUMBERED.fullmatch(name) is not None or bool(folded_names(use.root))


class _Weights:
    """The checkpoint's matrices, in which layers are found."""

    def __init__(self, base: BaseWeights) -> None:
        self._base = base
        self._samples: dict[tuple[object, ...], list[Array]] = {}

    def changes(self, layer: _Layer) -> Iterator[LayerChange]:
        """Yield how a layer differs from the checkpoint's weights whose multiple it is (rule 2)."""
        paths = [weight_path(weight_name(layer.weight)), f"{module_by_name(layer.weight.node) or ''}.weight"]
        names = [name for name, shape in self._base.shapes.items() if layer.has_size(shape)]
        for name in sorted(names, key=lambda name: -max(_common_end(name, path) for path in paths)):
            samples = self._sampled(name, layer)
            for stored in layer.forms():
                picked = _sampled(stored)
                alike = [number for number, one in enumerate(samples) if _are_multiples(picked, one)]
                if alike:
                    wanted = list(layer.same_form(self._base.values(name)))
                    found = (self._measured(layer, name, stored, wanted[number]) for number in alike)
                    yield from (change for change in found if change is not None)
        release(layer.weight.root)

    def _sampled(self, name: str, layer: _Layer) -> list[Array]:
        # A tensor of codes is dequantised as a whole.
        key = name, canonical_shape(layer.weight), layer.weight.node.op_type
        if key not in self._samples:
            self._samples[key] = [_sampled(one) for one in layer.same_form(self._base.values(name))]
        return self._samples[key]

    def _measured(self, layer: _Layer, name: str, stored: Array, wanted: Array) -> LayerChange | None:
        size, whole = len(stored), wanted
        stored, wanted = (np.array(one[:, :_COLUMNS], np.float64) for one in (stored, wanted))
        release(layer.weight.root)
        squares = np.einsum("ij,ij->i", wanted, wanted)
        rows = np.flatnonzero(squares > 0)
        if not len(rows):
            return None
        stored, wanted = stored[rows], wanted[rows]
        factor = np.einsum("ij,ij->i", stored, wanted) / squares[rows]
        gaps = np.linalg.norm(stored - factor[:, None] * wanted, axis=1)
        noise = gaps / np.maximum(np.linalg.norm(stored, axis=1), 1e-300)
        # Of rows that 16 bits hardly hold, the factor can't be told.
        clear = noise <= min(_UNLIKE, max(_ROUNDED, _TIMES * float(np.median(noise))))
        if clear.mean() < _CLEAR:
            return None
        rows, factor = rows[clear], factor[clear]
        # A bias that a node of its own adds is no part of this one: nothing can have been folded into it.
        bias = np.zeros(len(rows)) if layer.bias is None else self._bias(name, rows)
        held = _held(layer.bias, rows)
        terms = np.abs(held), np.abs(factor * bias)
        return LayerChange(
            factor=factor,
            shift=held - factor * bias,
            bias=bias,
            lengths=lambda: _lengths(whole, rows),
            size=size,
            rows=rows,
            rounding=max(_ROUNDED, _TIMES * float(noise[clear].max())),
            scale=float(np.max(terms)),
        )

    def _bias(self, weight: str, rows: Array) -> Array:
        """Return the checkpoint's bias beside a weight."""
        for name in _bias_names(weight):
            shape = self._base.shapes.get(name, ())
            if len(shape) == 1 and shape[0] > rows.max():
                return np.asarray(self._base.values(name), np.float64)[rows]
        return np.zeros(len(rows))


def _lengths(matrix: Array, rows: Array) -> Array:
    """Return the lengths of some rows."""
    step = max(1, _BLOCK // matrix.shape[1])
    blocks = (np.asarray(matrix[rows[at : at + step]], np.float32) for at in range(0, len(rows), step))
    return np.concatenate([np.linalg.norm(block, axis=1).astype(np.float64) for block in blocks])


def _held(use: Use | None, rows: Array) -> Array:
    """Return a bias as the graph has it; zeros if it is none of a number for each row."""
    if use is None or use.root.const_value is None:
        return np.zeros(len(rows))
    values = np.asarray(use.root.const_value.numpy(), np.float64)
    if values.size == 1:
        return np.full(len(rows), values.reshape(()))
    # Those of blocks are padded.
    if max(values.shape) == values.size > rows.max():
        return np.asarray(values.reshape(-1)[rows])
    return np.zeros(len(rows))


def _bias_names(weight: str) -> Iterator[str]:
    """Yield the names that the bias beside a weight may have, which may be parametrised (weight norm)."""
    module, _, leaf = weight.rpartition(".")
    yield f"{module}.{leaf.replace('weight', 'bias')}" if module else leaf.replace("weight", "bias")
    yield f"{weight.rpartition('.parametrizations.')[0] or module}.bias"


def _sampled(matrix: Array) -> Array:
    """Return some rows, evenly spaced, of the first columns."""
    rows = np.unique(np.linspace(0, len(matrix) - 1, _ROWS).astype(int))
    return np.array(matrix[rows, :_COLUMNS], np.float64)


def _are_multiples(rows: Array, others: Array) -> bool:
    """Return True if rows that are not zero are the others, up to a factor each."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    cosines = np.abs(np.einsum("ij,ij->i", rows, others))
    return bool((cosines >= _ALIKE * lengths)[lengths > 0].all())


def _common_end(one: str, other: str) -> int:
    """Return the number of names at the end of two paths that are the same."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)
