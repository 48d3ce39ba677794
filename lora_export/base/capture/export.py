"""Export one module with torch.onnx's dynamo exporter, silently, with the weights as they are.

Weights keep their own names and orientation (a Transpose stays in the graph): ONNX Runtime folds it when it
loads, and untouched weights can then stay in the checkpoint's own ``.safetensors``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_export.errors import BackendUnavailable, GraphError, install_line
from lora_export.progress import tell_stage

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.torch.onnx.class_hierarchy")
_INSTALL = install_line("hf")
# Largest relative difference of a trace's answers by rounding, and of those in 16 bits.
_DIFFERENCE, _HALVES_DIFFERENCE = 1e-3, 0.1


Inputs = tuple[Any, ...] | Mapping[str, Any]


def run_module(module: torch.nn.Module, example_inputs: Inputs) -> Any:
    """Return the outputs of a module.

    Raises:
        GraphError: The module fails.
    """
    import torch

    with quiet(), torch.no_grad(), _without_values(module):
        try:
            if isinstance(example_inputs, Mapping):
                return module(**example_inputs)
            return module(*example_inputs)
        except Exception as error:  # whatever the module's own code raises
            raise GraphError(
                f"{type(module).__name__} fails on the example inputs: {first_line(error)}",
                "export the model yourself and go on with that .onnx",
            ) from error


def _without_values(module: torch.nn.Module) -> contextlib.AbstractContextManager[object]:
    """Return what a module on the meta device runs in: as in a trace, no value is asked for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    first = next(module.parameters(), None)
    if first is None or first.device.type != "meta":
        return contextlib.nullcontext()
    mode: contextlib.AbstractContextManager[object] = FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def named_tensors(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a module's output object by the graph's names for them, in the exporter's order.

    They are ``logits``, and of a tuple ``hidden_states.0``, ``hidden_states.1`` … Caches and the output
    objects of modules inside it are left out.
    """
    found = {}
    for name, value in outputs.items():
        if hasattr(value, "shape"):
            found[str(name)] = value
        elif isinstance(value, tuple | list):
            found |= named_tensors({f"{name}.{place}": part for place, part in enumerate(value)})
    return found


def tensor_names(outputs: Any) -> list[str] | None:
    """Return the graph's names of a module's outputs; None for a module that returns no output object."""
    return list(named_tensors(outputs)) if isinstance(outputs, Mapping) else None


def trace_module(
    module: torch.nn.Module,
    example_inputs: Inputs,
    dynamic_shapes: Any,
    output_names: Sequence[str] | None,
    input_names: Sequence[str] | None = None,
    opset: int | None = None,
) -> ir.Model:
    """Return the graph of a module as torch.onnx writes it.

    Args:
        module: Module in the mode (eval, dtype) in which it is captured.
        example_inputs: Positional or keyword inputs.
        dynamic_shapes: As for `torch.export.export`.
        output_names: Names of the graph's outputs, or None for the exporter's own.
        input_names: Names of the graph's inputs; by default those of the parameters of ``forward``.
        opset: Version of ONNX's operators; the exporter's own choice if left out.

    Raises:
        GraphError: torch.onnx can't export the module, or has traced something else than it computes.
    """
    import torch

    keyword = isinstance(example_inputs, Mapping)
    tell_stage(f"tracing {type(module).__name__}")
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                () if keyword else tuple(example_inputs),
                kwargs=dict(example_inputs) if isinstance(example_inputs, Mapping) else None,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # the exporter raises its own errors and many kinds of torch.export
            raise GraphError(
                # What the exporter raises itself begins with how to ask PyTorch's developers.
                f"torch.onnx can't export {type(module).__name__}: {first_line(error.__cause__ or error)}",
                f"export the model yourself and go on with that .onnx{_what_may_help(module)}",
            ) from error
        assert program is not None
        model: ir.Model = program.model
    if program.exported_program is not None:
        _refuse_other_answers(module, program.exported_program.module(), example_inputs)
    _drop_traces(model)
    return model


def _refuse_other_answers(module: torch.nn.Module, traced: torch.nn.Module, inputs: Inputs) -> None:
    """Refuse a trace that answers otherwise than its module: code may go another way where it is traced.

    transformers leaves a mask of ones out where it sees its values, and with it what only the mask says
    (attention in both directions). A module on the meta device has no answers.
    """
    import torch
    from torch.utils import _pytree

    if any(value.device.type == "meta" for value in module.parameters()):
        return
    answers = []
    for one in (module, traced):
        torch.manual_seed(0)
        found = _pytree.tree_leaves(run_module(one, inputs))
        answers.append([value for value in found if isinstance(value, torch.Tensor)])
    for wanted, got in zip(*answers, strict=True):
        if not wanted.is_floating_point():
            continue
        limit = _DIFFERENCE if wanted.dtype in (torch.float32, torch.float64) else _HALVES_DIFFERENCE
        exact, given = wanted.double().nan_to_num(), got.double().nan_to_num()
        gap, whole = (float(torch.linalg.vector_norm(one)) for one in (given - exact, exact))
        if gap > limit * whole:
            raise GraphError(
                f"what torch.export traced of {type(module).__name__} answers otherwise than the model on "
                f"the same inputs (relative difference {gap / max(whole, 1e-30):.2g})",
                "its code goes another way where it is traced: export the model yourself, with all of the "
                f"inputs that its processor gives, and go on with that .onnx{_what_may_help(module)}",
            )


def _what_may_help(module: torch.nn.Module) -> str:
    """Return options that may help when a transformers model is loaded with them, as a part of a hint."""
    model = next((part for part in module.modules() if hasattr(part, "get_experts_implementation")), None)
    found = []
    if model is not None and "grouped_mm" in model.get_experts_implementation().values():
        found.append("experts_implementation='batched_mm'")
    if getattr(getattr(model, "config", None), "_attn_implementation", "eager") != "eager":
        found.append("attn_implementation='eager'")
    return f"; loading it with {' or '.join(found)} may help" if found else ""


def simplify(model: ir.Model) -> None:
    """Fold constants and take out shape arithmetic, but leave weights as they are; each node for itself.

    onnxscript's own `optimize` would also fold batch norms into weights, and one of its rules visits all
    nodes for each node: 20 of 23 seconds for a decoder of 30 layers, in which it never finds anything.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    def should_fold(node: ir.Node) -> bool | None:
        # A folded Transpose or Cast would be a second copy of a weight under another name.
        weights = any(v is not None and v.is_initializer() and len(v.shape or ()) > 1 for v in node.inputs)
        return False if weights else None

    shapes = [
        *(rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule),
        *(rules.reshape_reshape_rule, rules.materialize_reshape_shape_rule, rules.squeeze_reshape_1d_rule),
        *(rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule),
        *(rules.collapse_slice_rule, rules.collapse_slice2_rule),
    ]
    common.InlinePass()(model)
    with quiet():
        for _ in range(2):
            optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
            rewriter.rewrite(model, shapes)
    Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
    )(model)


def finish(model: ir.Model) -> ir.Model:
    """Return the graph of a whole module, simplified, with one of what is computed twice."""
    weights = set(model.graph.initializers)
    tell_stage("simplifying the graph")
    simplify(model)
    share(model, weights)
    return model


def share(model: ir.Model, weights: Collection[str]) -> None:
    """Have one of equal constants and of nodes that compute the same, but each weight for itself."""
    from onnx_ir.passes import Sequential, common

    _deduplicate(model, weights)
    Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _deduplicate(model: ir.Model, weights: Collection[str]) -> None:
    """Keep one of equal constants, but each parameter.

    Two modules with equal weights (zeros of a new head, a copy that will be trained) would otherwise share
    one weight, and one node if they read the same input; then neither could be changed alone.
    """
    from onnx_ir.passes import common

    kept = {name: value for name, value in model.graph.initializers.items() if name in weights}
    for name in kept:
        del model.graph.initializers[name]
    common.DeduplicateInitializersPass()(model)
    model.graph.initializers.update(kept)


def _drop_traces(model: ir.Model) -> None:
    """Remove the exporter's stack traces: they name files of this machine and are most of a graph's size."""
    for node in model.graph.all_nodes():
        for key in _TRACES:
            node.metadata_props.pop(key, None)


def require(*names: str) -> None:
    """Raise `BackendUnavailable` naming every package of ``names`` that is not installed."""
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"capturing a model needs {', '.join(missing)}", _INSTALL)


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message, with the next one if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said[:300]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' progress prints, log lines and warnings, none of which is for our user."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            finally:
                logging.disable(previous)
