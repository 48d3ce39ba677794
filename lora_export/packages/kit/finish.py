"""Complete an engine record with facts that only the building machine knows, and give all files their names.

Usage: python3 finish.py record.json BUILT LOG ENGINE [--force]
       python3 finish.py record.json ENGINE  fails if another graph's engine would be replaced
       python3 finish.py LOG                 prints the end of a log as text
BUILT and LOG lie in a separate folder on the same disk as ENGINE. The log and the record go beside ENGINE.
Needs nothing but Python's standard library, 3.8 or newer.
"""

from __future__ import annotations

# Built in, while "signal" imports a dozen files.
import _signal  # type: ignore[import-not-found]

# Ctrl-C ends this without a traceback while the rest is imported.
if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Sequence  # noqa: UP035

# What ends a run from outside, if it may.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The end of a log that is printed: bytes, lines, and letters of a line.
END_BYTES, END_LINES, LINE = 1 << 16, 20, 2000
# A record has fewer bytes. What reading something else may raise.
MOST = 1 << 26
NOT_A_RECORD = (OSError, ValueError, LookupError, TypeError, RecursionError)
# What trtexec's statements begin with: ``[12/01/2026-10:00:00] [I] [TRT] ``.
BEGINS = r"(?m:^)(?:\[[\w/:. -]{1,40}\] ?){0,4}"


def print_end(log: Path) -> None:
    """Print the last lines of a log, which quotes the names in a graph, as text.

    lora-export shows names in the same way: no escape sequence, and no command to a CI service, reaches a
    terminal. Lines are set in, so that none of them begins as a line of ours does.
    """
    with log.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - END_BYTES, 0))
        text = file.read().decode("utf-8", "replace")
    for line in text.rstrip("\n").split("\n")[-END_LINES:]:
        kept = "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
            for letter in line.rstrip("\r")[:LINE]
        )
        kept = re.sub(r"^(\s*):(?=:)", r"\1\\x3a", kept)
        print("  " + re.sub(r"#(?=#(?:\w+)?\[)", r"\\x23", kept))


def statements(log: bytes, record: dict[str, Any]) -> str:
    """Return a log as text in which no name of an input or output begins a line.

    trtexec prints its command line, in which the names are: only what begins a line is its own statement.
    """
    text = log.decode("utf-8", "replace")
    ports = {port["name"] for kind in ("inputs", "outputs") for port in record.get(kind, ())}
    names = ports.union(*(profile["shapes"] for profile in record.get("profiles", ())))
    for name in sorted((name for name in names if "\n" in name), key=len, reverse=True):
        text = text.replace(name, name.replace("\n", " "))
    return text


def version_in(log: str) -> str:
    """Return trtexec's version as its log states it: ``10.13.0``."""
    # The first line of all, before the command line in it.
    packed = r"&&&& RUNNING TensorRT\S{0,40} \[TensorRT(?:-RTX)? v([0-9]{1,4})([0-9]{2})([0-9]{2})\]"
    first = re.match(packed, log)
    stated = re.search(rf"{BEGINS}TensorRT(?:-RTX)? version: ([0-9]{{1,6}}(?:\.[0-9]{{1,6}}){{1,4}})\b", log)
    if stated is not None and (first is None or same_version(stated.group(1), first.groups())):
        return stated.group(1)
    if first is not None:
        return ".".join(str(int(part)) for part in first.groups())
    sys.exit("Error: the log does not say which version of TensorRT built the engine")


def same_version(stated: str, packed: Sequence[str]) -> bool:
    """Return whether a version begins with the parts of a packed one."""
    return [int(part) for part in stated.split(".")][:3] == [int(part) for part in packed]


def memory_in(log: str, label: str) -> int | None:
    """Return a size in bytes that the builder stated last, at the end of its work; None if it stated none."""
    found = re.findall(rf"{BEGINS}Total {label} Memory: ([0-9]{{1,18}}) bytes", log)
    return int(found[-1]) if found else None


def refusal(source: dict[str, Any], engine: Path) -> str:
    """Return why an engine's files may not be replaced; "" if there are none, or the graph is the same."""
    record = engine.with_suffix(".json")
    if not any(os.path.lexists(str(path)) for path in (engine, record)):
        return ""
    with contextlib.suppress(*NOT_A_RECORD):
        # Opening a pipe could wait for ever.
        if record.is_file():
            with record.open("rb") as file:
                there = json.loads(file.read(MOST))
            if there["source"]["sha256"] == source["sha256"]:
                return ""
    return (
        f"Error: {engine} exists already, and its record does not say that it was built from this graph "
        "(nothing was replaced)\n"
        "hint: give another folder, or replace it with: sh build.sh --force FOLDER"
    )


def sealed(record: dict[str, object]) -> bytes:
    """Return a record as JSON that begins with its own SHA-256, computed with zeros in place of the hash."""
    record.pop("seal", None)
    rest = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)[1:] + "\n"
    start, end = '{\n "seal": "lora-export:sha256-of-this-file:', '",' + rest
    digest = hashlib.sha256((start + "0" * 64 + end).encode()).hexdigest()
    return (start + digest + end).encode()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_names(files: dict[Path, Path], refuses: Callable[[], str]) -> None:
    """Give files their names, the record last, while no other run does so in that folder.

    The old record is put aside first: a run that is stopped in between leaves an engine without a record,
    never an engine with another engine's record. After an error the old files are put back; if the run is
    killed, by whoever finds its folder next (put_back of begin.py, or lora-export).

    Args:
        files: Final path → present path; the record last.
        refuses: Function that returns why what is there may not be replaced, or "".
    """
    for made in files.values():
        sync(made)
    record = list(files)[-1]
    # lora-export locks the same file.
    lock = record.parent / ".lora-export.lock"
    while True:
        with lock.open("ab") as held:
            with contextlib.suppress(OSError):  # this file system has no locks
                fcntl.flock(held, fcntl.LOCK_EX)
            try:
                current = lock.stat().st_ino == os.fstat(held.fileno()).st_ino
            except FileNotFoundError:  # the run that held the lock removed it
                current = False
            if not current:
                continue
            # From here on all files get their names, or after an error none: signals wait until then.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                replace_all(files, refuses)
            finally:
                with contextlib.suppress(OSError):
                    lock.unlink()
                came = [number for number in SIGNALS if signal.sigtimedwait([number], 0)]
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if came:
                print(f"interrupted after the build: {record} is complete and in place", file=sys.stderr)
            return


def replace_all(files: dict[Path, Path], refuses: Callable[[], str]) -> None:
    """Give files their names; after an error, put the old ones back and end with one line."""
    old = {target: made.with_name(target.name + ".old") for target, made in files.items()}
    record, given = list(files)[-1], []
    try:
        for target in files:
            if target.is_dir() and not target.is_symlink():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
            if target.exists() and not target.is_file() and not target.is_dir():
                raise OSError(errno.EINVAL, "it is not a regular file", str(target))
        if reason := refuses():
            sys.exit(reason)
        if os.path.lexists(str(record)):
            record.rename(old[record])
            sync(record.parent)
        for target, made in files.items():
            if target == made:
                continue
            if target != record and os.path.lexists(str(target)):
                keep(target, old[target])
            made.replace(target)
            given.append(target)
    except OSError as error:
        for target in files:
            # What was built may be worth an hour: it is kept, if not by this name.
            if target in given:
                target.rename(files[target])
            if os.path.lexists(str(old[target])):
                old[target].rename(target)
        sys.exit(f"Error: cannot write {target_of(error, record)} (nothing was replaced)")
    sync(record.parent)
    for path in old.values():
        with contextlib.suppress(OSError):
            path.unlink()


def keep(target: Path, old: Path) -> None:
    """Give a file a second name, or another one where the file system has no second names."""
    try:
        os.link(str(target), str(old), follow_symlinks=False)
    except OSError:
        target.rename(old)


def target_of(error: OSError, record: Path) -> str:
    """Return the file that an error is about, and the system's message."""
    return f"{error.filename2 or error.filename or record}: {error.strerror}"


def check(template: str, engine: str) -> None:
    """End with an error if another graph's engine would be replaced."""
    if reason := refusal(json.loads(Path(template).read_text(encoding="utf-8"))["source"], Path(engine)):
        sys.exit(reason)


def main(template: str, built: str, log: str, engine: str, force: str = "") -> None:
    """Give the engine that was built and its log their names, and write its record beside them.

    Args:
        template: The kit's record.
        built: The engine, as it was built.
        log: The builder's messages.
        engine: The engine's own name.
        force: ``--force``: replace another graph's engine.
    """
    record, path = json.loads(Path(template).read_text(encoding="utf-8")), Path(engine)
    digest = hashlib.sha256()
    with Path(built).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    log_text, log_path = statements(Path(log).read_bytes(), record), path.with_suffix(".log")
    record["name"] = path.name
    record["sha256"] = digest.hexdigest()
    record["size_bytes"] = Path(built).stat().st_size
    record["files"] = {
        path.name: {"name": path.name, "size_bytes": record["size_bytes"], "sha256": record["sha256"]},
        log_path.name: {
            "name": log_path.name,
            "size_bytes": Path(log).stat().st_size,
            "sha256": hashlib.sha256(Path(log).read_bytes()).hexdigest(),
        },
    }
    record["builder_version"] = version_in(log_text)
    record["platform"] = f"{platform.system().lower()}-{platform.machine().lower()}"
    for name, label in (("weights", "Weights"), ("activations", "Activation")):
        size = memory_in(log_text, label)
        if size is not None:
            record["memory"][name] = size
    written = Path(built).with_name("record.json")
    written.write_bytes(sealed(record))
    files = {path: Path(built), log_path: Path(log), path.with_suffix(".json"): written}
    give_names(files, lambda: "" if force else refusal(record["source"], path))


if __name__ == "__main__":
    for number in SIGNALS:
        # nohup ignores SIGHUP and a shell's background SIGINT, and so it stays.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        if len(sys.argv) == 2:
            print_end(Path(sys.argv[1]))
        elif len(sys.argv) == 3:
            check(*sys.argv[1:])
        else:
            main(*sys.argv[1:])
    except OSError as failure:
        sys.exit(f"Error: {failure}")
    except KeyboardInterrupt:
        print("Aborted: nothing was replaced.", file=sys.stderr)
        sys.exit(130)
