"""Files that hold a hash of their own: one flipped bit shows, in the hash as elsewhere.

A seal is `MARK` and 64 hexadecimal digits: the hash of the whole file, with zeros for these digits. It stands
where it can be found without understanding the file, and so also in a damaged one:

- in JSON, as the first key;
- in ``.safetensors``, as the first entry of the header's metadata;
- at the very end of an ``.onnx`` (protobuf takes an entry of the metadata there as well) and of an
  ``.onnx_adapter`` (whose reader looks at no byte behind its tables).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from lora_export.errors import InternalError
from lora_export.storage.sums.full import file_digest
from lora_export.untrusted.documents import open_regular

# The key of the entry in a header's or a graph's metadata, and in JSON.
KEY, SEAL = "lora_export.seal", "seal"
_DIGITS = 64
MARK = "lora-export:blake3-of-this-file:"
UNSEALED = MARK + "0" * _DIGITS
# An entry of ``metadata_props`` behind the rest of the protobuf: field 14, its key as field 1, its value
# as field 2. Readers of protobuf take fields in any order.
_PAIR = b"\x0a" + bytes([len(KEY)]) + KEY.encode() + b"\x12" + bytes([len(UNSEALED)]) + UNSEALED.encode()
ONNX_ENTRY = b"\x72" + bytes([len(_PAIR)]) + _PAIR
_SEAL = re.compile(rb"lora-export:(blake3|sha256)-of-this-file:([0-9a-f]{64})")
_JSON_START = f'{{\n "{SEAL}": "'
# Eight bytes of a length come first.
_SAFETENSORS_START = 8 + len(f'{{"__metadata__":{{"{KEY}":"')
# Characters of the mark that may differ in a damaged one.
_DAMAGED = 4


@dataclass(frozen=True)
class Seal:
    """The seal of a file.

    Attributes:
        algorithm: ``blake3`` or ``sha256``.
        digest: What it says; empty where it is damaged itself.
        start: Where its digits begin.
    """

    algorithm: str
    digest: str
    start: int

    def seen(self, path: Path) -> str:
        """Return the hash of the file as it is now."""
        return file_digest(path, self.algorithm, range(self.start, self.start + _DIGITS))


def sealed_json(text: str) -> bytes:
    """Return the text of a JSON object with a seal as its first entry."""
    if text[:1] != "{":
        raise InternalError("only an object can be sealed")
    zeros = (_JSON_START + UNSEALED + '",' + text[1:]).encode()
    start = len(_JSON_START) + len(MARK)
    return zeros[:start] + blake3(zeros).hexdigest().encode() + zeros[start + _DIGITS :]


def seal_file(path: Path) -> None:
    """Write a file's hash into the seal that it was written with, `UNSEALED`."""
    found = find_seal(path)
    if found is None or found.digest != "0" * _DIGITS:
        raise InternalError(f"{path} was not written with a place for its seal")
    digest = found.seen(path)
    with path.open("r+b") as file:
        file.seek(found.start)
        file.write(digest.encode())


def write_onnx(path: Path, content: bytes) -> None:
    """Write a graph's protobuf and its seal."""
    with path.open("wb") as file:
        file.write(content)
        file.write(ONNX_ENTRY)
    seal_file(path)


def find_seal(path: Path) -> Seal | None:
    """Return a file's seal, or None where it has none."""
    size = path.stat().st_size
    with open_regular(path) as file:
        for place in (size - len(UNSEALED), len(_JSON_START), _SAFETENSORS_START):
            if place < 0:
                continue
            file.seek(place)
            text = file.read(len(UNSEALED))
            if found := _SEAL.fullmatch(text):
                return Seal(found[1].decode(), found[2].decode(), place + found.start(2))
            if len(text) == len(UNSEALED) and _is_nearly(text):
                return Seal("blake3", "", place + len(MARK))
    return None


def _is_nearly(text: bytes) -> bool:
    differ = sum(one != other for one, other in zip(text[: len(MARK)], MARK.encode(), strict=True))
    return differ <= _DAMAGED
