"""Read and write TensorRT-Edge-LLM's folder: ``processed_adapter_model.safetensors`` and ``config.json``.

The layout is that of its engines' inputs (its ``insert_lora`` step): ``<module>.lora_A.weight``
``(in_dim, rank)`` and ``.lora_B.weight`` ``(rank, out_dim)`` in float16, scaling folded into B, on every
linear module except ``lm_head``. Its own converter folds a single alpha / r; here each module has its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.formats.provenance import Provenance, Writer
from lora_export.formats.reading.graph_layout import EXPECTS, has_names, read_converted
from lora_export.formats.reading.source import EDGE_LLM_NAME, AdapterSource, Format, ReadOptions
from lora_export.formats.reading.tensors import write_safetensors
from lora_export.storage.folders import listed_files
from lora_export.storage.hashes import hash_written
from lora_export.storage.sums.seal import seal_file, sealed_json

_CONFIG_NAME = "config.json"
# Parts of module paths that have no LoRA inputs in its engines.
_OUTSIDE = frozenset({"lm_head", "embed_tokens", "vision_tower", "audio_tower", "visual"})


def recognises(source: AdapterSource) -> bool:
    """Return whether the file has the name that Edge-LLM's tools use."""
    return source.file.name == EDGE_LLM_NAME and has_names(source.tensors)


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Make an adapter from such a folder; the base is known if we wrote it.

    Raises:
        AdapterError: The file breaks rules; all problems are listed.
    """
    return read_converted(source, options, "edge-llm", dict(source.metadata))


def write(path: Path, tensors: Mapping[str, Array], provenance: Provenance) -> None:
    """Write the folder ``path``."""
    path.mkdir()
    weights = path / EDGE_LLM_NAME
    write_safetensors(weights, tensors, provenance.sealed_metadata())
    seal_file(weights)
    rank = max(provenance.ranks.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        # The scaling is folded into lora_B, so alpha / r is 1.
        "lora_alpha": rank,
        "target_modules": sorted(provenance.ranks),
        "rank_pattern": {name: own for name, own in provenance.ranks.items() if own != rank},
        "lora_export": {
            **provenance.metadata(),
            "files": {weights.name: asdict(hash_written(weights, weights.name))},
        },
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (path / _CONFIG_NAME).write_bytes(sealed_json(text))


def own_files(folder: Path) -> set[str]:
    """Return the files of a folder that its config lists as ours; none if we did not write it."""
    return listed_files(folder / _CONFIG_NAME, "lora_export")


def _refusal(name: str, kind: str) -> str:
    if kind != "linear":
        return f"TensorRT-Edge-LLM adapts only linear modules, this is {kind}"
    outside = _OUTSIDE.intersection(name.split("."))
    return f"TensorRT-Edge-LLM has no LoRA inputs for {', '.join(sorted(outside))}" if outside else ""


WRITER = Writer(suffix="", write=write, dtype="float16", refusal=_refusal)
FORMAT = Format(
    expects=f"{EXPECTS} in a file called {EDGE_LLM_NAME}",
    recognises=recognises,
    read=read,
    certain=True,
)
