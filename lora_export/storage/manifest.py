"""What was written, as data: inputs by hash, the plan, what rounding cost, versions. JSON, read and written.

Nothing in a manifest depends on the clock, the machine or absolute paths: same inputs, same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter
from lora_export.errors import GraphError
from lora_export.storage.hashes import FileHash
from lora_export.storage.sums.seal import SEAL, sealed_json
from lora_export.untrusted.documents import json_of
from lora_export.untrusted.fields import FieldError, from_plain, seen

FORMAT = 1
_HINT = "give the OUT.lora.json of a merge"


@dataclass(frozen=True)
class Manifest:
    """The record beside a written model, ``OUT.lora.json``.

    Attributes:
        mode: ``merge-onnx``, ``merge``, ``swap-onnx`` or ``bank-onnx``.
        base: The base model's files.
        adapters: For each adapter: name, format, sha256, weight in the blend, scaling by module; and where it
            is not the whole file `Adapter.part`.
        plan: `Plan.as_dict`.
        rounding: What rounding cost: total and by module.
        outputs: The files written, by what they are.
        versions: Packages that decide about the bytes written.
        exposed: The record of a graph with exposed LoRA, see `exposed.ExposedGraph`.
        files: All files that belong to what was written, but for the manifest itself, by their place from
            its folder.
    """

    mode: str
    base: list[FileHash]
    adapters: list[dict[str, Any]]
    plan: dict[str, Any]
    rounding: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    exposed: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileHash] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write the manifest, sealed."""
        path.write_bytes(sealed_json(self.to_json()))

    def to_json(self) -> str:
        """Return the manifest as indented JSON with sorted keys, without a seal."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `save` or `to_json` wrote.

        Raises:
            GraphError: It is no manifest, or one of another format.
        """
        data = json_of(text, "the manifest", GraphError, _HINT)
        if isinstance(data, dict):
            data.pop(SEAL, None)
        if isinstance(data, dict) and "format" in data and data["format"] != FORMAT:
            said = seen(data["format"])
            raise GraphError(f"the manifest has format {said}, this version reads {FORMAT}", _HINT)
        try:
            return from_plain(cls, data)
        except FieldError as error:
            raise GraphError("not a lora-export manifest, or a damaged one", _HINT, error.problems) from error


def adapter_entry(adapter: Adapter, weight: float) -> dict[str, Any]:
    """Return what a manifest says of an adapter."""
    rows = {path: len(rows.indices) for path, rows in adapter.token_rows.items()}
    return {
        "name": adapter.name,
        "format": adapter.format,
        "sha256": adapter.sha256,
        "weight": weight,
        "modules": {
            key: {"rank": module.rank, "alpha": module.alpha, "scaling": module.scaling}
            for key, module in adapter.modules.items()
        },
        "replaced": sorted(adapter.extras),
        **({"part": adapter.part} if adapter.part is not None else {}),
        **({"replaced_rows": rows} if rows else {}),
    }
