"""Write a folder that onnxruntime-genai runs: the graph, its ``genai_config.json``, the tokenizer's files.

Its model builder writes these files beside the base. A graph made from that base can run in its place once
they lie beside it too: the config names the graph's own inputs only, and LoRA inputs with an empty default
need no entry. Other graphs, weights, adapters, folders, and our manifests are not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import PackageError
from lora_export.storage.beside import without_equal
from lora_export.storage.inputs import note_inputs
from lora_export.storage.outputs import refuse_replacing
from lora_export.untrusted.documents import open_regular, read_json
from lora_export.untrusted.json_text import json_text
from lora_export.untrusted.links import link_problems
from lora_export.untrusted.places import is_file, is_folder

CONFIG = "genai_config.json"
# Files that hold tokenizers, chat templates and processors.
_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
_MANIFEST = ".lora.json"
# The largest file that is copied, some times as large as any tokenizer's, and all of them: they are held in
# memory until the whole set is written.
_MOST_BYTES, _MOST_TOGETHER = 128 << 20, 256 << 20


@dataclass(frozen=True)
class Companions:
    """Files to write beside a graph.

    Attributes:
        files: Name → content; the config last, because without it onnxruntime-genai refuses the folder. They
            are one set with the graph.
        output: The graph that they belong to.
        notes: Notes for the user.
        force: Replace files that differ.
    """

    files: dict[str, bytes]
    output: Path
    notes: tuple[str, ...] = ()
    force: bool = False

    def check(self, reads: Iterable[Path] = ()) -> None:
        """Raise `OutputError` naming every file that would not be replaced.

        Args:
            reads: Files that were read; none of them is replaced, even with ``force``.
        """
        files = {self.output.parent / name: content for name, content in self.files.items()}
        refuse_replacing(list(without_equal(files)), self.force, reads)


def companions_of(base: Path, output: Path, force: bool = False) -> Companions:
    """Return the files needed beside ``output`` so that onnxruntime-genai runs it in place of ``base``.

    There are none if no ``genai_config.json`` lies beside ``base``, or one that runs another graph.

    Args:
        base: The base's ONNX file.
        output: The graph made from it.
        force: Replace existing files with other content.

    Raises:
        PackageError: The config beside the base can't be read, or a file is a link out of the folder.
    """
    nothing = Companions({}, output)
    config_path = base.parent / CONFIG
    if is_folder(base) or not is_file(config_path):
        return nothing
    note_inputs([config_path])
    config = _read(config_path, base)
    named = list(_graphs(config))
    if base.name not in named:
        return nothing
    if output.parent.resolve() == base.parent.resolve():
        # The config there belongs to the base; we don't change which graph it runs.
        note = f"{config_path} runs {base.name}; to run {output.name}, put that name there"
        return Companions({}, output, (note,))
    beside = [
        path
        for path in sorted(base.parent.iterdir())
        if path.suffix in _SUFFIXES and not path.name.endswith(_MANIFEST) and is_file(path)
    ]
    if problems := link_problems(base.parent, beside):
        raise PackageError(
            f"files beside {base} would be copied from somewhere else",
            "put the files themselves into the folder in place of the links, or remove the links",
            problems,
        )
    sizes = {path: path.stat().st_size for path in beside}
    large = [path for path, size in sizes.items() if size > _MOST_BYTES]
    notes = [
        f"{path} is not copied: it has {sizes[path]} bytes, more than a tokenizer's file ({_MOST_BYTES})"
        for path in large
    ]
    beside = [path for path in beside if path not in large]
    note_inputs(beside)
    files = {path.name: content for path, content in _contents(beside)}
    own = files.pop(CONFIG)
    files[CONFIG] = own if output.name == base.name else _renamed(config, base, output)
    others = sorted(set(named) - {base.name})
    notes += [f"{CONFIG} also names {', '.join(others)}: copy them from {base.parent}"] * bool(others)
    return Companions(files, output, tuple(notes), force)


def _contents(paths: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    left = _MOST_TOGETHER
    for path in paths:
        try:
            with open_regular(path) as file:
                content = file.read(left + 1)
        except OSError as error:
            reason = error.strerror or error
            raise PackageError(
                f"cannot read {path}: {reason}", "check the path and its permissions"
            ) from error
        left -= len(content)
        if left < 0:
            raise PackageError(
                f"the files beside the base, of which onnxruntime-genai reads a tokenizer, have more than "
                f"{_MOST_TOGETHER} bytes",
                f"move those that are not a tokenizer's, such as {path.name}, out of {path.parent}",
            )
        yield path, content


def _read(path: Path, base: Path) -> Any:
    hint = "correct the file, or move it away if the output is not for onnxruntime-genai"
    # It may be written again, and NaN and infinities are not JSON.
    return read_json(path, PackageError, hint, given=base, finite=True)


def _graphs(config: Any) -> Iterator[str]:
    """Yield the graphs that a config names at any depth: a pipeline or a vision model has several."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "filename" and isinstance(value, str):
                if value.endswith(".onnx"):
                    yield value
            else:
                yield from _graphs(value)
    elif isinstance(config, list):
        for value in config:
            yield from _graphs(value)


def _renamed(config: Any, base: Path, output: Path) -> bytes:
    """Return the config with the output's name in place of the base's, in the builder's layout."""

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: output.name if key == "filename" and inner == base.name else rename(inner)
                for key, inner in value.items()
            }
        return [rename(inner) for inner in value] if isinstance(value, list) else value

    return (json_text(rename(config), indent=4, ensure_ascii=True) + "\n").encode()
