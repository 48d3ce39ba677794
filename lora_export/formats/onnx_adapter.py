"""Read and write onnxruntime's ``.onnx_adapter``, which `LoraAdapter` loads: the layout of a graph's inputs.

The format has no metadata except two integers. In our files, the model's version is a part of the base's
identity, so that a wrong base is refused here as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.formats.provenance import Provenance, Writer, base_version
from lora_export.formats.reading.graph_layout import EXPECTS, read_converted
from lora_export.formats.reading.ort_file import SUFFIX, config_of, write_ort_file
from lora_export.formats.reading.source import AdapterSource, Format, ReadOptions


def recognises(source: AdapterSource) -> bool:
    """Return whether the file's name ends in ``.onnx_adapter``: onnxruntime's reader has checked the rest."""
    return source.file.suffix == SUFFIX


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from an ``.onnx_adapter``.

    The format doesn't distinguish an embedding from a linear module; both are read as linear, and have the
    same layout.

    Raises:
        AdapterError: The file breaks rules; all problems are listed.
    """
    return read_converted(source, options, "onnx_adapter", config_of(source.settings))


def write(path: Path, tensors: Mapping[str, Array], provenance: Provenance) -> None:
    """Write the file through onnxruntime."""
    write_ort_file(path, tensors, base_version(provenance.base_sha256), provenance.only_this_base)


WRITER = Writer(suffix=SUFFIX, write=write)
FORMAT = Format(
    expects=f"{EXPECTS}, in a file ending in {SUFFIX}",
    recognises=recognises,
    read=read,
    certain=True,
)
