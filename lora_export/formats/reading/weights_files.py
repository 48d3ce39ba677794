"""Find the weights files of an adapter in a folder, and the config that belongs to them.

A folder holds one adapter. Its files are known by name: the weights of PEFT, diffusers, mlx-lm and Edge-LLM,
in one file or in shards, and the files that a training run needs to resume. Any other weights file is an
error that names it: LLaVA's ``non_lora_trainables.bin`` belongs to the adapter like the LoRA beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import AdapterError
from lora_export.formats.reading.ort_file import SUFFIX as ORT_SUFFIX
from lora_export.formats.reading.pickles import SUFFIXES
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.places import exists, is_file, is_folder, listed

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# TensorRT-Edge-LLM's folder of one adapter, in the layout of its engines' inputs.
EDGE_LLM_NAME = "processed_adapter_model.safetensors"
MLX_NAME = "adapters.safetensors"
_DIFFUSERS_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_KNOWN = (*WEIGHT_NAMES, *_DIFFUSERS_NAMES, EDGE_LLM_NAME, MLX_NAME)
_SHARD = re.compile(
    r"^(?P<stem>adapter_model|pytorch_lora_weights)-(?P<number>\d{5})-of-(?P<count>\d{5})\.\w+$"
)
# mlx-lm saves these during training, and the last one again under the adapter's own name.
_MLX_STEP = re.compile(r"^\d+_adapters\.safetensors$")
# Files from which Trainer, Accelerate, DeepSpeed and diffusers' scripts resume a training.
_TRAINING = re.compile(
    r"^(training_args|optimi[sz]er|scheduler|lr_scheduler|scaler|rng_state|random_states|sampler|dl_state"
    r"|trainer_state|custom_checkpoint)[\w.-]*\.(bin|pt|pth|pkl|safetensors)$"
)


@dataclass(frozen=True)
class WeightsFiles:
    """The files of one adapter.

    Attributes:
        files: The weights file, or all shards in their order.
        index: Tensor's name → shard, from the index beside the shards; None without one.
        config: ``adapter_config.json``, if one belongs to these files.
        notes: Notes on files beside them that were ignored.
    """

    files: tuple[Path, ...]
    index: dict[str, str] | None = None
    config: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[Path, ...]:
        """Every place whose file, or lack of one, decides what the adapter is."""
        first = self.files[0]
        has_config = is_peft_name(first.name) or is_mlx_name(first.name)
        shard = _SHARD.match(first.name)
        beside = [CONFIG_NAME] if has_config else []
        beside += [_index_name(shard["stem"], first.suffix)] if shard else []
        return (*self.files, *(first.with_name(name) for name in beside))


def find_adapter_weights(path: Path) -> WeightsFiles:
    """Return the files of the adapter at ``path``, a folder or a file.

    Raises:
        AdapterError: There is nothing, no weights file, more than one, or not all shards.
    """
    if is_file(path):
        return _one_file(path)
    if not exists(path):
        hint = "check the path"
        if path.parts and len(path.parts) == 2 and not path.is_absolute():
            hint = (
                f"check the path; for a model on the Hub, first: hf download {path} --local-dir {path.name}"
            )
        raise AdapterError(f"no adapter at {path}: it does not exist", hint)
    if not is_folder(path):
        raise AdapterError(f"{path} is neither a file nor a folder", "give a PEFT folder or a weights file")
    names = sorted(child.name for child in path.iterdir() if child.suffix in _suffixes() and is_file(child))
    steps = [name for name in names if _MLX_STEP.match(name)] if MLX_NAME in names else []
    left = [name for name in names if not _TRAINING.match(name) and name not in steps]
    shards = [name for name in left if _SHARD.match(name)]
    known = [name for name in _KNOWN if name in left]
    if not known and not shards:
        return _only_candidate(path, left)
    own = shards if shards and not known else known[:1]
    if others := [name for name in left if name not in own]:
        raise AdapterError(
            f"{path} holds several weights files: {own[0] if len(own) == 1 else f'{len(own)} shards'} and "
            f"{_listed(others)}, but only one adapter is read",
            f"give one file, such as {path / own[0]}, or move the others out of the folder",
        )
    notes = (f"ignored, earlier steps of the training: {', '.join(steps)}",) if steps else ()
    if shards:
        return _all_shards(path, shards)
    return WeightsFiles((path / own[0],), None, _config_of(path / own[0]), notes)


def files_of(source: str | Path) -> list[Path]:
    """Return all files that reading the adapter at ``source`` reads; none if nothing is there."""
    path = Path(source)
    try:
        found = find_adapter_weights(path)
    except AdapterError:  # made in memory, or moved since
        return [path] if exists(path) else []
    folder = found.files[0].parent
    # Including a config that was not used: it still belongs to the adapter.
    beside = [folder / CONFIG_NAME, *listed(folder, "*.index.json")]
    return [*found.files, *(file for file in beside if is_file(file))]


def is_peft_name(name: str) -> bool:
    """Return whether PEFT's config applies to a file of this name."""
    shard = _SHARD.match(name)
    return name in WEIGHT_NAMES or (shard is not None and shard["stem"] == "adapter_model")


def is_mlx_name(name: str) -> bool:
    """Return whether mlx-lm's config applies to a file of this name."""
    return name == MLX_NAME or bool(_MLX_STEP.match(name))


def _suffixes() -> tuple[str, ...]:
    return (".safetensors", *SUFFIXES, ORT_SUFFIX)


def _one_file(path: Path) -> WeightsFiles:
    if shard := _SHARD.match(path.name):
        raise AdapterError(
            f"{path} is one of {int(shard['count'])} shards of an adapter", f"give the folder: {path.parent}"
        )
    config = _config_of(path)
    beside = path.parent / CONFIG_NAME
    notes: tuple[str, ...] = ()
    if config is None and is_file(beside) and path.name not in (*_DIFFUSERS_NAMES, EDGE_LLM_NAME):
        notes = (
            f"{beside} was not used: it belongs to {WEIGHT_NAMES[0]} in its folder, not to {path.name}; "
            f"if it belongs to {path.name}, rename that file",
        )
    return WeightsFiles((path,), None, config, notes)


def _config_of(file: Path) -> Path | None:
    config = file.parent / CONFIG_NAME
    belongs = is_peft_name(file.name) or is_mlx_name(file.name)
    return config if belongs and is_file(config) else None


def _all_shards(folder: Path, names: Sequence[str]) -> WeightsFiles:
    """Return the shards in ``folder``, checked for completeness by their names and by the index."""
    matches = [match for name in names if (match := _SHARD.match(name))]
    kinds = {(match["stem"], match["count"], Path(match.string).suffix) for match in matches}
    if len(kinds) > 1:
        raise AdapterError(
            f"{folder} holds the shards of several adapters", "move the others out of the folder", list(names)
        )
    ((stem, count, suffix),) = kinds
    wanted = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    index = _read_index(folder / _index_name(stem, suffix))
    wanted += sorted(set((index or {}).values()) - set(wanted))
    if missing := [name for name in wanted if name not in names]:
        raise AdapterError(
            f"{folder} has {len(names)} of {len(wanted)} shards", "download or save the missing ones", missing
        )
    if extra := [name for name in names if name not in wanted]:
        raise AdapterError(
            f"{folder} has shards outside of 1–{int(count)}", "move them out of the folder", extra
        )
    return WeightsFiles(tuple(folder / name for name in wanted), index, _config_of(folder / wanted[0]))


def _index_name(stem: str, suffix: str) -> str:
    return f"{stem}{suffix}.index.json"


def _read_index(path: Path) -> dict[str, str] | None:
    if not is_file(path):
        return None
    content = read_json(path, AdapterError, "save the adapter again", given=path.parent)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise AdapterError(
            f"{path} is not an index of shards: it has no 'weight_map' of file names",
            "save the adapter again",
        )
    return index


def _only_candidate(path: Path, found: Sequence[str]) -> WeightsFiles:
    if is_file(path / CONFIG_NAME):
        others = f" (found: {_listed(found)})" if found else ""
        raise AdapterError(
            f"{path} has {CONFIG_NAME} but no {' or '.join((*WEIGHT_NAMES, MLX_NAME))}{others}",
            "save or download the weights too, or give the file itself with its options, such as --alpha",
        )
    nested = [child.name for child in listed(path) if exists(child / CONFIG_NAME)]
    if nested:
        raise AdapterError(
            f"{path} holds no adapter itself, only in its subfolders",
            "give one of these",
            [str(path / child) for child in nested],
        )
    if not found and is_file(path / "model_index.json"):
        raise AdapterError(
            f"{path} is a diffusers pipeline of several models, not an adapter",
            "give the adapter's own file or folder; as a base, give the folder of one of the models",
        )
    if is_file(path / "config.json"):
        raise AdapterError(
            f"{path} is a model, not an adapter: it has config.json but no {CONFIG_NAME}",
            "give the adapter's folder, not its base model's",
        )
    if len(found) == 1:
        return WeightsFiles((path / found[0],))
    raise AdapterError(
        f"{path} holds {len(found)} weights files but no {CONFIG_NAME}",
        "give one of the files" if found else "give the folder that PEFT's save_pretrained wrote",
        list(found),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "")
