"""What the files of a set say of one another, read from each kind of file that we write.

A manifest, an engine's record, the config of an Edge-LLM folder and a demo's report list ``files``; a graph
names its data in its metadata; a kit has ``SHA256SUMS``. All of it is a stranger's word: places are looked up
in the folder alone, and nothing is believed but what a hash confirms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path

from lora_export.engines.record import EngineRecord
from lora_export.errors import BackendError, GraphError, LoraExportError
from lora_export.graph.data_identity import external_tensors, read_identity
from lora_export.storage.manifest import FileHash
from lora_export.storage.sums.seal import find_seal
from lora_export.untrusted.documents import MAX_BYTES, open_regular, read_json
from lora_export.untrusted.fields import FieldError, from_plain

SUMS = "SHA256SUMS"
MANIFEST_SUFFIX, MANIFEST_NAME = ".lora.json", "lora.json"
_SUM = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


@dataclass(frozen=True)
class Claim:
    """What one file says that another is.

    Attributes:
        place: Of the other, seen from the folder of the first.
        blake3: Of all of it; empty where it is not said.
        sha256: Of all or of a sample of it (`manifest.is_sampled`); empty where it is not said.
        whole: ``sha256`` is of all of it, however large it is.
        size_bytes: Its size, where it is said.
    """

    place: str
    blake3: str = ""
    sha256: str = ""
    whole: bool = False
    size_bytes: int | None = None


@dataclass(frozen=True)
class Description:
    """What a file says of others.

    Attributes:
        claims: One for each of them.
        uses: Places that it reads without saying what lies there.
        problems: What is wrong with the description itself.
        is_unsealed: It describes others as only a sealed file does, and has no seal.
        identity: Of all claims together (`manifest.identity_of`), where only that is said.
    """

    claims: tuple[Claim, ...] = ()
    uses: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    is_unsealed: bool = False
    identity: str = ""


@dataclass(frozen=True)
class _Listing:
    """What is read of a manifest, of a record and of a report."""

    files: Mapping[str, FileHash] = field(default_factory=dict)


@dataclass(frozen=True)
class _Outputs:
    """What a merge's manifest of an earlier version says of its outputs."""

    graph: str = ""
    data: str = ""
    identity: str = ""


@dataclass(frozen=True)
class _Earlier:
    """A manifest without ``files``."""

    mode: str
    outputs: _Outputs


def description_of(path: Path) -> Description | None:
    """Return what a file says of others; None where it is of no kind that does.

    Args:
        path: A regular file.
    """
    if path.name == SUMS:
        return _sums(path)
    if path.suffix == ".json":
        return _json(path)
    if path.suffix == ".onnx":
        return _graph(path)
    return None


def _sums(path: Path) -> Description:
    if path.stat().st_size > MAX_BYTES:
        return Description(problems=(f"it is larger than {MAX_BYTES} bytes",))
    with TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as file:
        text = file.read()
    lines = text.split("\n")
    found = [(line, _SUM.fullmatch(line)) for line in lines[:-1]]
    problems = [f"line {number + 1} is not a hash and a name" for number, (_, m) in enumerate(found) if not m]
    if lines[-1]:
        problems.append("its last line has no end")
    claims = tuple(Claim(match[2], sha256=match[1], whole=True) for _, match in found if match)
    return Description(claims, problems=tuple(problems))


def _json(path: Path) -> Description | None:
    sealed = find_seal(path) is not None
    named = path.name == MANIFEST_NAME or path.name.endswith(MANIFEST_SUFFIX)
    of_engine = path.with_suffix(".engine").is_file()
    if not (sealed or named or of_engine):
        return None
    try:
        data = read_json(path)
    except LoraExportError as error:
        return Description(problems=error.problems or (error.message,))
    if not isinstance(data, dict):
        return Description(problems=("it is not an object",))
    # A folder of TensorRT-Edge-LLM has its config's own keys at the top.
    ours = data["lora_export"] if isinstance(data.get("lora_export"), dict) else data
    if not sealed and "files" not in ours:
        return _earlier_manifest(data) if named else _earlier_record(path)
    try:
        listed = from_plain(_Listing, ours, known_only=False).files
    except FieldError as error:
        return Description(problems=error.problems, is_unsealed=not sealed)
    claims = [_claim(place, entry) for place, entry in listed.items()]
    return Description(tuple(claims), is_unsealed=not sealed)


def _claim(place: str, entry: FileHash) -> Claim:
    return Claim(place, entry.blake3, entry.sha256, not entry.sampled, entry.size_bytes)


def _earlier_record(path: Path) -> Description:
    """Return what an engine's record of an earlier version says: the engine's hash, nothing of itself."""
    try:
        record = EngineRecord.read(path)
    except BackendError as error:
        return Description(problems=error.problems or (error.message,))
    claim = Claim(record.name, sha256=record.sha256, whole=True, size_bytes=record.size_bytes)
    return Description((claim,))


def _earlier_manifest(data: dict[str, object]) -> Description:
    """Return what a manifest of an earlier version says: which files there are, of a merge their identity."""
    try:
        outputs = from_plain(_Earlier, data, known_only=False).outputs
    except FieldError as error:
        return Description(problems=error.problems)
    places = [place for place in (outputs.graph, outputs.data) if place]
    return Description(tuple(map(Claim, places)), identity=outputs.identity)


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
        Claim(place, identity.blake3.get(place, ""), sha256) for place, sha256 in identity.files.items()
    ]
    unsealed = bool(identity.blake3) and find_seal(path) is None
    return Description(tuple(claims), tuple(sorted(used)), is_unsealed=unsealed)
