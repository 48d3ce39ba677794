"""Complete an engine's record with what only the machine knows that built it, and give both their names.

Usage: python3 finish.py record.json BUILT LOG ENGINE
Needs nothing but Python's standard library, 3.8 or newer.
"""

import hashlib
import json
import os
import platform
import re
import sys
from pathlib import Path


def version_in(log: str) -> str:
    """Return the version that trtexec says it has: ``10.13.0``."""
    said = re.search(r"TensorRT(?:-RTX)? version: (\d+(?:\.\d+)+)", log)
    if said is not None:
        return said.group(1)
    packed = re.search(r"\[TensorRT(?:-RTX)? v(\d+)(\d\d)(\d\d)\]", log)
    if packed is not None:
        return ".".join(str(int(part)) for part in packed.groups())
    sys.exit("Error: the log does not say which version of TensorRT has built the engine")


def sealed(record: dict[str, object]) -> bytes:
    """Return a record as JSON that begins with its own SHA-256, as if that were zeros."""
    record.pop("seal", None)
    rest = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)[1:] + "\n"
    start, end = '{\n "seal": "lora-export:sha256-of-this-file:', '",' + rest
    digest = hashlib.sha256((start + "0" * 64 + end).encode()).hexdigest()
    return (start + digest + end).encode()


def main(template: str, built: str, log: str, engine: str) -> None:
    """Rename the engine that was built, and write its record beside it."""
    record, path = json.loads(Path(template).read_text(encoding="utf-8")), Path(engine)
    digest = hashlib.sha256()
    with Path(built).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    said = Path(log).read_text(encoding="utf-8", errors="replace")
    record["name"] = path.name
    record["sha256"] = digest.hexdigest()
    record["size_bytes"] = Path(built).stat().st_size
    record["files"] = {
        path.name: {"name": path.name, "size_bytes": record["size_bytes"], "sha256": record["sha256"]},
        Path(log).name: {
            "name": Path(log).name,
            "size_bytes": Path(log).stat().st_size,
            "sha256": hashlib.sha256(Path(log).read_bytes()).hexdigest(),
        },
    }
    record["builder_version"] = version_in(said)
    record["platform"] = f"{platform.system().lower()}-{platform.machine().lower()}"
    for name, label in (("weights", "Weights"), ("activations", "Activation")):
        found = re.search(rf"Total {label} Memory: (\d+)", said)
        if found:
            record["memory"][name] = int(found.group(1))
    target = path.with_suffix(".json")
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(sealed(record))
        file.flush()
        os.fsync(file.fileno())
    Path(built).replace(path)
    temporary.replace(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
