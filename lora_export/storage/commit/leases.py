"""Hold the leases of a set: its own, in the folder that was written into first, and those pointing to it."""

from __future__ import annotations

from pathlib import Path

from lora_export.storage.commit.lease import Lease, new_identity, staged_as
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import Mark, Staged


class Leases:
    """The leases in all folders of a set, which show that its process runs, and record the set's entries."""

    def __init__(self) -> None:
        self._all: list[Lease] = []

    @property
    def first(self) -> Lease:
        """The set's own lease."""
        return self._all[0]

    @property
    def mark(self) -> Mark:
        """The step that decides for all folders."""
        return self.first.mark

    def staged(self, target: Path) -> Staged:
        """Return the names of a file to be written, and make sure that its folder has a lease.

        Raises:
            OSError: A lease can't be made there.
        """
        identity = self.first.identity if self._all else new_identity()
        if not any(lease.folder.samefile(target.parent) for lease in self._all):
            self._add(Lease(target.parent, identity))
        return staged_as(target, identity)

    def _add(self, lease: Lease) -> None:
        if self._all:
            self.first.covers(lease.folder)
        # Listed before it is made, so that it is removed whenever an interrupt comes.
        self._all.append(lease)
        try:
            lease.hold()
            if lease is not self.first:
                lease.points_to(self.first.folder)
        except OSError:
            with Uninterrupted() as calm:
                lease.release(calm, remove=True)
                self._all.remove(lease)
            raise

    def release(self, calm: Uninterrupted, remove: bool) -> None:
        """Release all leases, the set's own last; if they are not removed, another process can go on."""
        for lease in reversed(self._all):
            lease.release(calm, remove)
        self._all.clear()
