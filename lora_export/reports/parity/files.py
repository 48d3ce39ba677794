"""Refuse paths to which the reports of a parity check must not be written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.base.reads import folder_files
from lora_export.errors import LoraExportError, OutputError
from lora_export.formats.reading.weights_files import files_of
from lora_export.graph.onnx_file import load_graph
from lora_export.reports.files import ReportFile, ending_problem
from lora_export.storage.outputs import places_of, replaced_inputs
from lora_export.untrusted.places import exists, is_file, is_folder, is_link

# Endings of files beside a graph or an engine that share its stem.
_BESIDE = {".onnx": (".lora.json",), ".engine": (".lora.json", ".json", ".log")}
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".data")
_CONFIGS = (_ADAPTER_CONFIG, "config.json")


@dataclass(frozen=True, kw_only=True)
class ReadFiles:
    """Files that a check reads, which no report may replace.

    Attributes:
        candidate: Graph or engine.
        reference: Folder or file.
        base: The graph without the adapter.
        feeds: File of inputs.
        baseline: An earlier report.
        adapters: Folders and files.
    """

    candidate: Path
    reference: Path
    base: Path | None = None
    feeds: Path | None = None
    baseline: Path | None = None
    adapters: tuple[Path, ...] = ()

    def files(self) -> list[Path]:
        """Return every file that the check reads."""
        models = [path for path in (self.candidate, self.reference, self.base) if path is not None]
        found = [path for path in (self.feeds, self.baseline) if path is not None]
        for path in models:
            found += folder_files(path) if is_folder(path) else [path, *sorted(_data_of(path))]
        return [*found, *(file for adapter in self.adapters for file in files_of(adapter))]


def check_outputs(outputs: Sequence[ReportFile], force: bool, inputs: ReadFiles) -> None:
    """Refuse reports that could not be written, before anything is run.

    Raises:
        OutputError: Two reports have one path, or a report has an unknown ending, would replace a file that
            the check reads, is in a folder that can't be written, or exists without ``force``. All problems
            are listed.
    """
    problems: list[str] = []
    hints: set[str] = set()
    seen: dict[Path, str] = {}
    for file in outputs:
        known = file.path.resolve()
        if known in seen:
            problems.append(f"{seen[known]} and {file.option} are both {file.path}")
            hints.add("give each a path of its own")
        seen[known] = file.option
        if why := _refused(file.path, inputs):
            problems.append(f"{file}{why}")
            hints.add("give a path at which a file can be written")
        elif why := ending_problem("parity", file):
            problems.append(why)
            hints.add("give a name with such an ending")
        elif _there(file.path) and not force:
            problems.append(f"{file} exists")
            hints.add("choose another name, or give --force")
    if problems:
        raise OutputError("the reports can't be written", "; ".join(sorted(hints)), problems)


def _refused(path: Path, inputs: ReadFiles) -> str:
    """Return the reason why a report can't have this path; "" if it can."""
    if is_folder(path):
        return " is a folder"
    if any(is_file(parent) for parent in path.parents):
        return " lies below a file, not in a folder"
    if what := next(_read_as(path, inputs), ""):
        # Not even with --force.
        return f" is {what}"
    folder = next(parent for parent in path.absolute().parents if exists(parent))
    if not os.access(folder, os.W_OK | os.X_OK):
        return f" can't be written: you may not write to {folder}"
    return ""


def _read_as(path: Path, inputs: ReadFiles) -> Iterator[str]:
    """Yield the roles in which the check reads the file at a path."""
    places = places_of(path)
    named = {
        "the baseline": inputs.baseline,
        "the candidate": inputs.candidate,
        "the reference": inputs.reference,
        "the graph of --base": inputs.base,
        "the file of --feeds": inputs.feeds,
    }
    given = [(name, file) for name, file in named.items() if file is not None]
    given += [("the adapter", adapter) for adapter in inputs.adapters]
    for name, file in given:
        if places & places_of(file):
            yield f"{name} itself"
        elif is_folder(file):
            # A new file there replaces nothing. In deeper folders a model reads only configs and weights, so
            # a report may be there.
            inside = [place for place in places if file.resolve() in place.parents]
            if _there(path) and any(
                place.parent == file.resolve() or place.name in _CONFIGS or place.suffix in _WEIGHTS
                for place in inside
            ):
                yield f"a file of {name}, {file}"
        elif any(_goes_with(place, own, name) for place in places for own in places_of(file)):
            yield f"a file of {name}, {file}, or would be taken for one"
        elif file.suffix == ".onnx" and _there(path) and places & _data_of(file):
            yield f"data of {name}, {file}"
    # This finds hard links too.
    yield from (f"{file}, which the check reads" for file in replaced_inputs(path, inputs.files()))


def _goes_with(path: Path, file: Path, name: str) -> bool:
    """Return True if a path names an adapter's config, or a graph's external data, manifest or record."""
    if path.parent != file.parent:
        return False
    if name == "the adapter":
        return path.name == _ADAPTER_CONFIG
    endings = _BESIDE.get(file.suffix, ())
    return bool(endings) and (
        path.name.startswith(file.name) or path.name in {file.stem + ending for ending in endings}
    )


def _data_of(graph: Path) -> set[Path]:
    if graph.suffix != ".onnx":
        return set()
    try:
        return {place for file in load_graph(graph).data_files() for place in places_of(file)}
    except LoraExportError:  # reported when it is opened
        return set()


def _there(path: Path) -> bool:
    return exists(path) or is_link(path)
