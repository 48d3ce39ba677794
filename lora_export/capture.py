"""Capture a PyTorch module or a Hugging Face checkpoint as an ONNX graph, with torch.onnx's dynamo exporter.

Weights keep their own names and orientation (a Transpose stays in the graph): ONNX Runtime folds it when it
loads, and untouched weights can then stay in the checkpoint's own ``.safetensors``.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.errors import BackendUnavailable, CheckpointError, GraphError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.torch.onnx.class_hierarchy")
_INSTALL = "pip install 'lora-export[hf]'"


def capture_checkpoint(folder: str | os.PathLike[str], output: Path) -> Path:
    """Write the graph of a checkpoint folder in float32, with dynamic batch and sequence axes.

    The model class is the one named in the config's ``architectures``. Decoders are captured without a
    key-value cache: for generation, build the graph with onnxruntime-genai and merge into that.

    Args:
        folder: What ``save_pretrained`` wrote.
        output: The ``.onnx`` file to write; its data goes beside it.

    Returns:
        ``output``.

    Raises:
        BackendUnavailable: torch, transformers or onnxscript is missing.
        CheckpointError: The folder can't be loaded, or its kind of input is not known.
        GraphError: torch.onnx can't export the model.
    """
    _require("torch", "transformers", "onnxscript")
    import torch
    import transformers

    path = Path(folder)
    if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} is an adapter, not a base model", "give it as --adapter, and its base as --base"
        )
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            model = _model_class(config, path).from_pretrained(
                path, dtype=torch.float32, local_files_only=True, attn_implementation=_attention(config)
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"transformers can't load {path}: {str(error).strip().splitlines()[0]}",
                "give the folder that save_pretrained wrote, or export the model yourself and give the .onnx",
            ) from error
    model.eval()
    model.config.use_cache = False
    inputs = _example_inputs(model, path)
    shapes = {name: _dynamic(name, value) for name, value in inputs.items()}
    return capture_module(model, inputs, output, shapes)


def capture_module(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    output: Path,
    dynamic_shapes: Any = None,
) -> Path:
    """Write the graph of a module.

    Args:
        module: In the mode (eval, dtype) in which it is to be captured.
        example_inputs: Positional or keyword inputs.
        output: The ``.onnx`` file to write; its data goes beside it.
        dynamic_shapes: As for `torch.export.export`.

    Returns:
        ``output``.

    Raises:
        BackendUnavailable: torch or onnxscript is missing.
        GraphError: torch.onnx can't export the module.
    """
    _require("torch", "onnxscript")
    import onnx_ir as ir
    import torch

    keyword = isinstance(example_inputs, Mapping)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                () if keyword else tuple(example_inputs),
                kwargs=dict(example_inputs) if isinstance(example_inputs, Mapping) else None,
                output_names=_output_names(module, example_inputs),
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises its own and torch.export's many kinds
            raise GraphError(
                f"torch.onnx can't export {type(module).__name__}: {_first_line(error)}",
                "export the model yourself and give the .onnx, or try attn_implementation='eager'",
            ) from error
        assert program is not None
        _optimize(program.model)
        _drop_traces(program.model)
    ir.save(program.model, output, external_data=output.name + ".data")
    return output


def _optimize(model: ir.Model) -> None:
    """Simplify the graph but leave weights as they are."""
    from onnxscript import optimizer

    def should_fold(node: ir.Node) -> bool | None:
        # A folded Transpose or Cast would be a second copy of a weight under a name of its own.
        weights = any(v is not None and v.is_initializer() and len(v.shape or ()) > 1 for v in node.inputs)
        return False if weights else None

    optimizer.optimize_ir(model, should_fold=should_fold)


def _drop_traces(model: ir.Model) -> None:
    """Remove the exporter's stack traces: they name files of this machine and are most of a graph's size."""
    for node in model.graph.all_nodes():
        for key in _TRACES:
            node.metadata_props.pop(key, None)


def _output_names(module: torch.nn.Module, example_inputs: Any) -> list[str] | None:
    """Name the graph's outputs as the module's output object does (``logits``, ``last_hidden_state``)."""
    result = module(**example_inputs) if isinstance(example_inputs, Mapping) else module(*example_inputs)
    if not isinstance(result, Mapping):
        return None
    return [str(name) for name, value in result.items() if hasattr(value, "shape")]


def _model_class(config: Any, path: Path) -> Any:
    import transformers

    names = config.architectures or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise CheckpointError(
        f"{path}/config.json names no architecture that transformers {transformers.__version__} has "
        f"(architectures: {names})",
        "set 'architectures' to the model's class, or export the model yourself and give the .onnx",
    )


def _attention(config: Any) -> str | None:
    # T5's scaled-dot-product path fails in torch.export ("Cannot view a tensor").
    return "eager" if getattr(config, "is_encoder_decoder", False) else None


def _example_inputs(model: Any, path: Path) -> dict[str, Any]:
    import torch

    config = model.config
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" in accepted and model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
        return {"pixel_values": torch.zeros(2, config.num_channels, size, size)}
    if model.main_input_name != "input_ids":
        raise CheckpointError(
            f"{path}: don't know example inputs for a model that reads {model.main_input_name!r}",
            "use lora_export.export_onnx(module, adapter, example_inputs, output)",
        )
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.int64)}
    for name in ("attention_mask", "token_type_ids"):
        # Models without token types still accept the argument (GPT-2 takes it for word ids).
        if name in accepted and (name == "attention_mask" or getattr(config, "type_vocab_size", None)):
            inputs[name] = torch.full((2, 7), int(name == "attention_mask"), dtype=torch.int64)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(2, 5, dtype=torch.int64)
    return inputs


def _dynamic(name: str, value: Any) -> dict[int, Any]:
    import torch

    axes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if name != "pixel_values":
        axes[1] = torch.export.Dim("decoder_sequence" if name.startswith("decoder") else "sequence")
    return axes


def _require(*names: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"capturing a model needs {', '.join(missing)}", _INSTALL)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporters' progress prints, log lines and warnings: none is for our user."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            finally:
                logging.disable(previous)
