"""Tell which process a temporary name belongs to, and whether that process has ended.

A number alone does not say it: numbers are used again, and folders are shared by machines and containers.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Groups of an owner within a name.
PATTERN = r"(?P<host>[0-9a-f]{6})-(?P<pid>[0-9]{1,10})-(?P<start>[0-9a-f]{6})"
_ENDED, _UNKNOWN = "ended", "unknown"
_PROC = Path("/proc")
# Fields of /proc/PID/stat behind the command's name, proc(5): state is the 3rd of all, starttime the 22nd.
_STATE, _START_TIME = 0, 19
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# PROC_PID_INIT_INO of linux/proc_ns.h: the namespace that is no container's.
_MACHINES_OWN = f"pid:[{0xEFFFFFFC}]"


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: Hash of the machine and the container.
        pid: Its number there.
        start: Hash of the time at which it began.
    """

    host: str
    pid: int
    start: str

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.start}"

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine, in this container."""
        return self.host == _host()

    @property
    def has_ended(self) -> bool:
        """Whether it certainly runs no more; False for other machines, of which nothing is known."""
        return self.is_here and _start_of(self.pid) not in (self.start, _UNKNOWN)


def this_process() -> Owner:
    """Return the owner of what this process writes."""
    start = _start_of(os.getpid())
    return Owner(_host(), os.getpid(), _hash(start) if start == _UNKNOWN else start)


@cache
def _host() -> str:
    """Return a hash that stays over a restart of the machine, and differs between containers.

    Numbers of processes mean something within one namespace only. Containers of two machines may have one
    name and one image: theirs holds what is new with each start of the machine.
    """
    namespace = _namespace()
    parts = [os.uname().nodename, _read(Path("/etc/machine-id")), namespace]
    if namespace != _MACHINES_OWN:
        parts.append(_read(_BOOT))
    return _hash("\0".join(parts))


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the target is no path
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """Return a hash of when a process began, `_ENDED`, or `_UNKNOWN` if it runs and does not tell."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        state, start = fields.split()[_STATE], fields.split()[_START_TIME]
    except (OSError, IndexError):
        return _by_signal(pid)
    # Its files are closed where only its exit code is left to be asked for.
    return _ENDED if state in "ZX" else _hash(_read(_BOOT) + start)


def _by_signal(pid: int) -> str:
    """Ask the kernel where there is no /proc, or where it hides other users' processes."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return _ENDED
    except (OSError, OverflowError):
        return _UNKNOWN
    return _UNKNOWN


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
