"""Tell whether a file that nothing describes matters: whether a program may load it with the set beside it.

1. Every file matters but those of kinds that programs only show: texts, pictures, logs, our own reports. A
   list of kinds that are loaded would never be complete, since each runtime has its own.
2. Names are compared without upper and lower case, as some file systems do.
3. Files in hidden folders, and hidden ones, matter only if their kind is loaded: tools keep their own there
   (``.git``, ``.cache/huggingface``, our locks), and no program looks there by itself.
4. A link to a folder, a folder that can't be listed, and what is neither a file nor a folder, matters:
   nothing can be said of what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_export.errors import LoraExportError
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.places import is_file, is_link, walk

_SHOWN = {
    *(".md", ".txt", ".rst", ".pdf", ".html", ".css", ".csv", ".tsv", ".log", ".xml"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"),
}
_SHOWN_NAMES = {"license", "notice", "readme", "copying", "authors", "citation.cff"}
# Texts that tokenizers read.
_LOADED_NAMES = {"vocab.txt", "merges.txt"}
# Kinds that count in hidden places.
_LOADED = {
    *(".onnx", ".ort", ".data", ".onnx_data", ".onnx_adapter", ".safetensors", ".engine", ".plan"),
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".gguf", ".npz", ".npy", ".h5"),
    *(".so", ".dll", ".dylib", ".py", ".pyc", ".pyd", ".sh", ".cubin", ".ptx"),
}
# Keys of the reports of parity and bench (`ParityReport.as_dict`, `BenchReport.as_dict`); the largest file.
_PARITY = frozenset(
    {
        *("adapters", "candidate", "environment", "feeds", "format", "generated", "localisation"),
        *("metrics", "notes", "passed", "reference", "scatter", "seconds", "tolerance", "verdicts"),
    }
)
_BENCH = frozenset(
    {
        *("adapters", "confidence", "environment", "format", "kind", "load_average", "method", "models"),
        *("notes", "settings", "stopped_by", "swapping", "tables", "timed", "was_busy"),
    }
)
_MOST_REPORT_BYTES = 16 << 20


def files_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of a folder and what is wrong with each, if it can't be looked at (rule 4).

    Hidden ones are left out unless they matter.
    """
    closed: list[OSError] = []
    for folders, files in walk(folder, closed.append):
        for link in filter(is_link, folders):
            yield link, "it is a link to a folder"
        for file in files:
            if not is_file(file):
                # Locks of other programs may be sockets or links to nothing.
                if not _is_hidden(file, folder):
                    yield file, "it is not a regular file"
            elif not _is_hidden(file, folder) or matters(file, folder):
                yield file, ""
    for error in closed:
        yield Path(error.filename), f"it can't be listed: {error.strerror}"


def matters(file: Path, folder: Path) -> bool:
    """Return whether a file in a folder matters if nothing describes it."""
    name = file.name.lower()
    endings = {f".{ending}" for ending in name.split(".")[1:]}
    if _is_hidden(file, folder):
        return bool(endings & _LOADED)
    if name in _LOADED_NAMES or f".{name.rpartition('.')[2]}" not in {*_SHOWN, ".json"}:
        return name not in _SHOWN_NAMES
    return name.endswith(".json") and not _is_report(file)


def _is_hidden(file: Path, folder: Path) -> bool:
    inside = file.relative_to(folder).parts if file.is_relative_to(folder) else (file.name,)
    return any(part.startswith(".") for part in inside)


def _is_report(file: Path) -> bool:
    """Return whether a JSON file is a report of parity or bench: it has their keys and no others."""
    try:
        if file.stat().st_size > _MOST_REPORT_BYTES:
            return False
        data = read_json(file, surrogates=True)
    except (LoraExportError, OSError):
        return False
    return isinstance(data, dict) and data.keys() in (_PARITY, _BENCH)
