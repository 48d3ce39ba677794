"""Choose the safetensors files of a folder that are the model, by transformers' and diffusers' rule.

A folder of the hub may hold several sets of weights: copies in another dtype, called variants
(``model.fp16.safetensors``, ``model.safetensors.index.fp16.json``), and the files of other programs
(Mistral's ``consolidated``). The set without a variant under the library's own name is loaded, unless
transformers takes another one (`refuse_chosen_elsewhere`): a config's ``transformers_weights`` may name one,
and the parts of a distributed checkpoint come before all others.

Source: https://github.com/huggingface/transformers ``modeling_utils.py`` (``_add_variant``,
``_get_resolved_checkpoint_files``) and ``distributed/checkpoint.py``, and diffusers
``models/model_loading_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.errors import CheckpointError
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import seen
from lora_export.untrusted.places import is_file, is_folder, listed

_STEMS = ("model", "diffusion_pytorch_model")
_SINGLE = re.compile(rf"(?P<stem>{'|'.join(_STEMS)})(?:\.(?P<variant>[^.]+))?\.safetensors")
_KEY = "transformers_weights"
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
# Model type → files that its class reads beside the model's own (``PreTrainedConfig.extra_files``).
_EXTRA = {"jev": ("head.safetensors", "readout.safetensors")}
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Set of weights.

    Attributes:
        name: Name of the set's index, or of its only file.
        stem: Beginning of its names, if it is one of the libraries' own.
        variant: The variant's name; empty without one.
        index: The index of several files.
        files: Names of the files.
        notes: Notes on other sets.
    """

    name: str
    stem: str
    variant: str
    index: Path | None
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_index(name: str) -> bool:
    """Return True if a file's name is that of an index of safetensors files."""
    return _INDEX.fullmatch(name) is not None


def refuse_chosen_elsewhere(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if transformers would load other weights than those of the usual names.

    Args:
        folder: Folder of a transformers checkpoint.
        config: Its config.json.
    """
    problems = [
        f"config.json: {place}: {seen(name)}"
        for place, name in _named(config)
        # A name in the folder's own config is followed; whether a part's config is read is unknown.
        if place != _KEY or not (isinstance(name, str) and _is_plain(folder, name))
    ]
    if is_folder(folder):
        names = [path.name for path in listed(folder, "*.safetensors")]
        parts = sorted(name for name in names if _DISTRIBUTED.fullmatch(name))
        problems += [
            f"{name}: a part of a distributed checkpoint, loaded before all others" for name in parts
        ]
        kind = config.get("model_type")
        extra = _EXTRA.get(kind, ()) if isinstance(kind, str) else ()
        problems += [f"{name}: loaded beside the model's own weights" for name in names if name in extra]
    if problems:
        raise CheckpointError(
            f"transformers would load other weights of {folder} than those of the usual names",
            "load the model with transformers and save it again with save_pretrained, or name one file (or "
            f"index) in the folder itself with {_KEY}",
            problems,
        )


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each ``transformers_weights``, also in parts' configs, apart from null."""
    levels: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while levels:
        place, level = levels.pop()
        if level.get(_KEY) is not None:
            yield place + _KEY, level[_KEY]
        levels += [(f"{place}{key}.", part) for key, part in level.items() if isinstance(part, dict)]


def _is_plain(folder: Path, name: str) -> bool:
    ends = name.endswith((".safetensors", ".safetensors.index.json"))
    return ends and Path(name).name == name and "\0" not in name and is_file(folder / name)


def find_weights(folder: Path, is_diffusers: bool, config: Mapping[str, Any]) -> WeightFiles | None:
    """Return the model's weights in a folder; None if it holds no safetensors.

    Args:
        folder: Folder of a checkpoint.
        is_diffusers: True if its config is diffusers', which has a name of its own for weights.
        config: Its config.json.

    Raises:
        CheckpointError: There are several sets, and no rule says which one is the model, or transformers
            would load another one.
    """
    sets = _sets(folder)
    if not is_diffusers:
        refuse_chosen_elsewhere(folder, config)
        if (named := config.get(_KEY)) is not None:
            chosen = [found for found in sets if found.name == named]
            # A file that an index names is not a set, and an adapter's file is not a base's set.
            return _noted(
                chosen[0]
                if chosen
                else WeightFiles(name=named, stem="", variant="", index=None, files=(named,)),
                sets,
            )
    stems = _STEMS[::-1] if is_diffusers else _STEMS
    for stem in stems:
        own = [found for found in sets if found.stem == stem]
        chosen = [found for found in own if not found.variant] or own
        if len(chosen) > 1:
            hint = "keep one of them"
            raise CheckpointError(f"{folder} holds several sets of weights", hint, [s.name for s in chosen])
        if chosen:
            return _noted(chosen[0], sets)
    if len(sets) == 1:
        return _noted(sets[0], sets)
    if not sets:
        return None
    indexes = [found.name for found in sets if found.index]
    if indexes:
        raise CheckpointError(f"{folder} holds several sets of weights", "keep one of them", indexes)
    raise CheckpointError(
        f"{folder} holds {len(sets)} safetensors files and no index that says which belong together",
        "download model.safetensors.index.json too, or save the base again",
        [found.name for found in sets],
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint's folder that holds an object.

    Raises:
        CheckpointError: The file can't be read, or holds something else.
    """
    value = read_json(path, CheckpointError, "download or save it again", given=path.parent)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object", "save it again")
    return value


def _sets(folder: Path) -> list[WeightFiles]:
    """Return all sets of a folder; a file that no index names is a set of its own."""
    found, indexed = [], set[str]()
    for index in (path for path in listed(folder, "*.json") if is_index(path.name)):
        match = _INDEX.fullmatch(index.name)
        assert match is not None
        try:
            files = _indexed(index)
        except CheckpointError:
            files = ()  # an error if it is chosen
        indexed.update(files)
        stem = match["stem"] if match["stem"] in _STEMS else ""
        found.append(
            WeightFiles(name=index.name, stem=stem, variant=match["variant"] or "", index=index, files=files)
        )
    for file in listed(folder, "*.safetensors"):
        if file.name in indexed or file.name.startswith("adapter"):
            continue
        match = _SINGLE.fullmatch(file.name)
        stem, variant = (match["stem"], match["variant"] or "") if match else ("", "")
        found.append(WeightFiles(name=file.name, stem=stem, variant=variant, index=None, files=(file.name,)))
    return found


def _indexed(index: Path) -> tuple[str, ...]:
    """Return the files that an index names."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor to file", "save the base again")
    files = sorted(set(weight_map.values()))
    if strange := [file for file in files if Path(file).name != file or file == ".." or "\0" in file]:
        raise CheckpointError(
            f"{index} names weights that are not files of its folder",
            "put all of them beside the index, and save or download it again",
            [repr(file) for file in strange],
        )
    return tuple(files)


def _noted(chosen: WeightFiles, sets: Sequence[WeightFiles]) -> WeightFiles:
    """Return a set with a note on the others; the merge lists files that are in no set."""
    files = _indexed(chosen.index) if chosen.index else chosen.files
    others = [found.name for found in sets if found is not chosen and (found.stem or found.index)]
    note = (
        f"the base's weights are {chosen.name}, as transformers and diffusers load them; not used: "
        f"{', '.join(others)}"
    )
    return replace(chosen, files=files, notes=(note,) if others else ())
