"""Keep graphs that were traced without weights: the next model of the same config is not traced again.

An entry is one ONNX file without data, ``captures/<key>.onnx`` in the user's cache folder. Its key is a hash
of all that the graph depends on: the config, the sizes for images, names, shapes and types of the stored
tensors, the options, the versions of all that traces, and this package's own code for bases and graphs.
Where each weight comes from is in the entry's metadata, as is its proof. A damaged entry is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir

import lora_export.base
import lora_export.graph
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import StoredPart
from lora_export.base.kinds.model_kind import PROCESSOR
from lora_export.errors import OutputError
from lora_export.graph.read_model import read_model
from lora_export.storage.cache_folder import cache_folder, chosen_folder, is_private
from lora_export.storage.outputs import OutputSet
from lora_export.storage.sums import seal
from lora_export.untrusted.documents import MAX_BYTES, open_regular, parse_json
from lora_export.untrusted.fields import FieldError, check_plain
from lora_export.untrusted.places import files_below, is_file, listed

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "lora-export")
_PARTS, _KEY = "lora_export.kept_parts", "lora_export.kept_key"
_NAME = re.compile("[0-9a-f]{64}")
# Says of a weight that its values are not in the file.
_NOWHERE = "weights"
_MOST = 200


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A graph without its weights.

    Attributes:
        graph: The graph; weights have no values.
        parts: Weight → the stored tensors that hold it.
    """

    graph: ir.Model
    parts: Mapping[str, tuple[StoredPart, ...]]


def key_of(checkpoint: Checkpoint, options: Mapping[str, object]) -> str:
    """Return the key of a capture.

    Args:
        checkpoint: The folder.
        options: How it is captured.
    """
    digest = hashlib.sha256()
    for name in ("config.json", PROCESSOR):
        path = checkpoint.folder / name
        content = _bytes_of(path) if is_file(path) else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    tensors = {name: (tensor.code, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    digest.update(json.dumps([options, _versions(), tensors], sort_keys=True).encode())
    return digest.hexdigest()


def _bytes_of(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(MAX_BYTES)


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    # A checkout has one version for many states of the code.
    digest = hashlib.sha256()
    for room in (lora_export.base, lora_export.graph):
        for path in sorted(files_below(Path(room.__path__[0]))):
            if path.suffix == ".py":
                digest.update(path.read_bytes())
    return {**found, "code": digest.hexdigest()}


def find(key: str, tensors: Container[str]) -> Kept | None:
    """Return the graph of a key; None if there is none.

    Args:
        key: The key.
        tensors: Names of the stored tensors.
    """
    folder = _folder()
    if folder is None:
        return None
    path = folder / f"{key}.onnx"
    try:
        if not is_file(path):
            return None
        found = seal.find_seal(path)
        if found is not None and found.digest == found.seen(path):
            kept = _read(path, key, tensors)
            with contextlib.suppress(OSError):  # a cache that can't be written to works as well
                os.utime(path)
            return kept
    except OSError:
        return None
    except Exception:  # whatever a damaged entry leads to: the graph is traced again
        pass
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _read(path: Path, key: str, tensors: Container[str]) -> Kept:
    graph = read_model(path)
    graph.metadata_props.pop(seal.KEY, None)
    if graph.metadata_props.pop(_KEY, "") != key:
        raise FieldError(["key: another entry's"])
    written = parse_json(graph.metadata_props.pop(_PARTS, "null").encode())
    parts = check_plain(Mapping[str, tuple[StoredPart, ...]], written, "parts")
    weights = {name for name, value in graph.graph.initializers.items() if _is_nowhere(value)}
    others = [
        name
        for name, value in graph.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and name not in weights
    ]
    stored = all(own and all(part.tensor in tensors for part in own) for own in parts.values())
    if weights != parts.keys() or others or not stored:
        raise FieldError(["parts: not those of the graph's weights"])
    return Kept(graph=graph, parts=parts)


def _is_nowhere(value: ir.Value) -> bool:
    tensor = value.const_value
    return isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == _NOWHERE


def keep(key: str, kept: Kept) -> None:
    """Keep a graph under a key; where that can't be, nothing happens."""
    folder = _folder()
    if folder is None:
        return
    path = folder / f"{key}.onnx"
    graph = kept.graph
    graph.metadata_props[_KEY] = key
    graph.metadata_props[_PARTS] = json.dumps(
        {name: [asdict(part) for part in parts] for name, parts in kept.parts.items()}
    )
    with _without_values(graph, kept.parts):
        content = ir.to_proto(graph).SerializeToString(deterministic=True)
    for entry in (_PARTS, _KEY):
        graph.metadata_props.pop(entry)
    with contextlib.suppress(OSError, OutputError), OutputSet(force=True, listed=False) as outputs:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        seal.write_onnx(outputs.stage(path), content)
        outputs.commit()
        _make_room(folder)


@contextlib.contextmanager
def _without_values(graph: ir.Model, names: Mapping[str, object]) -> Iterator[None]:
    before: dict[str, Any] = {}
    for name in names:
        value = graph.graph.initializers[name]
        assert value.shape is not None
        assert value.dtype is not None
        before[name] = value.const_value
        value.const_value = ir.ExternalTensor(
            _NOWHERE, 0, 0, value.dtype, shape=value.shape, name=str(value.name)
        )
    try:
        yield
    finally:
        for name, tensor in before.items():
            graph.graph.initializers[name].const_value = tensor


def _folder() -> Path | None:
    """Return the folder; None for a user without a home, and if others can write to it."""
    chosen = chosen_folder()
    try:
        folder = chosen / "captures" if chosen else cache_folder("captures")
    except RuntimeError:
        return None
    # What an entry says of a model's weights can't be checked without tracing the model again.
    return folder if is_private(folder) else None


def _make_room(folder: Path) -> None:
    # Other files there are the user's.
    own = [path for path in listed(folder, "*.onnx") if _NAME.fullmatch(path.stem)]
    for path in sorted(own, key=lambda path: path.stat().st_mtime)[:-_MOST]:
        path.unlink()
