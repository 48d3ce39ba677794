"""Keep engines by what they were built from, so that an unchanged one is not built again.

A folder holds ``<key>/engine``, ``<key>/log`` and ``<key>/built.json``; the key is a hash of the graph, all
of its weights, the options, the shapes, the GPUs and the versions of the builder and of lora-export.
``hashes.json`` remembers the hashes of large files by device, inode, size and times of change, as git's index
does: an unchanged gigabyte is not read again. A change that leaves all of these as they are goes unnoticed:
for example through a memory map whose page is written to again (on tmpfs at any time). `--no-cache` reads
every file.

Other files in the folder are never removed: an entry's name is a key, and it holds these files only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import LoraExportError, OutputError
from lora_export.graph.port import Port
from lora_export.storage.cache_folder import cache_folder, chosen_folder
from lora_export.storage.folders import refuse_strangers
from lora_export.storage.hashes import sha256_of
from lora_export.storage.outputs import OutputSet
from lora_export.untrusted.documents import MAX_BYTES, DocumentError, open_regular, parse_json, read_json
from lora_export.untrusted.fields import Count, FieldError, from_plain
from lora_export.untrusted.places import exists, is_folder, is_link

DEFAULT_MAX_BYTES = 20 << 30
_ENGINE, _LOG, _BUILT, _HASHES = "engine", "log", "built.json", "hashes.json"
# A file that changed this recently may change again within the same tick of the file system's clock.
_RACY_NS = 2_000_000_000
_REMEMBERED = 1000
_KEY = re.compile("[0-9a-f]{64}")


def default_folder() -> Path:
    """Return the folder of the cache: ``$LORA_EXPORT_CACHE``, else one in the user's cache folder."""
    return chosen_folder() or cache_folder("engines")


@dataclass(frozen=True, kw_only=True)
class _Built:
    """The fields of ``built.json``: which engine it is about, and all that is later read of it.

    Anybody may have written it: the folder may be shared, and an entry may be older than this version.
    """

    size_bytes: Count
    sha256: str
    build_s: float
    peak_build_bytes: Count
    memory: Mapping[str, Count]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Cached:
    """An engine in the cache.

    Attributes:
        engine: File of the engine.
        log: File of the builder's messages.
        built: The builder's result.
    """

    engine: Path
    log: Path
    built: dict[str, Any]


class EngineCache:
    """The cached engines of one folder.

    Args:
        folder: The folder; created when the first engine is kept.
        max_bytes: Limit of their sizes; above it, the least recently used are removed.
    """

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    def find(self, key: str) -> Cached | None:
        """Return the engine of a key, or None.

        One that is damaged, or that no cache has written, is removed. One that can't be read is not damaged:
        too many open files, or a server that does not answer, are over in a moment.
        """
        place = self.folder / key
        try:
            if _has_own_files(place):
                built = parse_json(_content(place / _BUILT))
                engine, known = place / _ENGINE, from_plain(_Built, built, known_only=False)
                if engine.stat().st_size == known.size_bytes and self.sha256(engine) == known.sha256:
                    with contextlib.suppress(OSError):  # a read-only cache works as well
                        os.utime(place)
                    return Cached(engine, place / _LOG, built)
        except OSError:
            return None
        except (DocumentError, FieldError):
            pass
        with contextlib.suppress(OSError):
            if _is_entry(place):
                shutil.rmtree(place)
        return None

    def take(self, key: str, engine: Path, log: Path) -> dict[str, Any] | None:
        """Copy the engine of a key.

        Args:
            key: Key of the engine.
            engine: File to copy the engine to.
            log: File to copy the builder's messages to.

        Returns:
            The builder's result; None if the cache lacks the engine, or another process just replaced it.
        """
        place = self.folder / key
        try:
            if not _has_own_files(place):
                return None
            before = _content(place / _BUILT)
            shutil.copyfile(place / _ENGINE, engine)
            shutil.copyfile(place / _LOG, log)
            found = self.find(key)
            return found.built if found and _content(place / _BUILT) == before else None
        except OSError:
            return None

    def keep(self, key: str, engine: Path, log: Path, built: Mapping[str, Any]) -> str:
        """Keep a copy of an engine under a key.

        Returns:
            The reason why it could not be kept, or "": a build does not fail for it.
        """
        place = self.folder / key
        try:
            with OutputSet(force=True, listed=False) as outputs:
                staged = outputs.stage(place, folder=True)
                staged.mkdir()
                shutil.copyfile(engine, staged / _ENGINE)
                shutil.copyfile(log, staged / _LOG)
                (staged / _BUILT).write_text(json.dumps(built), encoding="utf-8")
                outputs.commit(lambda: refuse_strangers(place, {_ENGINE, _LOG, _BUILT}, "cache entry"))
            self._make_room(key)
        except OutputError as error:
            return error.message
        except OSError as error:
            return f"cannot write {self.folder}: {error.strerror or error}"
        return ""

    def sha256(self, path: Path) -> str:
        """Return a file's SHA-256; an unchanged file is not read again."""
        # Taken before the file is read: a change at that very moment has the same time.
        now, status = time.time_ns(), path.stat()
        name = str(path.resolve())
        known = self._hashes()
        state = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        entry = known.get(name)
        if isinstance(entry, list) and entry[1:] == state and _KEY.fullmatch(str(entry[0])):
            return str(entry[0])
        digest = sha256_of(path)
        # Copying and unpacking set the first of these times back.
        if now - max(status.st_mtime_ns, status.st_ctime_ns) > _RACY_NS:
            known.pop(name, None)
            known[name] = [digest, *state]
            self._remember(known)
        return digest

    def _hashes(self) -> dict[str, Any]:
        try:
            known = read_json(self.folder / _HASHES)
        except LoraExportError:
            return {}
        ours = isinstance(known, dict) and all(isinstance(entry, list) for entry in known.values())
        return known if ours else {}

    def _remember(self, known: dict[str, Any]) -> None:
        if exists(self.folder / _HASHES) and not self._hashes():
            return  # somebody else's file of that name
        latest = dict(list(known.items())[-_REMEMBERED:])
        with contextlib.suppress(OSError, OutputError), OutputSet(force=True, listed=False) as outputs:
            outputs.stage(self.folder / _HASHES).write_text(json.dumps(latest), encoding="utf-8")
            outputs.commit()

    def _make_room(self, newest: str) -> None:
        found = []
        for place in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process makes room as well
                if _is_entry(place):
                    used, size = place.stat().st_mtime, (place / _ENGINE).stat().st_size
                    found.append((place.name == newest, used, size, place))
        total = sum(size for _, _, size, _ in found)
        for _, _, size, place in sorted(found)[:-1]:
            if total <= self._max_bytes:
                return
            total -= size
            shutil.rmtree(place, ignore_errors=True)


def _has_own_files(place: Path) -> bool:
    """Return whether an entry's files are regular: reading a pipe would never end, a link leads elsewhere.

    Raises:
        OSError: A file is missing, or can't be looked at.
    """
    return all(stat.S_ISREG((place / name).lstat().st_mode) for name in (_ENGINE, _LOG, _BUILT))


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(MAX_BYTES + 1)  # more than is read as a document


def _is_entry(place: Path) -> bool:
    """Return whether a folder is a complete cache entry (not one being written) without other files."""
    if not _KEY.fullmatch(place.name) or is_link(place) or not is_folder(place):
        return False
    names = {path.name for path in place.iterdir()}
    return _BUILT in names and names <= {_ENGINE, _LOG, _BUILT}


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key for everything that an engine is made from: plain data, in any order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def combined(hashes: Iterable[str]) -> str:
    """Return one hash of several; their order counts."""
    digest = hashlib.sha256()
    for entry in hashes:
        digest.update(entry.encode())
    return digest.hexdigest()
