"""Describe a graph, a manifest, an engine, a kit or a folder for onnxruntime-genai by its own metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.plan import align
from lora_export.reports.merge import size_text
from lora_export.untrusted.places import exists, is_file, is_folder, listed
from lora_export.untrusted.shown import command, limited

if TYPE_CHECKING:
    import onnx_ir as ir

    from lora_export.engines.record import EngineRecord
    from lora_export.graph.exposed import LoraRecord
    from lora_export.graph.onnx_file import GraphFile
    from lora_export.graph.quantised import QuantisedRecord
    from lora_export.runtimes.model_file import ModelFile

# Number of operators, inputs and slots that are named; the others are counted.
_NAMED = 8
_MANIFEST, _RECORD, _GENAI = ".lora.json", "record.json", "genai_config.json"


@dataclass(frozen=True)
class Artefact:
    """Description of one file or folder.

    Attributes:
        kind: ``graph``, ``manifest``, ``engine``, ``kit`` or ``genai folder``.
        facts: Plain data, as `inspect --json` prints it; for an engine, its record.
        lines: The facts as text.
    """

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"kind": self.kind, **self.facts}


def read_artefact(path: Path) -> Artefact | None:
    """Describe a file or folder that is not an adapter by its name and content; return None if it may be one.

    Raises:
        GraphError: A graph or a manifest is damaged.
        BackendError: An engine's record is damaged.
        PackageError: A folder's genai_config.json is damaged.
    """
    from lora_export.engines.record import is_engine

    if is_folder(path):
        if exists(path / "adapter_config.json"):
            return None
        if is_file(path / _RECORD) and is_file(path / "build.sh"):
            return _kit(path)
        return _genai(path, path) if is_file(path / _GENAI) else None
    # ONNX Runtime's own format is refused by its name.
    if path.suffix in (".onnx", ".ort") or is_engine(path):
        return _model(path)
    if path.name.endswith(_MANIFEST):
        return _manifest(path)
    if path.name == _GENAI:
        return _genai(path.parent, path)
    return _json(path) if path.suffix == ".json" else None


def _json(path: Path) -> Artefact | None:
    """Describe an engine's record or a folder's manifest; return None for other JSON."""
    from lora_export.engines.record import KIND
    from lora_export.errors import GraphError
    from lora_export.untrusted.documents import read_json

    data = read_json(path, GraphError, "give a file that lora-export wrote, or an adapter")
    if isinstance(data, dict) and data.get("kind") == KIND:
        return _record("engine", path, path)
    return _manifest(path) if isinstance(data, dict) and {"mode", "plan", "base"} <= data.keys() else None


# --- models ------------------------------------------------------------------------------------------


def _model(path: Path) -> Artefact:
    from lora_export.engines.record import EngineRecord
    from lora_export.runtimes.model_file import ModelFile
    from lora_export.storage.inputs import same_inputs

    with same_inputs(at_end=True):
        file = ModelFile.read(path)
        if isinstance(file.content, EngineRecord):
            return _of_record("engine", file.content)
        data = {data.name: data.stat().st_size for data in sorted(file.content.data_files())}
    return _graph(file, file.content, data)


def _graph(file: ModelFile, graph: GraphFile, data: Mapping[str, int]) -> Artefact:
    from lora_export.base.history.in_graph import adapters_in, merged_in
    from lora_export.graph.proof import Proof
    from lora_export.graph.quantised import quantised_in

    path, exposed, captured = file.path, file.lora_record, file.captured
    merged = merged_in(graph.model.metadata_props)
    proof = Proof.from_metadata(graph.model.metadata_props)
    quantised = [_quantised(record) for record in quantised_in(graph.model.metadata_props)]
    size = path.stat().st_size + sum(data.values())
    operators = Counter(node.op_type for each in graph.graphs() for node in each)
    facts: dict[str, Any] = {
        "size_bytes": size,
        "data": data,
        "opsets": dict(graph.model.opset_imports),
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "inputs": _ports(graph, exposed),
        "outputs": [_port(value) for value in graph.graph.outputs],
        "captured": None if captured is None else vars(captured),
        "proof": None if proof is None else vars(proof),
        "quantised": quantised,
        "merged": [f"{name}, sha256 {sha256}" for name, sha256 in adapters_in(merged)],
        "lora": _lora(exposed, graph),
    }
    opsets = ", ".join(f"{name or 'ai.onnx'} {number}" for name, number in facts["opsets"].items())
    lines = [
        f"graph     {path.name}, {size_text(size)}" + (f" with {', '.join(data)}" if data else ""),
        f"opsets    {opsets}",
        f"nodes     {facts['nodes']}: {_counted(operators.most_common())}",
    ]
    if captured is not None:
        cache = ", with a key-value cache" if captured.kv_cache else ""
        padding = ", rows padded on the right only" if captured.padding == "right" else ""
        lines.append(f"captured  {captured.kind}, {captured.dtype}{cache}{padding}")
    if proof is not None:
        lines.append(f"proof     {proof}")
    lines += limited([f"quantised {_quantised_text(entry)}" for entry in quantised], "times", _NAMED)
    lines += [f"merged    {entry}" for entry in limited(facts["merged"], "adapters", _NAMED)]
    lines += _lora_lines(exposed)
    if facts["lora"] and (lost := len(facts["lora"]["lost_inputs"])):
        lines.append(f"changed   {lost} of its LoRA inputs became constants: no adapter fits it any more")
    for kind in ("inputs", "outputs"):
        rows = [(kind, "dtype", "shape")]
        rows += [(port["name"], port["dtype"], _dims(port["dims"])) for port in facts[kind]]
        lines += limited(align(rows), kind, _NAMED + 1)
    manifest = path.with_name(f"{path.stem}{_MANIFEST}")
    if is_file(manifest):
        words = ["lora-export", "inspect", manifest]
        lines.append(f"manifest  {manifest.name}: {command(words) or 'inspect it'}")
    return Artefact("graph", facts, tuple(lines))


def _quantised(record: QuantisedRecord) -> dict[str, Any]:
    return {
        "to": record.to,
        "method": record.method,
        "block_size": record.block_size,
        "symmetric": record.symmetric,
        "weights": len(record.weights),
        "relative_error": record.relative,
    }


def _quantised_text(entry: Mapping[str, Any]) -> str:
    form = "symmetric" if entry["symmetric"] else "with zero points"
    how = f"{entry['method']}, blocks of {entry['block_size']}, {form}"
    return f"{entry['weights']} weights to {entry['to']} ({how}), error {entry['relative_error']:.2%} of them"


def _port(value: ir.Value) -> dict[str, Any]:
    shape = () if value.shape is None else value.shape
    dims = [dim if isinstance(dim, int) else dim.value or "?" for dim in shape]
    dims_known = None if value.shape is None else dims
    return {"name": str(value.name), "dtype": _type_text(value.type), "dims": dims_known}


def _type_text(kind: ir.TypeProtocol | None) -> str:
    """Return a tensor's dtype as numpy names it; of another type also what it is: ``sequence of float32``."""
    import onnx_ir as ir

    words = []
    while isinstance(kind, ir.SequenceType | ir.OptionalType):
        words.append("sequence of" if isinstance(kind, ir.SequenceType) else "optional")
        kind = kind.elem_type
    if isinstance(kind, ir.SparseTensorType):
        words.append("sparse")
    dtype = None if kind is None else kind.dtype
    if dtype in (None, ir.DataType.UNDEFINED):
        name = "unknown"
    else:
        # numpy has no dtype of texts of any length.
        name = "string" if dtype == ir.DataType.STRING else np.dtype(dtype.numpy()).name
    return " ".join([*words, name])


def _ports(graph: GraphFile, exposed: LoraRecord | None) -> list[dict[str, Any]]:
    """Return the inputs that a request feeds, without LoRA's, which are in the LoRA record."""
    lora = set(exposed.input_names()) if exposed else set()
    held = lora | set(graph.graph.initializers)
    return [_port(value) for value in graph.graph.inputs if str(value.name) not in held]


def _dims(dims: Sequence[int | str] | None) -> str:
    return "unknown" if dims is None else f"[{', '.join(map(str, dims))}]"


def _counted(counts: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{count} {name}" for name, count in counts[:_NAMED])
    left = sum(count for _, count in counts[_NAMED:])
    return f"{named}, {left} others" if left else named


def _lora(exposed: LoraRecord | None, graph: GraphFile) -> dict[str, Any] | None:
    if exposed is None:
        return None
    # Simplifiers take an input that has a default for a constant.
    inputs = {str(value.name) for value in graph.graph.inputs}
    return {
        "mode": exposed.mode,
        "base": exposed.base,
        "modules": [member.path for module in exposed.modules for member in module.members],
        "max_rank": exposed.max_rank,
        "flavour": exposed.flavour,
        "slots": [slot.name for slot in exposed.slots],
        "lost_inputs": [name for name in exposed.input_names() if name not in inputs],
    }


def _lora_lines(exposed: LoraRecord | None) -> list[str]:
    if exposed is None:
        return ["LoRA      none exposed (a base or merged model)"]
    from lora_export.reports.engine import exposed_lines

    text = exposed_lines(exposed)[0].removeprefix("LoRA: ")
    return [f"LoRA      {text}, over {exposed.base}"]


# --- manifests, engines, kits, folders ---------------------------------------------------------------


def _manifest(path: Path) -> Artefact:
    from lora_export.storage.manifest import Manifest

    manifest = Manifest.read(path)
    facts = asdict(manifest)
    files = [f"{entry.name} ({size_text(entry.size_bytes)})" for entry in manifest.base]
    lines = [
        f"manifest  {path.name} of {manifest.mode}",
        f"base      {', '.join(limited(files, 'files', _NAMED))}",
    ]
    lines += limited([f"adapter   {_adapter(entry)}" for entry in manifest.adapters], "adapters")
    rows = manifest.plan.get("rows", [])
    actions = Counter(str(row.get("action")) for row in rows)
    if actions:
        counts = [f"{count} {action}" for action, count in actions.most_common()]
        lines.append(f"plan      {', '.join(limited(counts, 'kinds', _NAMED))}")
    written = [f"file      {name} ({size_text(entry.size_bytes)})" for name, entry in manifest.files.items()]
    lines += limited(written, "files")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return Artefact("manifest", facts, (*lines, f"versions  {versions}"))


def _adapter(entry: Mapping[str, Any]) -> str:
    weight = entry.get("weight", 1)
    times = f", weight {weight:g}" if isinstance(weight, int | float) and weight != 1 else ""
    return f"{entry.get('name')} ({entry.get('format')}{times}), sha256 {entry.get('sha256')}"


def _record(kind: str, record: Path, given: Path) -> Artefact:
    from lora_export.engines.record import EngineRecord

    return _of_record(kind, EngineRecord.read(record, given))


def _of_record(kind: str, record: EngineRecord) -> Artefact:
    from lora_export.reports.engine import record_lines

    return Artefact(kind, record.as_dict(), tuple(record_lines(record)))


def _kit(path: Path) -> Artefact:
    from lora_export.reports.engine import build_line

    kit = _record("kit", path / _RECORD, path)
    how = f"kit       not built yet: copy the folder to the device, then: {build_line(path)}"
    built = [file.name for file in listed(path, "*.engine")]
    first = f"kit       built here: {', '.join(built)}" if built else how
    return Artefact("kit", {"record": kit.facts, "built": built}, (first, *kit.lines))


def _genai(path: Path, given: Path) -> Artefact:
    from lora_export.errors import PackageError
    from lora_export.untrusted.documents import read_json

    hint = "have onnxruntime-genai's builder write it again"
    config = read_json(path / _GENAI, PackageError, hint, given=given)
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        raise PackageError(f"{path / _GENAI} has no 'model' that is an object", "give the folder of a model")
    parts = {name: part for name, part in model.items() if isinstance(part, dict) and "filename" in part}
    adapters = [file.name for file in listed(path, "*.onnx_adapter")]
    facts = {"config": config, "adapters": adapters}
    lines = [
        f"folder    {path.name}, for onnxruntime-genai",
        f"model     {model.get('type')}, context of {model.get('context_length')} tokens, "
        f"vocabulary of {model.get('vocab_size')}",
    ]
    lines += limited(
        [
            f"{name:<9} {part['filename']}{_absence(path, str(part['filename']))}"
            for name, part in parts.items()
        ],
        "parts",
    )
    lines += limited([f"adapter   {name}" for name in adapters], "adapters")
    return Artefact("genai folder", facts, tuple(lines))


def _absence(folder: Path, name: str) -> str:
    """Return what is wrong with a file that a config names, or ""; nothing is looked for elsewhere."""
    from lora_export.untrusted.links import leads_out

    if "\0" not in name and leads_out(folder / name, folder):
        return ", which is not in the folder"
    return "" if is_file(folder / name) else ", which is missing"
