"""Read and write the ``.safetensors`` files of `convert-adapter`: tensors in a graph's layout.

Only the metadata identify such a file (`Provenance.metadata`). The same tensors in a file without metadata,
as Olive writes it, are read with ``--format converted``: only the user knows that they are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.formats.provenance import FORMAT_KEY, FORMAT_NAME, LAYOUT, LAYOUT_KEY, Provenance, Writer
from lora_export.formats.reading.graph_layout import EXPECTS, read_converted
from lora_export.formats.reading.source import AdapterSource, Format, ReadOptions
from lora_export.formats.reading.tensors import write_safetensors
from lora_export.storage.sums.seal import seal_file


def recognises(source: AdapterSource) -> bool:
    """Return whether the file has the metadata that we write."""
    return source.metadata.get(FORMAT_KEY) == FORMAT_NAME and source.metadata.get(LAYOUT_KEY) == LAYOUT


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from a converted file.

    Raises:
        AdapterError: The file breaks rules; all problems are listed.
    """
    return read_converted(source, options, "converted", dict(source.metadata))


def write(path: Path, tensors: Mapping[str, Array], provenance: Provenance) -> None:
    """Write the file; equal tensors give equal bytes."""
    write_safetensors(path, tensors, provenance.sealed_metadata())
    seal_file(path)


WRITER = Writer(suffix=".safetensors", write=write)
FORMAT = Format(
    expects=f"{EXPECTS}, and lora-export's metadata",
    recognises=recognises,
    read=read,
    certain=True,
)
