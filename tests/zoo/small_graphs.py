"""Graphs of a few nodes as ONNX text, adapters as values, and the answers of numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from sessions import session_of

from lora_export import Adapter, LoraModule, SiteError, merge_onnx

# Operators that hold matrices: a weight's name alone is no proof there, as in real graphs their nodes say of
# which module they are.
_FOLDING = ("Gemm", "FusedGemm", "GemmFastGelu", "Conv", "FusedConv", "NhwcConv", "ConvTranspose")
_PRODUCTS = ("MatMul", "FusedMatMul")
_PASSED = ("Transpose", "Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
_PASSED += ("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear")
HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(
    text: str,
    weights: dict[str, Any],
    scopes: dict[str, str] | None = None,
    head: str = HEAD,
    named: bool = True,
) -> ir.Model:
    """Build a model: ``weights`` are initializers; ``_`` in the text's names stands for a dot in theirs.

    Args:
        text: Graph in ONNX text, and functions.
        weights: Name with dots → array or tensor.
        scopes: Node name → module path for the metadata that torch.onnx writes.
        head: Versions.
        named: Nodes that hold a matrix get the names that exporters give.
    """
    tensors = [
        value if isinstance(value, ir.TensorProtocol) else ir.tensor(value, name=name)
        for name, value in weights.items()
    ]
    for name, tensor in zip(weights, tensors, strict=True):
        tensor.name = name.replace(".", "_")
    proto = onnx.parser.parse_model(head + text)
    proto.graph.initializer.extend(ir.to_proto(tensor) for tensor in tensors)
    model = ir.from_proto(proto)
    for name in weights:
        model.graph.initializers[name.replace(".", "_")].name = name
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and str(node.outputs[0].name).endswith("_weight"):
            node.outputs[0].name = str(node.outputs[0].name).replace("_weight", ".weight")
        if scopes and node.name in scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", scopes[node.name], "op"])
        elif named and not node.name and (path := _path(node, alone=node.op_type in _PRODUCTS)):
            node.name = f"/{path.replace('.', '/')}/{node.op_type}"
    return model


def _path(node: ir.Node, alone: bool = False) -> str:
    """Module of the weight that a node reads, by the weight's name; ``alone``: that nothing else reads."""
    if node.op_type not in (*_FOLDING, *_PRODUCTS):
        return ""
    for value in node.inputs:
        while value is not None and (maker := value.producer()) is not None and maker.op_type in _PASSED:
            value = maker.inputs[0]
        if value is None or (alone and _readers(value) > 1):
            continue
        if str(value.name).endswith(".weight"):
            # genai's builder puts the operator behind the module.
            return str(value.name).removesuffix(".weight").removesuffix(".MatMul")
    return ""


def _readers(value: ir.Value) -> int:
    return sum(node.op_type != "Identity" for node, _ in value.uses())


def save(model: ir.Model, folder: Path, name: str = "base.onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / name)
    return folder / name


def linear(path: str, out_dim: int, in_dim: int, seed: int = 1, **more: Any) -> LoraModule:
    """Return a module of rank 2 and scaling 1.5 whose delta is as large as the weights."""
    return LoraModule(
        path,
        "linear",
        random(2, in_dim, seed=seed),
        random(out_dim, 2, seed=seed + 50),
        alpha=3.0,
        rank=2,
        **more,
    )


def conv(path: str, out_dim: int, in_dim: int, *kernel: int, **more: Any) -> LoraModule:
    lora_b = random(out_dim, 2, *([1] * len(kernel)), seed=52)
    return LoraModule(path, "conv", random(2, in_dim, *kernel, seed=2), lora_b, alpha=3.0, rank=2, **more)


def embedding(path: str, count: int, dim: int, **more: Any) -> LoraModule:
    return LoraModule(
        path, "embedding", random(2, count, seed=3), random(dim, 2, seed=53), alpha=3.0, rank=2, **more
    )


def adapter(*modules: LoraModule, extras: dict[str, np.ndarray] | None = None, **more: Any) -> Adapter:
    return Adapter(
        "tiny", "tiny", "peft", {module.key: module for module in modules}, extras=extras or {}, **more
    )


def delta(module: LoraModule) -> np.ndarray:
    """Return ΔW by the definition, in float64, in the canonical weight's shape."""
    a, b = module.lora_a.astype(np.float64), module.lora_b.astype(np.float64)
    change = module.alpha / module.rank * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
    return change.T if module.kind == "embedding" else change.reshape(len(b), *a.shape[1:])


def run(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    return list(session_of(path).run(None, feeds))


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    difference = got.astype(np.float64) - np.asarray(wanted, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(wanted, np.float64)))


def constants(path: Path) -> dict[str, np.ndarray]:
    """Return a written graph's constants by name."""
    model = ir.load(path)
    return {str(name): v.const_value.numpy() for name, v in model.graph.initializers.items()}


def refusals(base: Path, given: Adapter, tmp_path: Path, **options: Any) -> dict[str, str]:
    """Return parameter → reason of a merge that must be refused, and see that nothing was written."""
    out = tmp_path / "refused" / "m.onnx"
    try:
        merge_onnx(base, given, out, **options)
    except SiteError as refused:
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return dict(line.split("  ", 1) for line in refused.problems)
    raise AssertionError("the merge was not refused")


class Huge:
    """A graph that says of itself that it is as large as protobuf can't hold."""

    def ByteSize(self):
        return 2**31

    def SerializeToString(self, deterministic):
        raise AssertionError("must not be called: protobuf fails above 2 GB")
