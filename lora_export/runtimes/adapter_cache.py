"""Keep adapters on the device: the least recently used is evicted, and loaded again when a run asks for it.

The cache's lock is held for bookkeeping alone, never while an adapter is read, copied or run.
"""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lora_export.errors import AdapterError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Prepared(Generic[T]):
    """An adapter that is ready to go to the device.

    Attributes:
        nbytes: Bytes that it takes on the device.
        place: Function that puts it on the device.
    """

    nbytes: int
    place: Callable[[], T]


@dataclass(kw_only=True, eq=False)
class _Entry(Generic[T]):
    """One name: how to load its adapter, and the value while that is on the device. Compared by identity."""

    name: str
    load: Callable[[], Prepared[T]]
    value: T | None = None
    nbytes: int = 0
    users: int = 0
    loading: threading.Lock = field(default_factory=threading.Lock)


class AdapterCache(Generic[T]):
    """Adapters by name, with limits on their number and bytes on the device.

    An adapter that a run is using is not evicted: while every adapter is in use the limits are exceeded, and
    they hold again as soon as one is free. Bytes of adapters that were unloaded or replaced while a run still
    uses them are not counted.

    Attributes:
        max_items: Largest number of adapters on the device.
        max_bytes: Largest number of their bytes, or None.
    """

    def __init__(self, max_items: int, max_bytes: int | None = None) -> None:
        self.max_items = max_items
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry[T]] = {}
        self._on_device: OrderedDict[_Entry[T], None] = OrderedDict()  # least recently used first
        self._arriving = 0
        self._bytes = 0

    def names(self) -> list[str]:
        """Return all names in the order of loading, evicted ones included."""
        with self._lock:
            return list(self._entries)

    def on_device(self) -> list[str]:
        """Return the names of the adapters on the device, the least recently used first."""
        with self._lock:
            return [entry.name for entry in self._on_device]

    def bytes_on_device(self) -> int:
        """Return the bytes that the adapters take on the device."""
        with self._lock:
            return self._bytes

    def check_free(self, name: str) -> None:
        """Refuse a name that is taken.

        Raises:
            AdapterError: The name is taken.
        """
        with self._lock:
            self._check_free(name)

    def add(
        self, name: str, prepared: Prepared[T], load: Callable[[], Prepared[T]], *, replace: bool = False
    ) -> None:
        """Put an adapter on the device under a name; a run that uses the one it replaces is not disturbed.

        Args:
            name: The adapter's name in runs.
            prepared: The adapter.
            load: Function that prepares it again after it was evicted.
            replace: Replace an adapter of this name.

        Raises:
            AdapterError: The name is taken, or the adapter alone is larger than the budget.
        """
        entry = _Entry(name=name, load=load)
        self._admit(entry, prepared)
        with self._lock:
            old = self._entries.get(name)
            if old is not None and not replace:
                self._forget(entry)
                self._check_free(name)
            if old is not None:
                self._forget(old)
            self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget an adapter; a run that uses it finishes with it.

        Raises:
            AdapterError: No adapter has this name.
        """
        with self._lock:
            self._forget(self._known(name))
            del self._entries[name]

    @contextmanager
    def use(self, name: str) -> Iterator[T]:
        """Give an adapter to a run and keep it on the device during the run; load it again if it was evicted.

        Raises:
            AdapterError: No adapter has this name, or it can't be loaded again.
        """
        with self._lock:
            entry = self._known(name)
            entry.users += 1
            value = entry.value
            if value is not None and entry in self._on_device:
                self._on_device.move_to_end(entry)
        try:
            yield self._load_again(entry) if value is None else value
        finally:
            with self._lock:
                entry.users -= 1
                self._shrink(0, 0)

    def _load_again(self, entry: _Entry[T]) -> T:
        with entry.loading:  # if several runs ask for it, one of them loads it
            if entry.value is None:
                self._admit(entry, entry.load())
                with self._lock:
                    if self._entries.get(entry.name) is not entry:  # unloaded or replaced meanwhile
                        self._forget(entry)
            assert entry.value is not None
            return entry.value

    def _admit(self, entry: _Entry[T], prepared: Prepared[T]) -> None:
        """Make room, then put an adapter on the device, so that loading never exceeds the budget."""
        if self.max_bytes is not None and prepared.nbytes > self.max_bytes:
            raise AdapterError(
                f"adapter '{entry.name}' takes {prepared.nbytes} bytes on the device, "
                f"the budget for all adapters is {self.max_bytes}",
                "give the session a larger max_bytes",
            )
        with self._lock:
            self._shrink(1, prepared.nbytes)
            self._arriving += 1
            self._bytes += prepared.nbytes
        try:
            value = prepared.place()
        except BaseException:
            with self._lock:
                self._arriving -= 1
                self._bytes -= prepared.nbytes
            raise
        with self._lock:
            self._arriving -= 1
            entry.value, entry.nbytes = value, prepared.nbytes
            self._on_device[entry] = None

    def _shrink(self, items: int, nbytes: int) -> None:
        """Evict unused adapters, the least recently used first, until there is room for so much more."""
        for entry in list(self._on_device) if self._over(items, nbytes) else ():
            if entry.users == 0:
                self._forget(entry)
                entry.value = None
                if not self._over(items, nbytes):
                    return

    def _over(self, items: int, nbytes: int) -> bool:
        count = len(self._on_device) + self._arriving + items
        return count > self.max_items or (
            self.max_bytes is not None and self._bytes + nbytes > self.max_bytes
        )

    def _forget(self, entry: _Entry[T]) -> None:
        """Stop counting an entry; a run that uses it still holds its value."""
        if entry in self._on_device:
            del self._on_device[entry]
            self._bytes -= entry.nbytes

    def _known(self, name: str) -> _Entry[T]:
        # A wrong name may be unhashable.
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise unknown_adapter(name, list(self._entries))
        return entry

    def _check_free(self, name: str) -> None:
        if name in self._entries:
            raise AdapterError(
                f"there is an adapter '{name}' already", "give replace=True, or unload_adapter it first"
            )


def unknown_adapter(name: object, known: list[str]) -> AdapterError:
    """Return the error for a name that no adapter has."""
    hint = "load it with load_adapter" if isinstance(name, str) else "an adapter's name is a text"
    hint += f", or use one of: {', '.join(known)}" if known else ""
    return AdapterError(f"no adapter is called {name!r}", did_you_mean([name], known) + hint)


def did_you_mean(names: Iterable[object], known: Iterable[str]) -> str:
    """Return the beginning of a hint that names the nearest known names, or an empty text."""
    listed = list(known)
    near = [close for name in names for close in difflib.get_close_matches(str(name), listed, 1)]
    return f"did you mean {', '.join(dict.fromkeys(map(repr, near)))}? " if near else ""
