"""Raise a graph to a newer opset with ONNX's own converter, and keep everything else.

Writing a larger number into the file is not enough: ReduceMean has its axes as an attribute before opset 18
and as an input since. The converter knows such changes, but drops metadata (which module a node belongs to).
So a copy without weights is converted, and what the converter dropped is put back by name.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_export.graph.onnx_file import GraphFile, shape_of

# Smaller constants (axes, shapes) stay: the converter reads some.
_SMALL_BYTES = 1024
# The converter does not change Resize of opset 10, which has other coordinates since 11. Of the operators
# that changed between 13 and 21 it overlooks one: GroupNormalization, whose scale is per channel since 21.
_OLDEST = 13
_OVERLOOKED = "GroupNormalization"
# The first IR version that has 4-bit integers.
_INT4_FORMAT = 10


def raise_opset(graph: GraphFile, version: int) -> str:
    """Raise a graph to at least this opset; return the reason why that is impossible, or ""."""
    if opset_of(graph.model) >= version:
        graph.model.ir_version = max(graph.model.ir_version, _INT4_FORMAT)
        return ""
    if problem := _misread(graph, version):
        return problem
    try:
        converted = _converted(graph.model, version)
    except Exception as error:  # the converter raises RuntimeError, ValueError, onnx.checker's own …
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"opset {opset_of(graph.model)} can't be raised to {version}: {lines[0][:200]}"
    _put_back(graph.model, converted)
    graph.model = converted
    return ""


def _misread(graph: GraphFile, version: int) -> str:
    """Return the reason why the converter would silently change the graph's meaning, or ""."""
    opset = opset_of(graph.model)
    if opset < _OLDEST:
        return f"opset {opset} can't be raised to {version}: it is older than {_OLDEST}"
    if any(node.op_type == _OVERLOOKED and node.domain == "" for node in graph.model.graph.all_nodes()):
        return f"opset {opset} can't be raised to {version}: {_OVERLOOKED} means something else there"
    return ""


def opset_of(model: ir.Model) -> int:
    """Return the opset of ONNX's own domain."""
    return max(model.opset_imports.get("", 0), model.opset_imports.get("ai.onnx", 0))


def _converted(model: ir.Model, version: int) -> ir.Model:
    import onnx
    from onnx import version_converter

    proto = ir.to_proto(model)
    held = {name for name, value in model.graph.initializers.items() if _is_held_back(value)}
    names = [value.name for value in proto.graph.input]
    for index in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[index].name in held:
            del proto.graph.initializer[index]
    for name in sorted(held):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(name, tensor.dtype.value, shape_of(tensor))
        )
    proto.ir_version = max(proto.ir_version, _INT4_FORMAT)
    result = ir.from_proto(version_converter.convert_version(proto, version))
    inputs = {str(value.name): value for value in result.graph.inputs}
    result.graph.inputs[:] = [inputs[name] for name in names]
    for name, old in model.graph.initializers.items():
        if name in held:
            inputs[name].const_value = old.const_value
            result.graph.register_initializer(inputs[name])
    values = [result.graph.initializers[name] for name in _in_order(model, result)]
    result.graph.initializers.clear()
    for value in values:
        result.graph.register_initializer(value)
    result.ir_version = proto.ir_version
    return result


def _in_order(old: ir.Model, new: ir.Model) -> list[str]:
    """Return the names of the new model's initializers, those of the old one first, in its order."""
    return [
        *old.graph.initializers,
        *(name for name in new.graph.initializers if name not in old.graph.initializers),
    ]


def _is_held_back(value: ir.Value) -> bool:
    tensor = value.const_value
    return isinstance(tensor, ir.ExternalTensor) or (tensor is not None and tensor.nbytes > _SMALL_BYTES)


def _put_back(old: ir.Model, new: ir.Model) -> None:
    """Copy what the converter drops: metadata of the model, nodes and values, and the values' types."""
    new.metadata_props.update(old.metadata_props)
    new.graph.metadata_props.update(old.graph.metadata_props)
    new.graph.doc_string, new.doc_string = old.graph.doc_string, old.doc_string
    before = {str(output.name): output for node in old.graph.all_nodes() for output in node.outputs}
    for node in new.graph.all_nodes():
        for output in node.outputs:
            if (was := before.get(str(output.name))) is not None:
                maker = was.producer()
                assert maker is not None
                node.metadata_props.update(maker.metadata_props)
                _copy_value(was, output)
    for value, was in zip(new.graph.inputs, old.graph.inputs, strict=True):
        _copy_value(was, value)
    for name, value in new.graph.initializers.items():
        _copy_value(old.graph.initializers[name], value)


def _copy_value(was: ir.Value, value: ir.Value) -> None:
    value.metadata_props.update(was.metadata_props)
    value.type = was.type if was.type is not None else value.type
    value.shape = was.shape if was.shape is not None else value.shape
    if was.const_value is not None:
        value.const_value = was.const_value
