"""The words that operator files and the resolver share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

# Nodes that read a weight's shape alone: no values reach them.
SHAPE_ONLY = frozenset({"Shape", "Size"})
# Nodes that a weight may pass on its way into an operator.
PASSED = frozenset({"Transpose", "Cast", "CastLike", "Identity"})
# Nodes behind which a quantised weight is a float matrix.
DEQUANTIZE = frozenset({"DequantizeLinear", "DequantizeLinearBlock", "TRT_FP8DequantizeLinear"})
# Nodes that round to a grid (ModelOpt's own for float8 as well): with one of `DEQUANTIZE` behind it, a float
# weight stays a float weight.
QUANTIZE = frozenset({"QuantizeLinear", "TRT_FP8QuantizeLinear"})
# Nodes behind which a value is the same one, rounded, cast or moved.
ROUNDED_OR_MOVED = PASSED | DEQUANTIZE | QUANTIZE
# Norms, whose weight and bias are vectors, and those that add another input before.
NORMS = frozenset(
    {
        "LayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "BatchNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
    }
)
SKIP_NORMS = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
# A branch is x·A·B: for W·x it would be another one.
LEFT = "the weight stands on the left (W @ x): no branch is known for it"
SlotKind = Literal["linear", "conv", "embedding", "vector", "other"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """An input of a node that takes a weight.

    Attributes:
        index: Position among the node's inputs.
        kind: What module such a weight belongs to.
        transposed: The operand is the transpose of PyTorch's canonical weight.
        parameter: Name of the module's parameter that it is: ``weight`` or ``bias``.
        refusal: Why nothing can be merged into it, if so.
        no_branch: Why no branch can be added beside it, if so.
        shape: The operand's logical ``(out_dim, in_dim)``, where it is stored packed.
    """

    index: int
    kind: SlotKind
    transposed: bool = False
    parameter: str = "weight"
    refusal: str = ""
    no_branch: str = ""
    shape: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What is known of an operator that reads a weight.

    Attributes:
        slots: Returns the inputs of a node that take one.
        weight: Position of the weight, where the operator is a whole layer of floats as PyTorch has it.
        bias: Position of the bias that it adds to its own product, where it adds one.
        is_product: It is ``x @ W`` and nothing else.
        is_convolution: It is a convolution of floats.
        folds_norms: Tools fold the batch norm behind it into its weight.
        without_activation: Name of the operator that computes the same before the activation inside.
        code_inputs: Positions of scales, zero points and orders of codes: they say what codes stand for and
            are no parameters.
        takes_codes: Its activation is 8-bit codes, which another node makes.
        weight_scale: Position of the scale of an 8-bit weight; None: it is in a product further on.
        weight_zero: Position of the zero point of an 8-bit weight.
    """

    slots: Callable[[ir.Node], list[Slot]]
    weight: int | None = None
    bias: int | None = None
    is_product: bool = False
    is_convolution: bool = False
    folds_norms: bool = False
    without_activation: str = ""
    code_inputs: frozenset[int] = frozenset()
    takes_codes: bool = False
    weight_scale: int | None = None
    weight_zero: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """A weight's way into an operator.

    Attributes:
        node: The operator.
        slot: Which input, and how the operator reads it.
        root: The constant at the start of the way.
        chain: Nodes between ``root`` and ``node`` (Transpose, Cast, Identity …), from the root on.
        transposed: ``root`` as stored is the transpose of the canonical weight.
        refusal: Why nothing can be merged here, if so.
        no_branch: Why no branch can be added here, if so.
        quantised: The constant holds no floats, so that its values can't be compared with a checkpoint's.
    """

    node: ir.Node
    slot: Slot
    root: ir.Value
    chain: tuple[ir.Node, ...]
    transposed: bool
    refusal: str = ""
    no_branch: str = ""
    quantised: bool = False

    @property
    def operand_type(self) -> ir.DataType | None:
        """The float type that reaches the operator, behind Cast and DequantizeLinear; None: not known."""
        if self.slot.shape is not None:
            # Packed weights come with scales, in the type of the activation.
            scales = self.node.inputs[2]
            return scales.dtype if scales is not None else None
        if self.node.op_type == "DynamicQuantizeMatMul":
            return ir.DataType.FLOAT
        for node in reversed(self.chain):
            if node.op_type == "Cast":
                return ir.DataType(node.attributes["to"].as_int())
            if node.op_type == "CastLike" or node.op_type in DEQUANTIZE:
                like = node.inputs[1]
                return like.dtype if like is not None else None
        assert self.root.const_value is not None
        return self.root.const_value.dtype


def constant_behind(value: ir.Value | None) -> ir.Value | None:
    """Return the constant that a value is, perhaps rounded, cast or moved; None where it is computed."""
    while value is not None and value.const_value is None and (maker := value.producer()) is not None:
        if maker.op_type not in ROUNDED_OR_MOVED:
            return None
        value = maker.inputs[0]
    return value if value is not None and value.const_value is not None else None
