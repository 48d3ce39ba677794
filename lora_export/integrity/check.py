"""Check sets of files that we wrote: each file by its full hash, each description by its own seal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_export.errors import LoraExportError
from lora_export.graph.data_identity import place_problem
from lora_export.integrity.claims import Claim, Description, description_of, is_named_as_sealed
from lora_export.integrity.undescribed import files_in, matters
from lora_export.storage.hashes import hash_file, identity_of, is_sampled
from lora_export.storage.sums.full import file_digest
from lora_export.storage.sums.listed import NAME as SUMS
from lora_export.storage.sums.seal import find_seal
from lora_export.untrusted.links import RealPaths, leads_out
from lora_export.untrusted.places import is_file, is_folder, is_there
from lora_export.untrusted.shown import limited, shown

State = Literal["ok", "sampled", "unhashed", "not described", "changed", "missing", "outside"]
# The states by strength: of several findings on one file, the first in this order decides.
_STRENGTH: tuple[State, ...] = (
    *("outside", "missing", "changed"),
    *("ok", "sampled", "unhashed", "not described"),
)
BROKEN: frozenset[State] = frozenset({"changed", "missing", "outside"})
_OUTSIDE = "a set's files must be in its folder, without links out of it"
_EARLIER = "no full hash: an earlier version wrote it"
_SAMPLED = "no full hash: a base above 1 GiB, captured in its place; or an earlier version wrote it"
_MOST_FILES = 100_000
# Files that are named and not there: a description takes less for each than what is known of it here.
_MOST_ABSENT = 1 << 14
# Names of one file, by links: each may describe others, and is read.
_MOST_NAMES = 64
# Number of files that are named in a few lines.
_SHOWN = 8
PathLike = str | os.PathLike[str]


@dataclass(kw_only=True)
class CheckedFile:
    """State of one file.

    Attributes:
        path: The file.
        state: The strongest finding.
        by: Names of the files that describe it; its own name if it has a seal.
        details: Seen versus wanted, or the reason why it could not be compared.
        matters: True if it must be described, because a program may load it.
    """

    path: Path
    state: State = "not described"
    by: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    matters: bool = False
    # A stranger's list may name one file many times.
    _known: set[tuple[str, str]] = field(default_factory=set, repr=False, compare=False)

    def add(self, state: State, by: str, detail: str = "") -> None:
        """Add a finding."""
        stronger = _STRENGTH.index(state) < _STRENGTH.index(self.state)
        if stronger:
            self.state = state
            if state not in BROKEN:
                self._known -= {("detail", known) for known in self.details}
                self.details = []
        if self._is_new("by", by):
            self.by.append(by)
        if detail and (stronger or state == self.state) and self._is_new("detail", detail):
            self.details.append(detail)

    def _is_new(self, kind: str, text: str) -> bool:
        count = len(self._known)
        self._known.add((kind, text))
        return len(self._known) > count


@dataclass(frozen=True)
class VerifyReport:
    """Result of a check.

    Attributes:
        files: All files that were checked, by path.
    """

    files: tuple[CheckedFile, ...]

    def failures(self, allow_sampled: bool = False) -> list[CheckedFile]:
        """Return the files that have changed, or may have."""
        allowed = {"ok"} | ({"sampled", "unhashed"} if allow_sampled else set())
        return [
            found
            for found in self.files
            if found.state not in allowed and (found.state != "not described" or found.matters)
        ]

    def __str__(self) -> str:
        """Return the numbers of files by their states, and a line for each file that failed."""
        counts = Counter(found.state for found in self.files)
        failed = [f"{found.state}: {shown(found.path)}" for found in self.failures()]
        states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
        return "\n".join([f"{len(self.files)} files: {states}", *limited(failed, "files", _SHOWN)])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "files": [
                {
                    "path": str(found.path),
                    "state": found.state,
                    "described_by": found.by,
                    "details": found.details,
                    "matters": found.matters or found.state != "not described",
                }
                for found in self.files
            ]
        }


def verify(
    paths: PathLike | Sequence[PathLike], progress: Callable[[int], None] | None = None
) -> VerifyReport:
    """Check graphs, folders, engines, converted adapters, manifests and kits by full hashes.

    Args:
        paths: Files, which are checked with the whole set that they belong to, and folders, with all files.
        progress: Function called with the number of bytes just read.

    Raises:
        LoraExportError: No path is given, or one does not exist or has no hash to check.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:  # a pattern that matched nothing is no set without a fault
        raise LoraExportError("no path was given to check", "give files or folders that lora-export wrote")
    check = _Check(progress=progress or (lambda _bytes: None))
    bare = []
    for path in map(Path, given):
        if not (is_file(path) or is_folder(path)):
            raise LoraExportError(f"no file or folder at {path}", "check the path")
        before = check.compared
        check.look_at_all(_files(path), path)
        if check.compared == before:
            bare.append(str(path))
    if bare:
        raise LoraExportError(
            "no hash was found to check",
            "give an output of lora-export (a graph, its folder, an engine with its record, a converted "
            "adapter, a kit); for a single file copied elsewhere, give the whole set",
            bare,
        )
    return VerifyReport(tuple(sorted(check.states.values(), key=lambda found: str(found.path))))


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of a folder (`files_in`), or a file and those beside it that describe it."""
    if not is_folder(path):
        yield path, ""
        names = Counter[str]()
        for beside in sorted(path.parent.iterdir()):
            if beside != path and is_file(beside):
                _count_name(names, beside, os.path.realpath(beside))
                if _may_name(beside, path):
                    yield beside, ""
        return
    for count, found in enumerate(files_in(path), 1):
        if count > _MOST_FILES:
            raise LoraExportError(f"{path} holds more than {_MOST_FILES} files", "give the folder of one set")
        yield found


def _count_name(names: Counter[str], path: Path, real: str) -> None:
    """Count one more name of a file, by its real path; raise if there are too many."""
    names[real] += 1
    if names[real] > _MOST_NAMES:
        raise LoraExportError(f"{path} is one of more than {_MOST_NAMES} links to {real}", "remove the links")


def _may_name(beside: Path, path: Path) -> bool:
    """Return whether a file describes another one, or may have before it was damaged, or can't be read."""
    try:
        return _names(beside, path)
    except OSError:
        return True


def _names(beside: Path, path: Path) -> bool:
    description = description_of(beside, path)
    if description is None:
        return False
    if any(claim.place == path.name for claim in description.claims):
        return True
    seal = find_seal(beside)
    is_broken = seal is not None and seal.seen(beside) != seal.digest
    # Other graphs beside it describe only files of their own.
    return beside.suffix != ".onnx" and (is_broken or bool(description.problems))


@dataclass(kw_only=True)
class _Check:
    """The files that were checked so far.

    Attributes:
        progress: Function called with the number of bytes just read.
        states: States of the files, by name in the real folder: a link is a file of its own, since programs
            load by names.
        compared: Number of compared hashes.
    """

    progress: Callable[[int], None]
    states: dict[str, CheckedFile] = field(default_factory=dict)
    compared: int = 0
    _digests: dict[tuple[str, str], str] = field(default_factory=dict)
    _seen: set[tuple[str, str]] = field(default_factory=set)
    _named: list[Path] = field(default_factory=list)
    _names: Counter[str] = field(default_factory=Counter)
    _absent: int = 0
    _real: RealPaths = field(default_factory=RealPaths)

    def look_at_all(self, paths: Iterable[tuple[Path, str]], given: Path) -> None:
        """Check files and the files that they describe, which may describe others in turn.

        Args:
            paths: The files, each with the reason why it can't be looked at, if there is one.
            given: The folder or file that the user named.
        """
        for path, odd in paths:
            if odd:
                self.states[f"{path}\0"] = CheckedFile(path=path, details=[odd], matters=True)
            else:
                self._look_at(path, given)
        while self._named:
            self._look_at(self._named.pop(), given)

    def _look_at(self, path: Path, given: Path) -> None:
        """Compare a file with its own seal, and the files that it describes with their descriptions."""
        # By its name, too: what a file says of others is known by that, and a link may have another one.
        if (known := (self._real.of(path), path.name)) in self._seen:
            return
        self._seen.add(known)
        _count_name(self._names, path, known[0])
        state = self._state(path)
        try:
            self._check(path, given, state)
        except OSError as error:
            self.compared += 1
            state.add("missing", path.name, f"it can't be read: {error.strerror or error}")

    def _check(self, path: Path, given: Path, state: CheckedFile) -> None:
        state.matters |= matters(path, given if is_folder(given) else path.parent)
        # What may describe files is refused by its own reader.
        may_describe = path.suffix == ".json" or path.name == SUMS
        if is_folder(given) and leads_out(path, given, self._real.of) and not may_describe:
            if state.matters:
                state.add("outside", path.name, _OUTSIDE)
            return
        seal, is_broken = find_seal(path), False
        if seal is not None:
            self.compared += 1
            found = seal.seen(path)
            self.progress(path.stat().st_size)
            wanted = seal.digest or "a hash, but its place is damaged"
            detail = "" if found == seal.digest else f"{seal.algorithm} {found}, wanted {wanted}"
            if detail or is_named_as_sealed(path):
                state.add("changed" if detail else "ok", path.name, detail)
            is_broken = bool(detail)
        # A damaged graph is not read; a damaged list may still tell which files there are.
        description = None if is_broken and path.suffix == ".onnx" else description_of(path, given)
        if description is None:
            return
        for problem in description.problems:
            self.compared += 1
            state.add("changed", path.name, problem)
        if description.is_unsealed:
            state.add("changed", path.name, "the hash of its own that it was written with is missing")
        elif path.name == SUMS:
            state.add("ok", path.name)  # all of its characters are compared with something
        elif seal is None and description.claims:
            state.add("unhashed", path.name, _EARLIER)
        for claim in dict.fromkeys(description.claims):  # a list may say one thing many times
            self._compare(claim, path)
        self._compare_identity(description, path)
        claimed = {claim.place for claim in description.claims}
        for place in description.uses:
            if place in claimed or self._is_outside(place, path):
                continue
            if not is_there(path.parent / place):
                self._count_absent(path)
            used = self._state(path.parent / place)
            used.matters = True
            used.add("not described", path.name, "it holds weights of this graph, which has no hash of it")

    def _state(self, path: Path) -> CheckedFile:
        shown = Path(os.path.normpath(path))
        key = os.path.join(self._real.of(shown.parent), shown.name)  # noqa: PTH118
        return self.states.setdefault(key, CheckedFile(path=shown))

    def _compare(self, claim: Claim, by: Path) -> None:
        if self._is_outside(claim.place, by):
            return
        path = by.parent / claim.place
        state = self._state(path)
        try:
            size = path.stat().st_size if is_file(path) else None
            if size is None:
                state.add("missing", by.name, "it does not exist")
                self._count_absent(by)
            elif claim.size_bytes is not None and size != claim.size_bytes:
                self.compared += 1
                state.add("changed", by.name, f"{size} bytes, wanted {claim.size_bytes}")
            else:
                self._compare_hash(claim, path, size=size, state=state, by=by)
                self._named.append(path)
        except OSError as error:
            state.add("missing", by.name, f"it can't be read: {error.strerror or error}")

    def _is_outside(self, place: str, by: Path) -> bool:
        """Return whether a place that a file names is out of its folder, after adding that finding."""
        if not place_problem(by, place, self._real.of):
            return False
        # Not joined: a claim may not be about a file elsewhere.
        key = f"{by}\0{place}"
        outside = self.states.setdefault(key, CheckedFile(path=Path(f"{by}: {place}")))
        outside.add("outside", by.name, _OUTSIDE)
        self._count_absent(by)
        return True

    def _count_absent(self, by: Path) -> None:
        self._absent += 1
        if self._absent > _MOST_ABSENT:
            raise LoraExportError(
                f"{by} names files that are not there, {_MOST_ABSENT} or more",
                "give the whole set, in its own folder",
            )

    def _compare_hash(self, claim: Claim, path: Path, size: int, state: CheckedFile, by: Path) -> None:
        if not (claim.blake3 or claim.sha256):
            state.add("unhashed", by.name, _EARLIER)
            return
        self.compared += 1
        if claim.blake3:
            kind, wanted, found = "blake3", claim.blake3, self._digest(path, "blake3", size)
        elif claim.whole or not is_sampled(size):
            kind, wanted, found = "sha256", claim.sha256, self._digest(path, "sha256", size)
        else:
            kind, wanted, found = "sampled sha256", claim.sha256, hash_file(path).sha256
        if found != wanted:
            state.add("changed", by.name, f"{kind} {found}, wanted {wanted}")
        elif kind == "sampled sha256":
            state.add("sampled", by.name, _SAMPLED)
        else:
            state.add("ok", by.name)

    def _digest(self, path: Path, algorithm: str, size: int) -> str:
        key = (self._real.of(path), algorithm)
        if key not in self._digests:
            self._digests[key] = file_digest(path, algorithm)
            self.progress(size)
        return self._digests[key]

    def _compare_identity(self, description: Description, by: Path) -> None:
        """Compare the common identity of graph and data in the manifest of an earlier version's merge."""
        if not description.identity:
            return
        paths = [by.parent / claim.place for claim in description.claims]
        inside = not any(place_problem(by, claim.place, self._real.of) for claim in description.claims)
        if not inside or not all(map(is_file, paths)):
            return
        self.compared += 1
        found = identity_of(map(hash_file, paths))
        if found != description.identity:
            detail = f"identity {found}, wanted {description.identity}"
            for path in paths:
                self._state(path).add("changed", by.name, f"all files of {by.name} together: {detail}")
