"""A ``.safetensors`` file made by `convert-adapter`: a graph's own tensors, and where they belong.

Known by its metadata alone (`Provenance.metadata`). The same tensors in a file without them, as Olive writes
it, are read with ``--format converted``: nothing but the user's word tells that they are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.formats.provenance import FORMAT_KEY, FORMAT_NAME, LAYOUT, LAYOUT_KEY, Provenance, Writer
from lora_export.formats.reading.graph_layout import EXPECTS, read_converted
from lora_export.formats.reading.source import Format, Options, Source
from lora_export.formats.reading.tensors import write_safetensors
from lora_export.storage.sums.seal import seal_file


def recognises(source: Source) -> bool:
    """Whether the file's metadata say that we wrote it."""
    return source.metadata.get(FORMAT_KEY) == FORMAT_NAME and source.metadata.get(LAYOUT_KEY) == LAYOUT


def read(source: Source, options: Options) -> Adapter:
    """Make an adapter of a converted file.

    Raises:
        AdapterError: A list of all that is wrong.
    """
    return read_converted(source, options, "converted", dict(source.metadata))


def write(path: Path, tensors: Mapping[str, Array], provenance: Provenance) -> None:
    """Write the file; the same tensors give the same bytes."""
    write_safetensors(path, tensors, provenance.sealed_metadata())
    seal_file(path)


WRITER = Writer(".safetensors", write)
FORMAT = Format(
    expects=f"{EXPECTS}, and metadata that say so",
    recognises=recognises,
    read=read,
    certain=True,
)
