"""Read and write manifests: JSON with the inputs' hashes, the plan, the loss by rounding, and versions.

Nothing in a manifest depends on the clock, the machine or absolute paths: equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from lora_export.adapter import Adapter
from lora_export.errors import GraphError
from lora_export.storage.hashes import FileHash
from lora_export.storage.sums.seal import SEAL, sealed_json
from lora_export.untrusted.documents import json_of, read_json
from lora_export.untrusted.fields import FieldError, Keys, from_plain, seen

FORMAT = 1
_HINT = "give the OUT.lora.json of a merge"
_PLAN = Keys({}, {"rows": list[dict[str, Any]], "notes": list[str], "warnings": list[str]})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record beside a written model, ``OUT.lora.json``.

    Attributes:
        mode: ``merge-onnx``, ``merge``, ``swap-onnx``, ``bank-onnx``, ``quantize-onnx`` or ``capture-onnx``.
        base: The base model's files.
        adapters: For each adapter: name, format, sha256, weight in the blend, scaling by module; and
            `Adapter.part` if it is not the whole file.
        plan: `Plan.as_dict`.
        rounding: Loss by rounding: total and by module.
        outputs: The written files, by kind.
        versions: Versions of the packages that determine the bytes written.
        exposed: LoRA record of a graph with exposed LoRA, see `exposed.LoraRecord`.
        files: All files of the output except the manifest itself, by their path from its folder.
        quantised: Weights of the graph that were quantised, those that were left, and what it cost.
    """

    mode: str
    base: list[FileHash]
    adapters: list[dict[str, Any]]
    plan: Annotated[dict[str, Any], _PLAN]
    rounding: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    exposed: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileHash] = field(default_factory=dict)
    quantised: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write the manifest, sealed.

        Raises:
            GraphError: The manifest could not be read again, so it is not written.
        """
        text = self.to_json()
        Manifest.from_json(text)
        path.write_bytes(sealed_json(text))

    def to_json(self) -> str:
        """Return the manifest as indented JSON with sorted keys, without a seal."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest that `save` or `to_json` wrote.

        Raises:
            GraphError: The text is not a manifest, is damaged, or has another format.
        """
        return cls._from_data(json_of(text, "the manifest", GraphError, _HINT))

    @classmethod
    def read(cls, path: Path, given: Path | None = None) -> Manifest:
        """Read a manifest's file.

        Args:
            path: The file.
            given: Path that the user named, if the manifest was only looked for beside it; see `read_json`.

        Raises:
            GraphError: The file can't be read, or as in `from_json`.
        """
        return cls._from_data(read_json(path, GraphError, _HINT, given=given))

    @classmethod
    def _from_data(cls, data: Any) -> Manifest:
        if isinstance(data, dict):
            data.pop(SEAL, None)
        if isinstance(data, dict) and "format" in data and data["format"] != FORMAT:
            found = seen(data["format"])
            raise GraphError(f"the manifest has format {found}, but this version reads {FORMAT}", _HINT)
        try:
            return from_plain(cls, data)
        except FieldError as error:
            raise GraphError("not a lora-export manifest, or damaged", _HINT, error.problems) from error


def adapter_entry(adapter: Adapter, weight: float) -> dict[str, Any]:
    """Return a manifest's entry for an adapter."""
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
