"""Check the operators: which ones a TensorRT parser has, and which ones it would mistake for others.

A parser looks at an operator's name and not at its domain: ``com.microsoft.Attention`` is read as ONNX's own
``Attention``, whose inputs mean something else. So nodes of other domains are refused unless they are known
to mean the same. Measured with TensorRT-RTX 1.7.1; `tests/engines/test_admit.py` asks the parser again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import onnx_ir as ir

from lora_export.engines.backend import Compiler
from lora_export.engines.prepare.problem import BuildProblem, of_nodes
from lora_export.graph.onnx_file import GraphFile

_ONNX = ("", "ai.onnx")
_CONTRIB = "com.microsoft"
_ABSENT_NAMES = """
AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im
Compress ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder
MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional
OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct
SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence
StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
"""
# Operators of ONNX that the parser can't import.
ABSENT = frozenset(_ABSENT_NAMES.split())
# ONNX Runtime writes this operator into ONNX's own domain.
_STRAY = "SimplifiedLayerNormalization"
# First parts of the names of ONNX Runtime's quantised operators.
_QUANTISED = (
    "MatMulBnb4",
    "GatherBlockQuantized",
    "QLinear",
    "DynamicQuantize",
    "MatMulInteger",
    "ConvInteger",
    "QAttention",
    "QGemm",
    "QEmbed",
)
_HINTS = {
    "GroupQueryAttention": "onnxruntime-genai's builder and --runtime ort-cuda write GroupQueryAttention: "
    "capture the checkpoint in ONNX's operators (capture-onnx HF_FOLDER --kv-cache --runtime portable)",
    "quantised": "quantised for ONNX Runtime's own kernels: build from the float graph, or quantise with "
    "QuantizeLinear and DequantizeLinear, symmetric int8",
    "fused": "ONNX Runtime's fusions: export without them (capture-onnx with --runtime portable), or save no "
    "optimised model",
    "custom": "export without custom operators",
    "absent": "export the model without this operator, or run the graph with ONNX Runtime",
}


def operator_problems(
    graph: GraphFile, compiler: Compiler, lowered: frozenset[str]
) -> Iterator[BuildProblem]:
    """Yield the nodes whose operator the parser lacks, or would misread.

    Args:
        graph: The graph, functions inlined.
        compiler: The compiler that it is built with.
        lowered: Operators of ONNX Runtime that are handled elsewhere.
    """
    found: dict[tuple[str, str], list[ir.Node]] = defaultdict(list)
    for node in graph.model.graph.all_nodes():
        if node.domain == _CONTRIB and node.op_type in lowered:
            continue
        if not _is_taken(node, compiler):
            found[node.domain, node.op_type].append(node)
    for (domain, operator), nodes in found.items():
        yield from of_nodes(nodes, _reason(domain, compiler), _hint(domain, operator))


def _is_taken(node: ir.Node, compiler: Compiler) -> bool:
    if node.domain in _ONNX:
        return node.op_type not in ABSENT and _is_known(node.op_type, compiler)
    return node.domain == _CONTRIB and node.op_type in compiler.contrib_operators


def _is_known(operator: str, compiler: Compiler) -> bool:
    """Return whether ONNX has an operator of that name, or ONNX Runtime has put one there."""
    import onnx

    return bool(onnx.defs.has(operator)) or (operator == _STRAY and operator in compiler.contrib_operators)


def _reason(domain: str, compiler: Compiler) -> str:
    if domain in _ONNX:
        return f"{compiler.title} has no such operator"
    if domain == _CONTRIB:
        return f"ONNX Runtime's own operator, which {compiler.title} does not have"
    return f"operator of the domain {domain!r}, which {compiler.title} does not know"


def _hint(domain: str, operator: str) -> str:
    if operator in _HINTS:
        return _HINTS[operator]
    if operator.startswith(_QUANTISED):
        return _HINTS["quantised"]
    if domain == _CONTRIB:
        return _HINTS["fused"]
    return _HINTS["absent" if domain in _ONNX else "custom"]
