"""Put back the engine that a run of a build kit was replacing when it was killed.

The rule is that of ``put_back`` in the kit's own ``begin.py``, which runs where lora-export is not installed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lora_export.storage.commit.settling import names
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import reason_of
from lora_export.storage.commit.told import tell
from lora_export.untrusted.places import is_link, is_there, listed

_OLD = ".old"


def put_back_engine(own: Path, calm: Uninterrupted) -> bool:
    """Give an old engine, its log and its record their names again; the lock of their folder is held.

    The kit moves the old record away first and the new one in last. So as long as the new one is still in the
    run's folder, and no other run's stands beside the engine, the old files belong together there.

    Args:
        own: Folder of the ended run; any other folder or file is left as it is.
        calm: The uninterrupted block.

    Returns:
        Whether nothing in the folder is needed any more.
    """
    if is_link(own) or not is_there(own / "record.json"):
        return True
    # The record last here, too.
    old = sorted(listed(own, f"*{_OLD}"), key=lambda path: path.name.endswith(f".json{_OLD}"))
    targets = [own.parent / path.name.removesuffix(_OLD) for path in old]
    if not old or any(is_there(target.with_suffix(".json")) for target in targets):
        return True
    for path, target in zip(old, targets, strict=True):
        try:
            calm.insist(partial(_replace, path, target))
        except OSError as error:
            tell(f"could not rename files that an ended run had left in {own}: {reason_of(error)}")
            return False
    tell(f"put back {names(targets)} in {own.parent}: the run of a kit had ended between two renames")
    return True


def _replace(path: Path, target: Path) -> None:
    if is_there(path):  # else it is the second try
        path.replace(target)
