"""Read an ONNX file as onnx_ir's model with its functions inlined, and refuse an invalid file."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from lora_export.errors import GraphError
from lora_export.untrusted.documents import open_regular
from lora_export.untrusted.graphs import function_problems, graph_problems
from lora_export.untrusted.protos import proto_problems
from lora_export.untrusted.shown import limited, shown

# The domain of ONNX Runtime's own operators.
ORT_DOMAIN = "com.microsoft"
# Limit of listed problems: usually they are all of one kind.
_SHOWN = 5
_REASON = 200
_AGAIN = "export it again, or copy it again"
# Suffix → description of such a file.
_OTHERS = {
    **dict.fromkeys((".engine", ".plan", ".trt"), "a TensorRT engine"),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), "a PyTorch file"),
    **dict.fromkeys((".xml", ".tflite", ".mlmodel", ".gguf"), "a model in another format"),
}


def read_model(file: Path) -> ir.Model:
    """Return the model of a file as it is; external data is not read.

    Raises:
        GraphError: The file is not an ONNX file, or is ambiguous.
    """
    import onnx

    _refuse_other_formats(file)
    try:
        proto = onnx.load(file, load_external_data=False)
        problems = list(proto_problems(proto))
        model = None if problems else ir.from_proto(proto)
        if model is not None:
            ir.external_data.set_base_dir(model.graph, str(file.parent))
            _name_default_domain(model)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a damaged file
        raise GraphError(
            f"{file} is not a readable ONNX file: {type(error).__name__}: {_first_line(error)}",
            "export it again, or copy it again if it was cut short",
        ) from error
    if model is None:
        raise _invalid(file, problems)
    return model


def _name_default_domain(model: ir.Model) -> None:
    """Call ONNX's own domain "" everywhere: "ai.onnx" is another name of it, which onnx_ir leaves here."""
    for opsets in (model.opset_imports, *(one.opset_imports for one in model.functions.values())):
        if (version := opsets.pop("ai.onnx", None)) is not None:
            opsets.setdefault("", version)


def inlined(model: ir.Model, file: Path, *, portable: bool = False) -> ir.Model:
    """Return a valid model with its functions inlined.

    Args:
        model: The model, which is changed.
        file: File of the model, for messages.
        portable: Also inline functions that define one of ONNX Runtime's own operators.

    Raises:
        GraphError: The model is empty, or breaks a rule of `lora_export.untrusted.graphs`.
    """
    if not len(model.graph):
        raise GraphError(
            f"{file} holds no nodes: it is empty, cut short or not an ONNX file", "export it again"
        )
    if problems := [*function_problems(model), *graph_problems(model)]:
        raise _invalid(file, problems)
    if not model.functions:
        return model
    from onnx_ir.passes.common import InlinePass

    try:
        model = InlinePass(None if portable else _is_no_operator)(model).model
    except Exception as error:  # onnx_ir raises many kinds for functions that don't fit where they are called
        raise _invalid(file, [f"its functions can't be inlined: {_first_line(error)}"]) from error
    if problems := list(graph_problems(model)):
        raise _invalid(file, problems)
    return model


def _is_no_operator(function: ir.Function) -> bool:
    return function.domain != ORT_DOMAIN


def _invalid(file: Path, problems: list[str]) -> GraphError:
    return GraphError(f"{file} is not a valid graph", _AGAIN, limited(problems, most=_SHOWN))


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [""])[0], _REASON)


def _refuse_other_formats(file: Path) -> None:
    """Raise `GraphError` for files that people mistake for ONNX, by their first bytes or their name."""
    if file.suffix == ".safetensors":
        raise GraphError(
            f"{file} holds weights, not a graph",
            "give an .onnx file, or, if the command also takes a checkpoint, the folder that it is in",
        )
    with open_regular(file) as opened:
        start = opened.read(8)
    if start[4:] == b"ORTM" or file.suffix == ".ort":
        raise GraphError(
            f"{file} is in ONNX Runtime's own format (.ort), which can't be changed",
            "give the .onnx file that it was converted from, and convert the result",
        )
    if file.suffix in _OTHERS:
        raise GraphError(
            f"{file} is {_OTHERS[file.suffix]}, not an ONNX file", "give the .onnx file that it was made from"
        )
