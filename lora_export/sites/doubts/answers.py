"""Tell that a tool may have computed a call of a module, and put the answer into the graph as a constant.

Optimisers (onnxsim, onnxslim, ONNX Runtime) compute every node whose inputs are constants. A module that is
called on its input and on a table of the model (DeBERTa's positions) then has its weight in the graph for one
call and an answer for the other; an adapter would not change the answer. Behind further layers it may have
any size. Nothing in the graph tells what an answer was computed from, so a constant is a suspect if

1. neither its name nor the exporter's metadata says that it is a parameter; without a checkpoint, only if its
   name is that of a node's output (``/encoder/layer.0/attention/self/Transpose_6_output_0``, ``tanh_1``);
2. no layer adds it to its own product, if it has one axis;
3. it is neither a table of sines, nor a sequence of numbers with equal steps or equal ratios, nor numbers
   that programs are written with: whole ones, fractions, roots (`numbers`); and
4. the checkpoint has no parameter with its values: moved, picked, or times a factor; of a few values a
   function of a few of its own.

A single number is one if its name says that a tool has computed it: literals have names of their own.

Values of a parameter that the adapter changes explain nothing: they are an answer (`picked`), whatever rules
1, 3 and 4 say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.onnx_file import FLOAT_TYPES, release, shape_of
from lora_export.plan import Refusal
from lora_export.sites import operator_named
from lora_export.sites.doubts.changed import is_path
from lora_export.sites.doubts.picked import NUMBERED, picked_rows
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.naming.evidence import folded_names, path_in, weight_name, weight_path
from lora_export.sites.operand import WEIGHTS, Use
from lora_export.sites.target import BaseWeights, Site
from lora_export.sites.values.factors import Explainer
from lora_export.sites.values.moved import FEW, has_one_axis, moved_parameters
from lora_export.sites.values.numbers import are_steps, is_written

# TorchScript's name for the output of a node that computes something.
_OUTPUT = re.compile(r"/(?:[^/]+/)*(?!Constant)[^/]+_output_\d+")
# TorchScript's name for a number or table from the model's code.
_LITERAL = re.compile(r"(?:/(?:[^/]+/)*)?Constant(?:_\d+)?_output_\d+")
# torch.export's names for values that were computed, not moved; the exporter's metadata is gone where a tool
# has turned them into constants.
_VALUE = re.compile(
    r"(?:val|r?sub|add|mul|div|neg|abs|exp|log|sin|cos|tanh|sigmoid|relu|gelu|silu|elu|softplus|softmax|"
    r"log_softmax|pow|r?sqrt|reciprocal|square|sum|prod|mean|amax|amin|max|min|var|std|norm|linalg_vector_norm|"
    r"linear|matmul|mm|bmm|addmm|baddbmm|einsum|conv\dd|convolution|layer_norm|group_norm|rms_norm|"
    r"scaled_dot_product_attention|where|clamp|cumsum|leaky_relu|logsumexp|outer)(?:_\d+)?"
)
# The exporter's metadata on a parameter, a buffer or a literal.
_GIVEN = "pkg.torch.export.graph_signature.InputSpec.kind"
# Least number of positions in a table of sines, and largest deviation from its rule by rounding.
_POSITIONS, _SINES = 4, 5e-3
# Largest table of angles, and number of tables of one shape of which two are compared.
_ANGLES, _TABLES = 1 << 24, 8
# Number of values along each axis that are read first, by the number of dimensions.
_CORNER = (1, 65536, 256, 64, 16)


def computed_answers(
    sites: Sequence[Site],
    uses: Sequence[Use],
    base: BaseWeights | None,
    constants: Iterable[ir.Value] = (),
    changed: Set[str] = frozenset(),
) -> Mapping[int, Refusal]:
    """Return identity of a target → reason why a constant is, or may be, an answer of its module.

    Args:
        sites: Sites of an adapter's targets.
        uses: All uses of constants in the graph.
        base: The checkpoint, whose parameters explain constants.
        constants: All initializers of the graph: single numbers have no uses, because they are not weights.
        changed: The checkpoint's names of what the adapter changes.
    """
    mine = {id(part.root) for site in sites for part in site.parts}
    computed: dict[int, Use] = {}
    for use in uses if sites else ():
        if id(use.root) not in mine and id(use.root) not in computed and _is_computed(use):
            computed[id(use.root)] = use
    found = {id(site.target): _picked(use) for site, use in picked_rows(sites, computed, base)}
    suspects = {key: use for key, use in computed.items() if _is_suspect(use, base)}
    told = _angles(suspects)
    suspects = {key: use for key, use in suspects.items() if key not in told}
    # Without a checkpoint nothing explains a number of torch.export's, whose literals have such names, too.
    numbers = [value for value in constants if _is_computed_number(value, base)] if sites else []
    if base is not None:
        roots = [*(use.root for use in suspects.values()), *numbers]
        explained = moved_parameters(roots, base, changed) if roots else set()
        norms = Explainer(base, changed)
        suspects = {
            key: use
            for key, use in suspects.items()
            if key not in explained and not (has_one_axis(use.root) and norms.is_of_norm(_values(use)))
        }
        numbers = [value for value in numbers if id(value) not in explained]
    for site in sites if suspects or numbers else ():
        nearest = max(suspects.values(), key=partial(_nearness, site), default=None)
        what = f"the number {numbers[0].name!r}" if nearest is None else _described(nearest)
        found.setdefault(id(site.target), _computed(what))
    return found


def _picked(use: Use) -> Refusal:
    detail = f"{_described(use)} holds an answer of this module, which would stay the base's"
    return Refusal("picked", detail)


def _computed(what: str) -> Refusal:
    return Refusal(
        "partly computed",
        f"{what} was computed from the model's weights and may be a call of this module: it would stay the "
        "base's",
    )


def _described(use: Use) -> str:
    return f"the constant {use.root.name!r} {list(_shape(use))}, which {use.node.op_type} reads,"


def _outputs(site: Site) -> int:
    rows, cols = site.target.matrix
    return cols if site.target.kind == "embedding" else rows


def _is_computed(use: Use) -> bool:
    """Return True if a use's constant may be an answer of any module, by its name and its size."""
    tensor = use.root.const_value
    if tensor is None or tensor.dtype not in FLOAT_TYPES or use.quantised or math.prod(_shape(use)) < 2:
        return False
    return not is_path(weight_path(weight_name(use))) and not _scales_codes(use)


def _scales_codes(use: Use) -> bool:
    """Return whether a constant is the scale of a weight's codes: its other factor is an activation's."""
    others = (value.producer() for value in use.node.inputs if value is not None)
    return use.node.op_type == "Mul" and any(
        maker is not None and maker.op_type == "DynamicQuantizeLinear" for maker in others
    )


def _is_suspect(use: Use, base: BaseWeights | None) -> bool:
    """Return True if rules 1 to 3 make a use's constant a suspect."""
    root, name = use.root, weight_name(use)
    if base is None and not (_OUTPUT.fullmatch(name) or _VALUE.fullmatch(name)):
        return False
    if base is None and name.startswith("val_") and use.operand.kind in WEIGHTS:
        # Another layer's weight, which the exporter has turned.
        return False
    if _GIVEN in root.metadata_props or folded_names(root):
        return False
    if any(rule.fullmatch(name) for rule in (NUMBERED, _LITERAL)):
        return False
    if base is None and _is_lookup(name, use):
        return False
    # Tools join an answer that is multiplied or added to the norm or product before it, but for batch norms.
    own = use.node.op_type == "BatchNormalization" or operator_named(use.node.op_type)
    if has_one_axis(use.root) and own:
        return False
    told = _is_plain(_values(use))
    release(root)
    return not told


def _is_computed_number(value: ir.Value, base: BaseWeights | None) -> bool:
    """Return True if a constant is one number that a tool has computed, and no program is written with."""
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return False
    name = str(value.name)
    told = _OUTPUT.fullmatch(name) or (base and _VALUE.fullmatch(name) and not name.startswith("val"))
    if not told or _GIVEN in value.metadata_props or folded_names(value):
        return False
    return not is_written(float(tensor.numpy().reshape(-1)[0]))


def _values(use: Use) -> Array:
    assert use.root.const_value is not None
    return np.asarray(use.root.const_value.numpy())


def _shape(use: Use) -> tuple[int, ...]:
    assert use.root.const_value is not None
    return shape_of(use.root.const_value)


def _is_lookup(name: str, use: Use) -> bool:
    """Return True if the name says that rows were picked from a table, by a module of its own."""
    return name.rpartition("/")[2].startswith("Gather") and module_by_name(use.node) != path_in(name)


def _is_plain(values: Array) -> bool:
    """Return True if the values can't come from weights (rule 3)."""
    # A corner comes first: it decides for most constants, and a table of embeddings in float64 takes
    # gigabytes.
    corner = values[(slice(_CORNER[min(values.ndim, len(_CORNER) - 1)]),) * values.ndim]
    if len(np.unique(corner)) <= FEW and len(few := np.unique(values)) <= FEW:
        # Of 16 bits too few digits are left to tell.
        if values.dtype.itemsize == 2 or all(is_written(float(value)) for value in few):
            return True
        return max(values.shape) == values.size == len(few) == FEW and are_steps(few.astype(np.float64))
    exact = np.asarray(corner, np.float64)
    if not np.isfinite(exact).all():
        return False
    if np.array_equal(exact, np.round(exact)):
        return True
    if max(exact.shape) == exact.size:
        return are_steps(exact.reshape(-1)) or _has_circles(values.reshape(1, -1))
    sines = any(_are_sines(np.moveaxis(exact, axis, 0)) for axis in range(exact.ndim))
    return sines or _has_circles(values.reshape(-1, values.shape[-1]))


def _has_circles(rows: Array) -> bool:
    """Return True if a cosine stands beside each sine (an embedding of a time)."""
    size = rows.shape[1]
    if size < _POSITIONS or size % 2:
        return False
    sides = (slice(size // 2), slice(size // 2, None)), (slice(0, None, 2), slice(1, None, 2))
    return any(_are_circles(rows[:, one], rows[:, other]) for one, other in sides)


def _are_circles(one: Array, other: Array) -> bool:
    """Return True if ``one² + other²`` is 1: cosines and sines of the same angles."""
    rounding = 5e-3 if one.dtype.itemsize == 2 else 1e-5
    # The first row decides for almost every table.
    for rows in (slice(1), slice(None)):
        sums = one[rows].astype(np.float64) ** 2 + other[rows].astype(np.float64) ** 2
        if not np.abs(sums - 1).max(initial=0) <= rounding:
            return False
    return True


def _angles(suspects: Mapping[int, Use]) -> set[int]:
    """Return the identities of constants that are cosines and sines of the same angles (rotary positions)."""
    by_shape: dict[tuple[int, ...], list[tuple[int, Array]]] = {}
    for key, use in suspects.items():
        if (values := _values(use)).size <= _ANGLES:
            by_shape.setdefault(values.shape, []).append((key, values))
    found: set[int] = set()
    for group in by_shape.values():
        for at, (key, values) in enumerate(group):
            # A model has its two tables side by side, a few times.
            for other, those in group[at + 1 : at + 1 + _TABLES]:
                if _are_circles(values, those):
                    found |= {key, other}
    return found


def _are_sines(values: Array) -> bool:
    """Return True if each column is ``a·sin(f·p + b)``: its neighbours' sum is ``2·cos(f)`` times itself.

    The row of the padding token is set to zeros (M2M100, XGLM), because it is not a position.
    """
    if len(values) < _POSITIONS:
        return False
    rows = values.reshape(len(values), -1)
    told = np.asarray(rows.any(axis=1))
    whole = told[1:-1] & told[2:] & told[:-2]
    if 2 * whole.sum() < len(whole):
        return False
    middle, around = rows[1:-1][whole], (rows[2:] + rows[:-2])[whole]
    factor = (around * middle).sum(axis=0) / np.maximum((middle**2).sum(axis=0), 1e-300)
    return bool(np.linalg.norm(around - factor * middle) <= _SINES * np.linalg.norm(middle))


def _nearness(site: Site, use: Use) -> tuple[bool, int]:
    """Tell whether a constant has the size of some answers, and the number of leading names in common."""
    whole = math.prod(_shape(use)) % _outputs(site) == 0
    one = (path_in(weight_name(use)) or module_by_name(use.node) or "").split(".")
    other = site.target.path.split(".")
    return whole, next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
