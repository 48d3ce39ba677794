"""Build bases with onnxruntime-genai's model builder, and read the weights of its int4 base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_export.adapter import Array
from lora_export.demo.training import silence
from lora_export.errors import BackendError, InternalError, install_line

Precision = Literal["fp32", "int4"]
# The builder's default on a CPU, 4, also rounds the activations to int8, which PyTorch can't do the same way;
# 1 keeps them in float32, so that its tokens can be compared with PyTorch's exactly.
_EXACT = ["accuracy_level=1"]
_BITS = 4


def build_base(checkpoint: Path, folder: Path, precision: Precision, cache: Path) -> Path:
    """Build ``folder/model.onnx`` for onnxruntime-genai's CPU provider, with config and tokenizer.

    Args:
        checkpoint: A Hugging Face folder with a tokenizer.
        folder: Folder to write.
        precision: Precision of the weights.
        cache: A folder for the builder's temporary files.

    Returns:
        Path of the graph.

    Raises:
        BackendError: The builder failed.
    """
    from onnxruntime_genai.models import builder

    place = {
        "model_name": None,
        "input_path": str(checkpoint),
        "output_dir": str(folder),
        "precision": precision,
        "execution_provider": "cpu",
        "cache_dir": str(cache),
    }
    extra = ["hf_remote=false", *(_EXACT if precision == "int4" else [])]
    try:
        with silence():
            options = builder.parse_extra_options(**place, extra_options=extra)
            builder.create_model(**place, **options)
    except Exception as error:
        raise BackendError(
            f"onnxruntime-genai's model builder failed: {type(error).__name__}: {error}",
            f"{install_line('genai')} for a version that is known to work",
        ) from error
    return folder / "model.onnx"


def load_int4_weights(model: Any, graph: Path) -> None:
    """Copy the rounded weights of an int4 graph into its Llama in PyTorch, in float32.

    Args:
        model: A ``LlamaForCausalLM`` of the checkpoint that the graph was built from; it is changed.
        graph: The builder's ``model.onnx``.
    """
    import torch

    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    waiting = set(linears)
    for name, rows in _rounded_weights(graph):
        start = 0
        for path in _modules_of(name):
            weight = linears[path].weight
            stop = start + weight.shape[0]
            # A copy into the same parameter, so that a tied embedding follows its lm_head.
            weight.data.copy_(torch.from_numpy(rows[start:stop, : weight.shape[1]]))
            start = stop
            waiting.discard(path)
    if waiting:
        raise InternalError(f"no int4 weight in {graph} for {sorted(waiting)}")


def _rounded_weights(graph: Path) -> Iterator[tuple[str, Array]]:
    """Yield each quantised weight's name and values, of shape ``(out_dim, in_dim or more)``."""
    import onnx_ir as ir

    for node in ir.load(graph).graph:
        if node.op_type != "MatMulNBits":
            continue
        stored, scales = (value.const_value for value in node.inputs[1:3] if value is not None)
        assert stored is not None
        assert scales is not None
        packed = stored.numpy()
        # Two weights in a byte, the first in the low half, with 8 as zero; one scale for each block of a row.
        pairs = np.stack([packed & 15, packed >> _BITS], axis=-1).reshape(*packed.shape[:2], -1)
        blocks = (pairs.astype(np.float32) - 8) * scales.numpy().reshape(*packed.shape[:2], 1)
        yield stored.name or "", blocks.reshape(len(packed), -1)


def _modules_of(name: str) -> list[str]:
    """Return the modules whose rows a weight of the builder's graph holds, in row order."""
    path = name.partition(".MatMul.")[0].replace(".attn.", ".self_attn.")
    above, _, last = path.rpartition(".")
    if last != "qkv_proj":
        return [path]
    return [f"{above}.{part}_proj" for part in "qkv"]
