"""Read the claims of a set's files about each other, from each kind of file that we write.

A manifest, an engine record, the config of an Edge-LLM folder and a demo's report list ``files``; a graph
names its data in its metadata; a kit has ``SHA256SUMS``. None of it is trusted: files are looked up only in
the folder, and a claim counts only if a hash confirms it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.engines.record import EngineRecord
from lora_export.errors import BackendError, GraphError, LoraExportError
from lora_export.formats.reading.weights_files import EDGE_LLM_NAME
from lora_export.graph.data_identity import external_tensors, read_identity
from lora_export.storage.hashes import FileHash
from lora_export.storage.sums.listed import NAME as SUMS
from lora_export.storage.sums.listed import read_sums
from lora_export.storage.sums.seal import find_seal
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import FieldError, from_plain
from lora_export.untrusted.links import leads_out
from lora_export.untrusted.places import is_file

MANIFEST_SUFFIX, MANIFEST_NAME = ".lora.json", "lora.json"
# Of a folder for TensorRT-Edge-LLM: it lists the weights, and they can't be loaded without it.
_EDGE_LLM_CONFIG = "config.json"
# Of `lora-export demo`; it lists all that the demo wrote.
_DEMO_REPORT = "demo.json"
_SEALED = frozenset({".onnx", ".onnx_adapter", ".safetensors"})


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of one file about another.

    Attributes:
        place: Path of the other file from the folder of the first.
        blake3: Hash of the whole file; empty if not stated.
        sha256: Hash of the whole file or of a sample (`manifest.is_sampled`); empty if not stated.
        whole: True if ``sha256`` is of the whole file, whatever its size.
        size_bytes: Its size, if stated.
    """

    place: str
    blake3: str = ""
    sha256: str = ""
    whole: bool = False
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """The claims of a file about others.

    Attributes:
        claims: A claim for each of the other files.
        uses: Paths of files that it reads but has no hash of.
        problems: Problems of the description itself.
        is_unsealed: True if it describes others as only a sealed file does, but has no seal.
        identity: Identity of all claimed files together (`manifest.identity_of`), if only that is stated.
    """

    claims: tuple[Claim, ...] = ()
    uses: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    is_unsealed: bool = False
    identity: str = ""


@dataclass(frozen=True)
class _Listing:
    """The fields that are read from a manifest, an engine record or a report."""

    files: Mapping[str, FileHash] = field(default_factory=dict)


@dataclass(frozen=True)
class _Outputs:
    """The outputs in the manifest of an earlier version's merge."""

    graph: str = ""
    data: str = ""
    identity: str = ""


@dataclass(frozen=True)
class _Earlier:
    """A manifest without ``files``."""

    mode: str
    outputs: _Outputs


def description_of(path: Path, given: Path) -> Description | None:
    """Return the claims of a file about others; None if it is of a kind that has none.

    Args:
        path: A regular file.
        given: The folder or file that the user named, out of which no list of files may lead.
    """
    if path.name == SUMS or (path.suffix == ".json" and _may_list(path)):
        if problem := leads_out(path, given):
            return Description(problems=(f"it {problem}",))
        return _sums(path) if path.name == SUMS else _json(path)
    if path.name == _EDGE_LLM_CONFIG and _is_ours(path.parent / EDGE_LLM_NAME):
        return Description(problems=(f"it is not the config that {EDGE_LLM_NAME} was written with",))
    if path.suffix == ".onnx":
        return _graph(path)
    if path.name == EDGE_LLM_NAME and find_seal(path) is not None:
        return Description(claims=(Claim(place=_EDGE_LLM_CONFIG),))
    return None


def _sums(path: Path) -> Description:
    listed = read_sums(path)
    claims = tuple(Claim(place=name, sha256=sha256, whole=True) for name, sha256 in listed.files)
    return Description(claims=claims, problems=listed.problems)


def _may_list(path: Path) -> bool:
    """Return whether a JSON file is a list of files by its seal, its name, or the engine beside it."""
    return find_seal(path) is not None or _is_manifest(path) or is_file(path.with_suffix(".engine"))


def is_named_as_sealed(path: Path) -> bool:
    """Return whether a sealed file has a name that sealed files are written with.

    A seal tells that the file is as it was written, not where: a manifest under the name of a tokenizer is
    none. What another file describes has the name that it says.
    """
    if path.suffix != ".json":
        return path.suffix in _SEALED
    ours = path.name == _EDGE_LLM_CONFIG and _is_ours(path.parent / EDGE_LLM_NAME)
    return ours or path.name == _DEMO_REPORT or _is_manifest(path) or is_file(path.with_suffix(".engine"))


def _is_manifest(path: Path) -> bool:
    return path.name == MANIFEST_NAME or path.name.endswith(MANIFEST_SUFFIX)


def _json(path: Path) -> Description:
    sealed = find_seal(path) is not None
    try:
        data = read_json(path)
    except LoraExportError as error:
        return Description(problems=error.problems or (error.message,))
    if not isinstance(data, dict):
        return Description(problems=("it is not an object",))
    # A folder of TensorRT-Edge-LLM has its config's own keys at the top.
    ours = data["lora_export"] if isinstance(data.get("lora_export"), dict) else data
    if not sealed and "files" not in ours:
        return _earlier_manifest(data) if _is_manifest(path) else _earlier_record(path)
    try:
        listed = from_plain(_Listing, ours, known_only=False).files
    except FieldError as error:
        return Description(problems=error.problems, is_unsealed=not sealed)
    claims = [_claim(place, entry) for place, entry in listed.items()]
    return Description(claims=tuple(claims), is_unsealed=not sealed)


def _is_ours(weights: Path) -> bool:
    return is_file(weights) and find_seal(weights) is not None


def _claim(place: str, entry: FileHash) -> Claim:
    return Claim(
        place=place,
        blake3=entry.blake3,
        sha256=entry.sha256,
        whole=not entry.sampled,
        size_bytes=entry.size_bytes,
    )


def _earlier_record(path: Path) -> Description:
    """Return the claims of an earlier version's engine record: the engine's hash, but not its own."""
    try:
        record = EngineRecord.read(path)
    except BackendError as error:
        return Description(problems=error.problems or (error.message,))
    claim = Claim(place=record.name, sha256=record.sha256, whole=True, size_bytes=record.size_bytes)
    return Description(claims=(claim,))


def _earlier_manifest(data: dict[str, object]) -> Description:
    """Return the claims of an earlier version's manifest: its files and, for a merge, their identity."""
    try:
        outputs = from_plain(_Earlier, data, known_only=False).outputs
    except FieldError as error:
        return Description(problems=error.problems)
    places = [place for place in (outputs.graph, outputs.data) if place]
    return Description(claims=tuple(Claim(place=place) for place in places), identity=outputs.identity)


def _graph(path: Path) -> Description:
    from lora_export.graph.read_model import read_model

    try:
        model = read_model(path)
    except GraphError as error:
        return Description(problems=error.problems or (error.message,))
    used = {str(tensor.location) for _, tensor in external_tensors(model)}
    try:
        identity = read_identity(model.metadata_props, path)
    except GraphError as error:
        return Description(uses=tuple(sorted(used)), problems=error.problems or (error.message,))
    if identity is None:
        return Description(uses=tuple(sorted(used)))
    claims = [
        Claim(place=place, blake3=identity.blake3.get(place, ""), sha256=sha256)
        for place, sha256 in identity.files.items()
    ]
    if identity.manifest:
        claims.append(Claim(place=identity.manifest))
    unsealed = bool(identity.blake3) and find_seal(path) is None
    return Description(claims=tuple(claims), uses=tuple(sorted(used)), is_unsealed=unsealed)
