"""Load a checkpoint folder's model as transformers does, once nothing in it speaks against it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.base.capture.export import first_line, quiet
from lora_export.base.checkpoint.checkpoint import (
    Checkpoint,
    diffusers_class,
    model_files,
    no_folder,
    read_config,
)
from lora_export.base.checkpoint.layer_counts import refuse_large_numbers, refuse_many_layers
from lora_export.base.checkpoint.module_counts import few_modules
from lora_export.base.checkpoint.own_code import model_class, never_asked, refuse_own_code
from lora_export.base.checkpoint.quantised import refuse_bare_codes
from lora_export.base.checkpoint.weight_files import refuse_chosen_elsewhere
from lora_export.base.checkpoint.widths import refuse_wide
from lora_export.errors import CheckpointError
from lora_export.storage.inputs import note_inputs
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.links import refuse_links
from lora_export.untrusted.places import exists, is_folder, listed

EXPORT_YOURSELF = (
    "export the model yourself and go on with that .onnx (lora_export.export_onnx does it, an adapter merged)"
)

# Defaults of generating texts, which transformers copies several times: 15 MB of it took 1.1 GB and 36 s. The
# largest published ones (Whisper's) have some kilobytes.
_GENERATION, _GENERATION_BYTES = "generation_config.json", 1 << 19
# Of weights with other shapes: in most cases all have them for one number.
_SHOWN = 8


@dataclass(frozen=True)
class Loading:
    """Class and config that transformers loads a folder with.

    Attributes:
        kind: The model's class.
        config: Its config.
    """

    kind: Any
    config: Any


def check_folder(path: Path) -> None:
    """Refuse what no model is loaded from, by the folder's documents alone: transformers is not asked.

    Raises:
        CheckpointError: The folder can't be loaded, or not without running code of its own.
    """
    if not is_folder(path):  # else transformers would ask a hub for a model of that name
        raise no_folder(path)
    note_inputs(model_files(path))
    if not exists(path / "config.json") and exists(path / "adapter_config.json"):
        raise CheckpointError(f"{path} is an adapter, not a base model", "give the folder of its base model")
    _refuse_diffusers(path)
    refuse_links(
        path,
        [found for kind in ("json", "safetensors", "bin") for found in listed(path, f"*.{kind}")],
        CheckpointError,
    )
    written = read_config(path)
    refuse_own_code(path, written)
    refuse_chosen_elsewhere(path, written)
    refuse_many_layers(path, written)
    _refuse_costly(path)
    _refuse_adapter_beside(path)
    refuse_bare_codes(path)


def look_at(path: Path) -> Loading:
    """Return the class and the config of a folder's model, before anything is loaded.

    Raises:
        CheckpointError: The folder can't be loaded, or not without running code of its own.
    """
    import transformers

    check_folder(path)
    with quiet(), never_asked():
        try:
            config = transformers.AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            refuse_large_numbers(path, config)
            kind = _model_class(config, path)
            refuse_wide(path, kind, config)
        except CheckpointError:
            raise
        except Exception as error:  # transformers raises many kinds
            raise _cant_load(path, error) from error
    return Loading(kind, config)


def load_model(path: Path, dtype: str, replaced: Collection[str] = ()) -> tuple[Any, tuple[str, ...]]:
    """Return a checkpoint's model as transformers loads it, in eval mode, and the parameters that it made up.

    Args:
        path: Folder that ``save_pretrained`` wrote.
        dtype: Dtype of the weights, one of `DTYPES`, or ``float64``.
        replaced: Parameters that are replaced afterwards; the checkpoint may lack them.

    Returns:
        The model, and the names of parameters that the checkpoint lacks: their values are random.

    Raises:
        CheckpointError: The folder can't be loaded without running code of its own, can't be loaded or lacks
            weights, or weights don't fit into the dtype.
    """
    import torch

    loading = look_at(path)
    with quiet(), never_asked(), few_modules(path):
        try:
            model, lacks = loading.kind.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation=attention_of(loading.config),
                output_loading_info=True,
                # Else it raises an error without their names, which are in a report on its log.
                ignore_mismatched_sizes=True,
            )
        except CheckpointError:
            raise
        except Exception as error:  # transformers, safetensors and torch raise many kinds
            raise _cant_load(path, error) from error
    _refuse_mismatched(lacks["mismatched_keys"], path)
    _refuse_missing(lacks["missing_keys"], path, replaced)
    _refuse_infinite(model, path, dtype)
    return model.eval(), tuple(sorted(lacks["missing_keys"]))


def _refuse_costly(folder: Path) -> None:
    """Refuse further documents that transformers reads with a model, and that no other reader limits."""
    for found in listed(folder, "*.json"):
        is_generation = found.name == _GENERATION
        if is_generation and found.stat().st_size > _GENERATION_BYTES:
            raise CheckpointError(
                f"{found} has more than {_GENERATION_BYTES} bytes", "save the model again, or delete it there"
            )
        if is_generation or found.name.endswith(".index.json"):
            read_json(found, CheckpointError, "download or save it again")


def _cant_load(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"transformers can't load {path}: {first_line(error)}",
        f"give the folder that save_pretrained wrote, or {EXPORT_YOURSELF}",
    )


def _refuse_diffusers(path: Path) -> None:
    """Refuse a pipeline of diffusers, or one of its models, with a message that says so."""
    if exists(path / "model_index.json"):
        Checkpoint.open(path)  # raises for a pipeline
    if kind := diffusers_class(path):
        raise CheckpointError(
            f"{path} holds a model of diffusers ({kind}): only models of transformers are captured",
            f"{EXPORT_YOURSELF}, or merge the adapter into the folder (lora-export merge)",
        )


def _refuse_adapter_beside(path: Path) -> None:
    """Refuse an adapter in the model's folder, because transformers applies it if PEFT is installed."""
    if exists(path / "config.json") and exists(path / "adapter_config.json"):
        raise CheckpointError(
            f"{path} holds an adapter beside the model (adapter_config.json): transformers would apply it "
            "if PEFT is installed",
            "move adapter_config.json and the adapter's weights to a folder of their own, and give that as "
            "the adapter",
        )


def _refuse_mismatched(found: Collection[tuple[str, Any, Any]], path: Path) -> None:
    """Refuse weights of other sizes than the config's, which transformers has made up."""
    if found:
        raise CheckpointError(
            f"{len(found)} weights of {path} have other shapes than its config.json makes",
            "give the config.json that the weights were saved with",
            sorted(f"{name}: {list(seen)}, wanted {list(wanted)}" for name, seen, wanted in found)[:_SHOWN],
        )


def _refuse_missing(keys: Collection[str], path: Path, replaced: Collection[str]) -> None:
    """Refuse a checkpoint that lacks some of the model's weights, which transformers has made up."""
    given = [f".{name}" for name in replaced]
    missing = sorted(
        key for key in keys if not any(f".{key}".endswith(name) or name.endswith(f".{key}") for name in given)
    )
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the model's weights",
            "give all of its files, or the class that it was saved from as 'architectures' in config.json",
            missing,
        )


def _refuse_infinite(model: Any, path: Path, dtype: str) -> None:
    """Refuse weights too large for the dtype, which transformers has made infinite without a warning."""
    if dtype in ("float32", "float64"):
        return
    found = {name: values for name, values in model.named_parameters() if not values.isfinite().all()}
    # A conversion makes numbers infinite, never NaN.
    refuse_lost({name: bool(values.isnan().any()) for name, values in found.items()}, path, dtype)


def refuse_lost(lost: Mapping[str, bool], path: Path, dtype: str) -> None:
    """Refuse weights that are not finite; ``lost``: name → whether some are NaN."""
    if not lost:
        return
    spoilt = [name for name, is_nan in lost.items() if is_nan]
    if spoilt:
        raise CheckpointError(
            f"{len(spoilt)} weights of {path} are NaN in every dtype", "save the checkpoint again", spoilt
        )
    larger = "bfloat16 or float32" if dtype == "float16" else "float32"
    raise CheckpointError(
        f"{len(lost)} weights of {path} are not finite in {dtype}", f"give --dtype {larger}", list(lost)
    )


def _model_class(config: Any, path: Path) -> Any:
    import transformers

    names = config.architectures or []
    for name in names:
        if kind := model_class(name):
            return kind
    raise CheckpointError(
        f"{path}/config.json names no architecture that transformers {transformers.__version__} has "
        f"(architectures: {names})",
        "set 'architectures' to the model's class, or export the model yourself and go on with that .onnx",
    )


def attention_of(config: Any) -> str | None:
    """Return the implementation of attention that a model is loaded with; None: transformers chooses."""
    # T5's scaled-dot-product path fails in torch.export ("Cannot view a tensor").
    return "eager" if getattr(config, "is_encoder_decoder", False) else None
