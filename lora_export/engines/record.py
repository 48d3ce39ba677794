"""The record beside an engine: ``<name>.<target>.json`` for ``<name>.<target>.engine``.

An engine file is in the compiler's own format, which only a supported GPU can open. Everything that must be
known before that (its inputs, its GPUs, the graph that it was made from) is in this record.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from lora_export.engines import BACKENDS, compiler_of
from lora_export.errors import BackendError
from lora_export.graph.exposed import LoraRecord
from lora_export.graph.port import MAX_AXES, Port
from lora_export.storage.hashes import FileHash
from lora_export.storage.inputs import note_inputs
from lora_export.storage.sums.full import file_digest
from lora_export.storage.sums.seal import SEAL, sealed_json
from lora_export.untrusted.documents import json_of, read_json
from lora_export.untrusted.fields import Count, FieldError, from_plain, seen
from lora_export.untrusted.places import is_file, is_folder

FORMAT = 2
KIND = "lora_export.engine"

_AGAIN = "build the engine again with lora-export build-engine"
Shape = Annotated[tuple[Count, ...], MAX_AXES]
# One tensor's smallest, usual and largest shape.
ShapeRange = tuple[Shape, Shape, Shape]


# Names of types in numpy and ml_dtypes: integers of 4 to 64 bits, signed and unsigned, and floats.
_ELEMENTS = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64"),
    *("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
}


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: the shapes that the engine takes.

    Attributes:
        name: Purpose: ``default``, ``prefill``, ``decode`` or the user's word.
        shapes: Smallest, usual and largest shape of each input whose shape varies.
    """

    name: str
    shapes: Mapping[str, ShapeRange]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of the compiler. All of them are part of the cache's key.

    Attributes:
        tf32: Allow 10-bit mantissas in float32 products; off, because it costs three decimal digits.
        weight_streaming: Allow the weights to stay in host memory while the engine runs.
        refit: Allow changes of the weights without another build (needs a GPU).
        strip_weights: Leave the weights out of the file; they are refitted before it runs (needs a GPU).
        version_compatible: Build for later minor versions too (classic TensorRT only).
        hardware_compatible: Build for Ampere and later GPUs, at some cost in speed (classic TensorRT only).
        optimization_level: 0–5; None is the compiler's own default.
        workspace_bytes: Limit of the scratch memory; None is the compiler's own.
    """

    tf32: bool = False
    weight_streaming: bool = False
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    optimization_level: Count | None = None
    workspace_bytes: Count | None = None


@dataclass(frozen=True)
class EngineSource:
    """The graph that an engine was made from.

    Attributes:
        name: File name.
        sha256: Hash of the graph as the compiler got it and of all its weights.
        files: The graph's file and its data files.
    """

    name: str
    sha256: str
    files: tuple[FileHash, ...]


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """The record of one engine.

    Attributes:
        name: File name of the engine.
        sha256: Hash of the engine file.
        size_bytes: Size of the engine file.
        backend: ``tensorrt-rtx`` or ``tensorrt``.
        builder_version: Version of the compiler's package.
        targets: Names of GPUs as the user gave them: ``rtx-4090`` …
        compute_capabilities: Compute capabilities of these GPUs: ``8.9`` …
        platform: Operating system and processor that it runs on: ``linux-x86_64``.
        options: Options of the compiler.
        inputs: All inputs, LoRA's too.
        outputs: All outputs.
        profiles: Optimisation profiles, at least one.
        source: The graph that it was made from.
        exposed: LoRA record of the graph; None for a base or a merged graph.
        metadata: The graph's own metadata, without the LoRA record.
        notes: Changes to the graph for the compiler.
        memory: Bytes, as the compiler states them: ``weights``, ``activations`` (scratch included).
        build_s: Seconds that the compiler took.
        peak_build_bytes: Peak memory of the build.
        files: The engine and the builder's messages, by name, with full hashes; empty in records of earlier
            versions.
    """

    name: str
    sha256: str
    size_bytes: Count
    backend: str
    builder_version: str
    targets: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    platform: str
    options: BuildOptions
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    profiles: tuple[Profile, ...]
    source: EngineSource
    exposed: LoraRecord | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: Mapping[str, Count] = field(default_factory=dict)
    build_s: float = 0.0
    peak_build_bytes: Count = 0
    files: Mapping[str, FileHash] = field(default_factory=dict)
    format: int = FORMAT
    kind: str = KIND

    def save(self, path: Path) -> None:
        """Write the record, sealed."""
        text = self.to_json()
        # Nothing is written that our own readers refuse.
        EngineRecord.from_json(text, str(path))
        path.write_bytes(sealed_json(text))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the record as indented JSON with sorted keys, without a seal."""
        return json.dumps(self.as_dict(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> EngineRecord:
        """Read what `save` or `to_json` wrote.

        Args:
            text: The JSON.
            where: The file, for messages.

        Raises:
            BackendError: The text is not an engine record, is damaged, or is of another version.
        """
        return cls._from_data(json_of(text, where, BackendError, _AGAIN), where)

    @classmethod
    def read(cls, path: Path, given: Path | None = None) -> EngineRecord:
        """Read a record's file.

        Args:
            path: The file.
            given: Path that the user named, if the record was only looked for beside or in it; see
                `read_json`.

        Raises:
            BackendError: The file can't be read, or as in `from_json`.
        """
        return cls._from_data(read_json(path, BackendError, _AGAIN, given=given), str(path))

    @classmethod
    def _from_data(cls, data: Any, where: str) -> EngineRecord:
        if not isinstance(data, dict) or not {"kind", "format"} <= data.keys():
            raise BackendError(
                f"{where} is not a record of an engine: it has no 'kind' or no 'format'", _AGAIN
            )
        if data["kind"] != KIND or data["format"] != FORMAT:
            raise BackendError(
                f"{where} is a record of kind {seen(data['kind'])}, format {seen(data['format'])}; "
                f"this version reads {KIND!r}, format {FORMAT}",
                _AGAIN,
            )
        exposed, problems = data.get("exposed"), list[str]()
        # The LoRA record has rules of its own.
        try:
            lora = None if exposed is None else LoraRecord.from_data(exposed)
        except FieldError as error:
            problems += (f"exposed.{problem}" for problem in error.problems)
        try:
            plain = {key: value for key, value in data.items() if key != SEAL}
            record = from_plain(cls, {**plain, "exposed": None})
            problems += _contradictions(record)
        except FieldError as error:
            problems += error.problems
        if problems:
            raise BackendError(f"{where} is not a record of an engine, or a damaged one", _AGAIN, problems)
        return replace(record, exposed=lora)

    def port(self, name: str) -> Port:
        """Return an input or output by name; KeyError if there is none."""
        return {port.name: port for port in (*self.inputs, *self.outputs)}[name]


def _contradictions(record: EngineRecord) -> list[str]:
    """Return the contradictions between parts of a record."""
    problems = [] if record.profiles else ["profiles: there is none, wanted at least one"]
    ports = {}
    for key, entries in (("inputs", record.inputs), ("outputs", record.outputs)):
        for i, port in enumerate(entries):
            ports[port.name] = port
            if port.dtype not in _ELEMENTS:
                problems.append(f"{key}[{i}].dtype: {seen(port.dtype)}, wanted a type of numpy or ml_dtypes")
    for i, profile in enumerate(record.profiles):
        for name, shapes in profile.shapes.items():
            where = f"profiles[{i}].shapes[{seen(name)}]"
            if name not in ports:
                problems.append(f"{where}: the engine has no such input")
            elif {len(shape) for shape in shapes} != {len(ports[name].dims)}:
                axes = ", ".join(str(len(shape)) for shape in shapes)
                problems.append(f"{where}: {axes} axes, the input has {len(ports[name].dims)}")
    return problems


def platform_here() -> str:
    """Return the platform of engines built on this machine: ``linux-x86_64``."""
    return f"{platform.system()}-{platform.machine()}".lower()


def record_path(engine: Path) -> Path:
    """Return where an engine's record is."""
    return engine.with_suffix(".json")


def is_engine(path: Path) -> bool:
    """Return whether a file has an engine's first bytes or file ending."""
    if path.suffix in (".engine", ".plan"):
        return True
    if not is_file(path):
        return False
    with path.open("rb") as file:
        begin = file.read(4)
    return any(begin == compiler_of(backend).magic for backend in BACKENDS)


def read_engine(engine: Path) -> EngineRecord:
    """Read an engine's record and check that it describes this file.

    Raises:
        BackendError: The engine or its record is missing or damaged, or they don't belong together.
    """
    if not is_file(engine):
        if is_folder(engine):
            raise BackendError(f"{engine} is a folder, not an engine", "give the .engine file")
        raise BackendError(f"no engine at {engine}", "check the path")
    beside = record_path(engine)
    note_inputs([engine, beside])
    if not is_file(beside):
        raise BackendError(
            f"{engine} has no record beside it ({beside.name})",
            "keep the two files together; lora-export reads engines that lora-export build-engine wrote",
        )
    record = EngineRecord.read(beside, engine)
    size = engine.stat().st_size
    if size != record.size_bytes:
        raise BackendError(
            f"{engine} has {size} bytes, its record says {record.size_bytes}: "
            + ("it is cut short" if size < record.size_bytes else "it is another file"),
            "copy both files again, or build the engine again",
        )
    kind, wanted = "sha256", record.sha256
    if (own := record.files.get(engine.name)) and own.blake3:
        kind, wanted = "blake3", own.blake3
    if (found := file_digest(engine, kind)) != wanted:
        raise BackendError(
            f"{engine} is not what {beside.name} describes: {kind} {found}, wanted {wanted}",
            "copy both files again, or build the engine again",
        )
    return record
