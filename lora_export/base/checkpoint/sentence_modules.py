"""Compare the further modules of a sentence-transformers model: an adapter's folder may hold trained ones.

`SentenceTransformer.save` writes ``modules.json`` with the folder of each module (source:
https://github.com/UKPLab/sentence-transformers ``SentenceTransformer.py``). In a model with an adapter, the
transformer's folder has only the adapter, and the other modules (``2_Dense``) are whole. A merge reads only
the adapter, so changes of other modules would be lost.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError, CheckpointError, LoraExportError
from lora_export.formats.reading.tensors import read_safetensors
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.links import link_problems, refuse_link
from lora_export.untrusted.places import exists, files_below, is_file, is_folder, is_link, is_possible, listed

_LIST = "modules.json"
_COMPARED = (".json", ".safetensors", ".bin", ".pt", ".pth")
# Beginning of each of the older switches.
_MODE = "pooling_mode_"


def transformer_folder(folder: Path) -> Path | None:
    """Return the subfolder with the transformer of a model in the older layout (``0_Transformer``)."""
    for path in module_paths(folder):
        place = folder / path
        if listed(place, "*.safetensors") and exists(place / "config.json"):
            return place
    return None


def module_paths(folder: Path) -> list[str]:
    """Return the subfolders of a model's modules; none if it isn't sentence-transformers'."""
    return [path for path, _ in _modules(folder) if path]


def lost_modules(adapters: Sequence[Adapter], base: Path, *, refuse: bool) -> list[str]:
    """Return notes on modules that were trained beside adapters and that the base lacks or has differently.

    Args:
        adapters: The adapters to merge.
        base: The folder of the base's transformer.
        refuse: Raise an error instead of leaving them out.

    Returns:
        A note for each adapter with such modules.

    Raises:
        AdapterError: A module's weights or settings are not the base's; all are listed.
    """
    root, notes = _root(base), list[str]()
    for adapter in adapters:
        source = Path(adapter.source)
        folder = _root(source if is_folder(source) else source.parent)
        lost = dict(_differing(folder, root))
        if not lost:
            continue
        if refuse:
            copied = " and ".join(str(folder / name) for name in [*sorted(lost), _LIST])
            raise AdapterError(
                f"adapter '{adapter.name}' was trained in a sentence-transformers model whose further "
                f"modules are not those of {root}: they are not in the adapter's file, and would be lost",
                f"copy {copied} into a copy of {root} and merge into that; or leave them out with "
                "--allow-unmatched",
                [f"{folder / name}: {why}" for name, why in lost.items()],
            )
        listed = "; ".join(f"{folder / name} ({why})" for name, why in lost.items())
        notes.append(f"adapter '{adapter.name}': left out from its folder: {listed}")
    return notes


def _root(place: Path) -> Path:
    """Return the folder of the model that a transformer's folder belongs to: itself, or its parent."""
    own = place.absolute()
    return own.parent if own.name in module_paths(own.parent) and not exists(own / _LIST) else place


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return path and class of the modules in ``modules.json``; none if there is no such file.

    Raises:
        CheckpointError: A path leads out of the folder, or the file is a link out of it.
    """
    refuse_link(folder / _LIST, folder, CheckpointError)
    try:
        entries = read_json(folder / _LIST)
        # The classes have moved to other packages.
        found = [(str(entry["path"]), str(entry["type"]).rpartition(".")[2]) for entry in entries]
    except (LoraExportError, TypeError, KeyError):
        return []
    outside = [
        path
        for path, _ in found
        if Path(path).is_absolute() or ".." in Path(path).parts or not is_possible(folder / path)
    ]
    if outside:
        raise CheckpointError(
            f"{folder / _LIST} names modules outside of its folder, or by names that no folder has",
            "put the modules' folders beside it, and correct their paths",
            [repr(path) for path in outside],
        )
    return found


def _differing(folder: Path, root: Path) -> Iterator[tuple[str, str]]:
    """Yield the modules of an adapter's folder that a base lacks or has differently, with the difference."""
    theirs = _modules(root)
    for path, kind in _modules(folder):
        if not path or is_file(folder / path / "adapter_config.json"):
            continue
        _refuse_linked(folder, path)
        if kind not in (other for _, other in theirs):
            yield path, f"the base has no module {kind}"
        elif why := _difference(folder / path, root / path):
            yield path, why


def _refuse_linked(folder: Path, path: str) -> None:
    """Raise `AdapterError` if a module's folder, or a folder on the way there, is a link.

    Its target is not a part of the adapter: it could be a whole disk, and names in it would be printed.
    """
    for place in (folder / path, *(folder / path).parents):
        if place == folder:
            return
        if is_link(place):
            raise AdapterError(
                f"{folder / _LIST} names the module {path!r}, and {place} is a link",
                "put the module's folder itself there, or remove the link",
            )


def _difference(mine: Path, theirs: Path) -> str:
    """Return the difference of two folders of a module, or an empty text."""
    for file in (path for path in files_below(mine) if path.suffix in _COMPARED):
        if problems := link_problems(mine, [file]):
            return f"it can't be compared: {problems[0]}"
        other = theirs / file.relative_to(mine)
        if not is_file(other):
            return f"the base has no {other}"
        if not _is_equal(file, other):
            what = "settings" if file.suffix == ".json" else "weights"
            return f"its {what} are not those of {other}"
    return ""


def _is_equal(file: Path, other: Path) -> bool:
    # By size and then piece by piece: they may be of any size.
    if filecmp.cmp(file, other, shallow=False):
        return True
    try:
        if file.suffix == ".json":
            one, two = (_settings(read_json(path)) for path in (file, other))
            return all(one[key] == two[key] for key in one.keys() & two.keys())
        if file.suffix == ".safetensors":
            mine, theirs = read_safetensors(file)[0], read_safetensors(other)[0]
            return mine.keys() == theirs.keys() and all(np.array_equal(mine[n], theirs[n]) for n in mine)
    except (AttributeError, LoraExportError):
        pass
    return False


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a module's settings; of versions with more or fewer, only those of both are compared."""
    modes = config.get("pooling_mode", [])
    modes = modes.split("+") if isinstance(modes, str) else modes
    # Before version 6 each mode had a switch: ``pooling_mode_cls_token``, ``pooling_mode_mean_tokens``.
    switches = {key: value for key, value in config.items() if key.startswith(_MODE)}
    modes = [*modes, *(key for key, value in switches.items() if value)] or ["mean"] * bool(switches)
    plain = {key: value for key, value in config.items() if not key.startswith("pooling_mode")}
    words = (str(mode).removeprefix(_MODE) for mode in modes)
    found = {word.removesuffix("_tokens").removesuffix("_token") for word in words}
    return plain | ({"pooling_mode": found} if found else {})
