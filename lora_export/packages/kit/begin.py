"""Name and lock the temporary files of one run of a kit as lora-export does, and remove those of ended runs.

Usage: python3 begin.py OUT             removes what ended runs have left in OUT, and prints a new identity
       python3 begin.py put-back OWN    puts back what finish.py was replacing from OWN when it was killed
       python3 begin.py OUT LEASE FILE  locks the open FILE (its number), which is at LEASE
The shell keeps FILE open as long as it runs, and so does what it calls: the kernel tells by the lock whether
all of them have ended. lora-export finds and removes what they left by the same names and lock.
Needs nothing but Python's standard library, 3.8 or newer.
"""

from __future__ import annotations

# Built in, while "signal" imports a dozen files.
import _signal  # type: ignore[import-not-found]

# Ctrl-C ends this without a traceback, also while the rest is imported.
if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Optional

BOOT = Path("/proc/sys/kernel/random/boot_id")
IDENTITY = r"[0-9a-f]{6}-[0-9]{1,10}-[0-9a-f]{12}"
# A run makes its lease's folder at once: after so long without one, it has ended.
YOUNG_S = 60.0


def kernel() -> str:
    """Return a hash that is unique to a start of a machine: the locks of another start tell nothing."""
    try:
        return hashlib.sha256(BOOT.read_bytes().strip()).hexdigest()[:6]
    except OSError:  # hidden from this process
        return "0" * 6


def take(handle: int, lease: Path) -> Optional[bool]:  # noqa: UP045
    """Lock an open file; return False if another process holds or has removed it, None without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return None
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(str(lease)))
    except OSError:
        return False


def remove_left(out: Path) -> None:
    """Remove the folders that ended runs have left, with their leases."""
    for lease in out.glob(f".lora-export-{kernel()}-*.lease"):
        own = lease.with_suffix("")
        identity = re.fullmatch(rf"\.lora-export-({IDENTITY})", own.name)
        # Of a set of lora-export's own files, only lora-export knows what is to be done.
        if identity and all(path in (lease, own) for path in out.glob(f"*{identity.group(1)}*")):
            with contextlib.suppress(OSError):
                remove(lease, own)


def remove(lease: Path, own: Path) -> None:
    """Remove a folder and its lease if this user's run that held it has ended."""
    alone = not os.path.lexists(str(own))
    if not alone and (not own.is_dir() or own.is_symlink()):
        return
    if alone and time.time() - os.lstat(str(lease)).st_mtime < YOUNG_S:
        return  # it is just being locked
    handle = os.open(str(lease), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(handle)
        if found.st_uid != os.geteuid() or found.st_size or not take(handle, lease):
            return
        if not alone:
            put_back(own)
            shutil.rmtree(str(own))
        lease.unlink()
        if not alone:
            print(f"removed {own}, which an ended run had left", file=sys.stderr)
    finally:
        os.close(handle)


def put_back(own: Path) -> None:
    """Give an old engine its names again if the run of this folder ended while the new files got theirs.

    finish.py moves the old record away first and the new one in last. So as long as the new one is still in
    this folder, and no other run's stands beside the engine, the old files belong together there.

    Raises:
        OSError: A file can't be renamed, or another run gives names just now.
    """
    # The record last here, too.
    old = sorted(own.glob("*.old"), key=lambda path: path.name.endswith(".json.old"))
    if not old or not os.path.lexists(str(own / "record.json")):
        return
    targets = [own.parent / path.name[: -len(".old")] for path in old]
    lock = own.parent / ".lora-export.lock"
    with lock.open("ab") as held:
        if take(held.fileno(), lock) is False:
            raise BlockingIOError
        try:
            if any(os.path.lexists(str(target.with_suffix(".json"))) for target in targets):
                return
            for path in old:
                path.replace(own.parent / path.name[: -len(".old")])
            print(f"put back {targets[0]}: an ended run had not replaced it whole", file=sys.stderr)
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


if __name__ == "__main__":
    if sys.argv[1] == "put-back":
        try:
            put_back(Path(sys.argv[2]))
        except OSError as failure:
            sys.exit(f"Error: cannot put back the old engine: {failure}")
    elif len(sys.argv) == 2:
        remove_left(Path(sys.argv[1]))
        try:
            print(f"{kernel()}-{os.getpid()}-{secrets.token_hex(6)}", flush=True)
        except BrokenPipeError:  # the shell has been ended
            os._exit(1)
    elif take(int(sys.argv[3]), Path(sys.argv[2])) is False:
        sys.exit(f"Error: another run has removed {sys.argv[2]}: run it again")
