"""Write a quantised graph: the graph, its data, the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.base.history.history import EARLIER
from lora_export.graph.data_identity import mark_data
from lora_export.graph.exposed import KEY, lora_record_of
from lora_export.graph.external_data import plan_data, write_data
from lora_export.graph.onnx_file import GraphFile, byte_size, save_graph
from lora_export.machines.packages import package_versions
from lora_export.modes.quantising.quantise import QuantisedWeights, Quantising, packages_of
from lora_export.storage.hashes import FileHash, hash_content, hash_written, identity_of, identity_of_graph
from lora_export.storage.inputs import note_inputs
from lora_export.storage.manifest import Manifest
from lora_export.storage.outputs import OutputSet, output_errors
from lora_export.untrusted.links import leads_out
from lora_export.untrusted.places import is_there

_NO_PLAN: dict[str, Any] = {"rows": [], "notes": [], "warnings": []}


@dataclass(frozen=True, kw_only=True)
class QuantiseReport:
    """Result of quantising, or with ``dry_run`` the result that it would have.

    Attributes:
        quantised: The plan for each weight, and what it cost.
        outputs: Files that were (or would be) written: ``graph``, ``data``, ``manifest``.
        size_bytes: Size of the written weights.
        before_bytes: Size of the weights before.
        dry_run: True if nothing was written.
    """

    quantised: QuantisedWeights
    outputs: dict[str, Path]
    size_bytes: int
    before_bytes: int
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "outputs": {name: str(path) for name, path in self.outputs.items()},
            "dry_run": self.dry_run,
            "size_bytes": self.size_bytes,
            "before_bytes": self.before_bytes,
            "quantised": self.quantised.as_dict(),
        }


def weight_bytes(graph: GraphFile) -> int:
    """Return the size of all constants of a graph."""
    tensors = (value.const_value for value in graph.initializers())
    return sum(byte_size(tensor) for tensor in tensors if tensor is not None)


def write_quantised(
    quantising: Quantising,
    report: QuantiseReport,
    *,
    mode: str,
    base: Sequence[FileHash],
    outputs: OutputSet,
    before: Manifest | None = None,
    beside: Mapping[str, bytes] | None = None,
    progress: Callable[[int], None] | None = None,
) -> QuantiseReport:
    """Write the graph of a report, and return the report with what it cost.

    Args:
        quantising: The graph.
        report: Report of a dry run.
        mode: Name of the mode, for the manifest.
        base: Files that the weights come from.
        outputs: Set that the files become a part of; the caller commits it.
        beside: Name → content of files that belong beside the graph, which the caller has staged.
        before: Manifest of the float graph, whose adapters and plan hold for this one too.
        progress: Function that is called with the number of bytes just written.
    """
    graph, paths = quantising.graph, report.outputs
    out, name = paths["graph"], paths["data"].name
    slots, size, _ = plan_data(graph, {}, out, set())
    with output_errors(out):
        staged = {kind: outputs.stage(path) for kind, path in paths.items()}
        write_data(staged["data"], name, slots, size=size, changes={}, rounding="off", progress=progress)
        report = replace(report, quantised=quantising.finished(), size_bytes=size, dry_run=False)
        own = {name: hash_written(staged["data"], name)}
        mark_data(graph.model, own, paths["manifest"].name)
        save_graph(graph.model, staged["graph"])
        own[out.name] = hash_written(staged["graph"], out.name)
        own |= {kind: hash_content(kind, content) for kind, content in (beside or {}).items()}
        manifest = before or Manifest(mode=mode, base=[], adapters=[], plan=_NO_PLAN, rounding={})
        written: dict[str, Any] = {kind: path.name for kind, path in paths.items()}
        written |= {"identity": identity_of(own[entry] for entry in (name, out.name))}
        if EARLIER in manifest.outputs:
            written[EARLIER] = manifest.outputs[EARLIER]
        replace(
            manifest,
            mode=mode,
            base=list(base),
            outputs=written,
            versions={"lora-export": __version__} | package_versions(packages_of(report.quantised)),
            exposed=_exposed(graph),
            files=own,
            quantised=report.quantised.as_dict(),
        ).save(staged["manifest"])
    return report


def _exposed(graph: GraphFile) -> dict[str, Any]:
    metadata = graph.model.metadata_props
    return asdict(lora_record_of(metadata, str(graph.path))) if KEY in metadata else {}


def manifest_of(graph: Path) -> Manifest | None:
    """Return the manifest beside a graph, if it was written for exactly this graph and its data.

    Raises:
        GraphError: The manifest is damaged.
    """
    path = graph.with_suffix(".lora.json")
    if not is_there(path) or leads_out(path, graph):
        return None
    note_inputs([path])
    manifest = Manifest.read(path, graph)
    data = graph.parent / Path(str(manifest.outputs.get("data"))).name
    return manifest if manifest.outputs.get("identity") == identity_of_graph(graph, data) else None
