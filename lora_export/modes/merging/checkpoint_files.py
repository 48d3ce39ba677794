"""Write the files of a merged folder beside its weights: copies, the index, and a changed config."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.quantised import dequantised_config
from lora_export.base.checkpoint.sentence_modules import module_paths
from lora_export.base.checkpoint.vocabulary import resized_config
from lora_export.base.checkpoint.weight_files import is_index, read_object
from lora_export.base.history.history import MANIFEST
from lora_export.base.planning.checkpoint_plan import CheckpointPlan
from lora_export.base.ties.ties import untied_config
from lora_export.errors import CheckpointError
from lora_export.modes.merging.checkpoint_layout import Layout
from lora_export.storage.inputs import note_inputs
from lora_export.storage.safetensors import read_file_header
from lora_export.untrusted.json_text import json_text
from lora_export.untrusted.links import refuse_links
from lora_export.untrusted.places import is_folder, is_link
from lora_export.untrusted.texts import is_utf8

# Weights in other formats are left out, because the output would hold the unmerged model beside the merged
# one.
_OTHER_WEIGHTS = {
    *(".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".tflite"),
    *(".onnx", ".onnx_data", ".data", ".safetensors"),
}


# transformers' weights for one language, loaded over the model's own (Wav2Vec2, MMS: ``target_lang``).
_LANGUAGE = "adapter.*.safetensors"


def small_files(checkpoint: Checkpoint, changed: Container[str]) -> tuple[list[Path], list[str]]:
    """Return the files to copy as they are, relative to the base, and those to leave out.

    Args:
        checkpoint: The base.
        changed: Names of the tensors that the merge changes.

    Raises:
        CheckpointError: A file to copy is a link out of the folder, or not a file, or its name is not UTF-8.
    """
    shards = {shard.path for shard in checkpoint.shards}
    written = {*shards, checkpoint.folder / MANIFEST}
    small, left_out = [], []
    modules = tuple(checkpoint.folder / path for path in module_paths(checkpoint.folder))
    for path in _files(checkpoint.folder):
        relative = path.relative_to(checkpoint.folder)
        if path in written:
            continue
        nested_part = len(relative.parts) > 1 and path.suffix == ".safetensors"
        if any(module in path.parents for module in modules) or _is_language(path, changed):
            small.append(relative)
            continue
        adapter = path.name.startswith("adapter_") and path.suffix in (".json", ".safetensors", ".bin")
        if adapter or (path.suffix in _OTHER_WEIGHTS and not nested_part) or _is_index(path, checkpoint):
            left_out.append(str(relative))
        else:
            small.append(relative)
    if nameless := [repr(str(path)) for path in small if not is_utf8(str(path))]:
        raise CheckpointError(
            f"{checkpoint.folder} has {len(nameless)} files whose names are not UTF-8",
            "rename or remove them",
            nameless,
        )
    refuse_links(checkpoint.folder, [checkpoint.folder / path for path in small], CheckpointError)
    note_inputs(checkpoint.folder / path for path in small)
    return small, left_out


def unmerged_notes(checkpoint: Checkpoint, small: Sequence[Path]) -> tuple[str, ...]:
    """Return a note on weights in subfolders that are copied as they are, modules of the model excepted."""
    modules = [Path(path) for path in module_paths(checkpoint.folder)]
    nested = [
        str(path)
        for path in small
        if path.suffix == ".safetensors"
        and len(path.parts) > 1
        and not any(module in path.parents for module in modules)
    ]
    return (f"copied as they are, with nothing merged into them: {', '.join(nested)}",) if nested else ()


def _is_language(path: Path, changed: Container[str]) -> bool:
    """Return True if a file holds a language's weights, none of which the merge changes."""
    if not fnmatch(path.name, _LANGUAGE):
        return False
    return not any(tensor.name in changed for tensor in read_file_header(path).tensors)


def _is_index(path: Path, checkpoint: Checkpoint) -> bool:
    """Return True if a file is the index of weights that are not written."""
    others = path.name.endswith((".bin.index.json", ".h5.index.json")) or is_index(path.name)
    nested = path.parent != checkpoint.folder
    return others and path != checkpoint.index and not (nested and is_index(path.name))


def _files(folder: Path) -> Iterator[Path]:
    """Yield a folder's files and links, sorted, without hidden ones (.git, .cache)."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if is_folder(path) and not is_link(path):
            yield from _files(path)
        else:
            yield path


def says_quantised(path: Path) -> bool:
    """Return True if a file beside the weights describes their quantisation (ModelOpt, GPTQ, AWQ tools)."""
    return path.name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def copy_small_files(base: Path, files: list[Path], folder: Path) -> None:
    """Copy files, given relative to ``base``, with their subfolders."""
    for relative in files:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / relative, folder / relative)


def write_index(checkpoint: Checkpoint, layouts: Sequence[Layout], folder: Path) -> None:
    """Write the index again if sizes or names changed; otherwise its copy stays."""
    if checkpoint.index is None:
        return
    index = read_object(checkpoint.index)
    size = sum(entry.length for layout in layouts for entry in layout.entries)
    files = zip(checkpoint.shards, layouts, strict=True)
    names = {entry.name: shard.path.name for shard, layout in files for entry in layout.entries}
    before = sum(tensor.length for tensor in checkpoint.tensors.values())
    if names.keys() == checkpoint.tensors.keys() and size == before:
        return
    index["weight_map"] = dict(sorted(names.items()))
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        index["metadata"]["total_size"] = size
    (folder / checkpoint.index.name).write_text(json_text(index, indent=2, ensure_ascii=True) + "\n", "utf-8")


def write_config(
    checkpoint: Checkpoint, folder: Path, placed: CheckpointPlan, dtype: str | None, dequantised: bool
) -> None:
    """Change the config's entries on dtype, tied embeddings, quantisation and vocabulary, if they changed."""
    changed = dtype is not None or placed.untied or dequantised or placed.vocabulary is not None
    if not checkpoint.config or not changed:
        return
    config = dequantised_config(checkpoint.config) if dequantised else dict(checkpoint.config)
    nested = {key: dict(value) for key, value in config.items() if isinstance(value, dict)}
    config.update(nested)
    if dtype is not None:
        for level in (config, *nested.values()):
            for key in ("dtype", "torch_dtype"):
                if isinstance(level.get(key), str):
                    level[key] = dtype
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = dtype
    if placed.vocabulary is not None:
        config = resized_config(config, *placed.vocabulary)
    if placed.untied:
        config = untied_config(config)
    text = json_text(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
