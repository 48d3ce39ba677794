"""Read and write an ``.onnx_adapter`` with the names of onnxruntime-genai's model builder.

A model that was built with ``adapter_path`` has its LoRA tensors as
``model.layers.N.attn.q_proj.lora_A.MatMul.weight`` (onnxruntime-genai 0.18, ``models/builders/base.py``,
``make_matmul_lora``). Graphs of `swap-onnx` keep their own names, and onnxruntime-genai takes the plain
``.onnx_adapter`` for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.formats.provenance import Provenance, Writer, base_version
from lora_export.formats.reading.graph_layout import read_converted
from lora_export.formats.reading.ort_file import SUFFIX, config_of, write_ort_file
from lora_export.formats.reading.source import AdapterSource, Format, ReadOptions

_MARK = re.compile(r"\.lora_[AB]\.MatMul\.weight$")


def recognises(source: AdapterSource) -> bool:
    """Return whether an ``.onnx_adapter`` has the builder's names."""
    return source.file.suffix == SUFFIX and any(_MARK.search(name) for name in source.tensors)


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from such a file.

    Raises:
        AdapterError: The file breaks rules; all problems are listed.
    """
    return read_converted(source, options, "genai", config_of(source.settings))


def write(path: Path, tensors: Mapping[str, Array], provenance: Provenance) -> None:
    """Write the file through onnxruntime."""
    renamed = {re.sub(r"\.weight$", ".MatMul.weight", name): values for name, values in tensors.items()}
    write_ort_file(path, renamed, base_version(provenance.base_sha256), provenance.only_this_base)


def _refusal(name: str, kind: str) -> str:
    return "" if kind == "linear" else f"the builder makes LoRA only for linear modules, this is {kind}"


WRITER = Writer(suffix=SUFFIX, write=write, refusal=_refusal, foreign=True)
FORMAT = Format(
    expects=f"<module>.lora_A.MatMul.weight and .lora_B.MatMul.weight in a file ending in {SUFFIX}",
    recognises=recognises,
    read=read,
    certain=True,
)
