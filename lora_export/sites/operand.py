"""Define the terms that operator files and the resolver share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

# Kinds of uses of matrices and kernels; the others are vectors' and anything else's.
WEIGHTS = ("linear", "conv", "embedding")
# Nodes that read only a weight's shape: no values reach them.
SHAPE_ONLY = frozenset({"Shape", "Size"})
# Nodes that a weight may pass on its way into an operator.
PASSED = frozenset({"Transpose", "Cast", "CastLike", "Identity"})
# Nodes after which a quantised weight is a float matrix.
DEQUANTIZE = frozenset({"DequantizeLinear", "DequantizeLinearBlock", "TRT_FP8DequantizeLinear"})
# Nodes that round to a grid (ModelOpt's own for float8 as well): with one of `DEQUANTIZE` after it, a float
# weight stays a float weight.
QUANTIZE = frozenset({"QuantizeLinear", "TRT_FP8QuantizeLinear"})
# Nodes after which a value is the same one, rounded, cast or moved.
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
# A branch is x·A·B; W·x would need another one.
LEFT = "the weight stands on the left (W @ x): no branch is known for it"
OperandKind = Literal["linear", "conv", "embedding", "vector", "other"]


@dataclass(frozen=True, kw_only=True)
class Operand:
    """Input of a node that takes a weight.

    Attributes:
        index: Position among the node's inputs.
        kind: Kind of module that such a weight belongs to.
        transposed: True if the operand is the transpose of PyTorch's canonical weight.
        parameter: Name of the module's parameter: ``weight`` or ``bias``.
        refusal: Reason why nothing can be merged into it, or "".
        no_branch: Reason why no branch can be added beside it, or "".
        shape: Logical ``(out_dim, in_dim)`` of an operand that is stored packed.
    """

    index: int
    kind: OperandKind
    transposed: bool = False
    parameter: str = "weight"
    refusal: str = ""
    no_branch: str = ""
    shape: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Facts of an operator that reads a weight.

    Attributes:
        operands: Function that returns the inputs of a node that take a weight.
        weight: Position of the weight, if the operator is a whole layer of floats as PyTorch has it.
        bias: Position of the bias that it adds to its own product, if it adds one.
        is_product: True for ``x @ W`` and nothing else.
        is_convolution: True for a convolution of floats.
        folds_norms: True if tools fold the batch norm after it into its weight.
        without_activation: Name of the operator that computes the same without the activation inside.
        code_inputs: Positions of scales, zero points and orders of codes, which define the values of codes
            and are not parameters.
        takes_codes: True if its activation is 8-bit codes, which another node makes.
        weight_scale: Position of the scale of an 8-bit weight; None if the scale is in a later product.
        weight_zero: Position of the zero point of an 8-bit weight.
    """

    operands: Callable[[ir.Node], list[Operand]]
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
    """Way of a weight into an operator.

    Attributes:
        node: The operator.
        operand: The operator's input.
        root: The constant at the start of the way.
        chain: Nodes between ``root`` and ``node`` (Transpose, Cast, Identity …), from the root on.
        transposed: True if ``root`` as stored is the transpose of the canonical weight.
        refusal: Reason why nothing can be merged here, or "".
        no_branch: Reason why no branch can be added here, or "".
        quantised: True if the constant holds no floats, so that its values can't be compared with a
            checkpoint's.
    """

    node: ir.Node
    operand: Operand
    root: ir.Value
    chain: tuple[ir.Node, ...]
    transposed: bool
    refusal: str = ""
    no_branch: str = ""
    quantised: bool = False

    @property
    def operand_type(self) -> ir.DataType | None:
        """Float type that reaches the operator, after Cast and DequantizeLinear; None if unknown."""
        if self.operand.shape is not None:
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
    """Return the constant that a value is, perhaps rounded, cast or moved; None if it is computed."""
    while value is not None and value.const_value is None and (maker := value.producer()) is not None:
        if maker.op_type not in ROUNDED_OR_MOVED:
            return None
        value = maker.inputs[0]
    return value if value is not None and value.const_value is not None else None
