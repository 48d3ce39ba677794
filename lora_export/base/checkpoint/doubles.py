"""Refuse checkpoints that store a parameter twice, under two names that transformers loads into one.

transformers loads ``layers.0.…`` and ``model.layers.0.…`` into the same parameter, and only one of the two
counts. A merge that changed the other one would have no effect. Two names of tied parameters (a head and its
embedding) are two parameters.

Asking transformers imports torch, so it is asked only if two names look like it: one is the end of the other
(`may_be_doubles`; without transformers, these are refused), or they are layers alike (`has_layers_alike`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.errors import CheckpointError, install_line
from lora_export.storage.safetensors import DTYPES

if TYPE_CHECKING:
    from lora_export.base.checkpoint.names import StoredPart

# Ends of names of an older transformers, and today's.
_OLDER = ((".gamma", ".weight"), (".beta", ".bias"))
_SHOWN = 10
# Components that may stand before a name; a stranger's name may have millions.
_LARGEST_PREFIX = 8
_NUMBER = re.compile(r"(?<=\.)[0-9]+\.")


class StoredTwiceError(CheckpointError):
    """A checkpoint stores a parameter under two names, or may do so."""


def may_be_doubles(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return two names of one shape that may be one parameter's: an end of the other's, or an older name."""
    tensors = checkpoint.tensors
    for name, tensor in tensors.items():
        for other in _other_names(name):
            if other in tensors and tensors[other].shape == tensor.shape:
                return other, name
    return None


def has_layers_alike(checkpoint: Checkpoint) -> bool:
    """Return True if two tensors of one shape have the same name from the layer's number on.

    Most are layers of an encoder and a decoder; some are one layer under two names of its model
    (``language_model.model.layers.0.…``, ``model.language_model.layers.0.…``).
    """
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for name, tensor in checkpoint.tensors.items():
        if (start := _NUMBER.search(name)) is None:
            continue
        layer = name[start.start() :], tensor.shape
        if layer in seen:
            return True
        seen.add(layer)
    return False


def _other_names(name: str) -> Iterator[str]:
    """Yield the other names that a stored tensor's parameter may have."""
    yield from (f"{name.removesuffix(old)}{new}" for old, new in _OLDER if name.endswith(old))
    _, _, rest = name.partition(".")
    # A bare ``weight`` is no module's.
    for _ in range(_LARGEST_PREFIX):
        if "." not in rest:
            return
        yield rest
        _, _, rest = rest.partition(".")


def refuse_doubles(
    checkpoint: Checkpoint,
    table: Mapping[str, Sequence[StoredPart]],
    known: Collection[str],
    is_changed: bool,
) -> None:
    """Raise `StoredTwiceError` if two tensors are loaded into one parameter.

    Args:
        checkpoint: The base.
        table: Parameter → tensors that transformers loads into it, see `names.loaded_parts`.
        known: Parameters and buffers of the model: others are not loaded.
        is_changed: True if its tensors are changed one by one; if it is only read, equal values do no harm.
    """
    found = []
    for parameter, parts in table.items():
        pieces: dict[object, list[str]] = defaultdict(list)
        for part in parts if parameter in known else ():
            # Experts and halves that are joined are not doubles.
            pieces[part.expert, part.piece].append(part.tensor)
        several = [tensors for tensors in pieces.values() if len(tensors) > 1]
        doubles = [
            _with_files(checkpoint, tensors)
            for tensors in several
            if is_changed or not _are_equal(checkpoint, tensors)
        ]
        found += [f"{names} are both loaded as {parameter}" for names in doubles]
    if found:
        more = [f"… ({len(found)} in all)"] * (len(found) > _SHOWN)
        raise StoredTwiceError(
            f"the checkpoint {checkpoint.folder} stores parameters twice, under two names that transformers "
            "loads into one: which of them counts is not certain",
            "load it with transformers' from_pretrained, check that it is the model that you want, and save "
            "it with save_pretrained; or remove one of the two tensors of each",
            [*found[:_SHOWN], *more],
        )


def refuse_unasked(checkpoint: Checkpoint, one: str, other: str) -> None:
    """Raise `StoredTwiceError` because transformers is missing, so that it can't be asked about two names."""
    names = _with_files(checkpoint, [one, other])
    raise StoredTwiceError(
        f"the checkpoint {checkpoint.folder} may store parameters twice, and transformers, which would know, "
        "is not installed",
        install_line("hf"),
        [f"{names} may be one parameter"],
    )


def _are_equal(checkpoint: Checkpoint, tensors: Sequence[str]) -> bool:
    """Return True if tensors hold the same bytes, as far as they can be read."""
    first, *others = tensors
    stored = [checkpoint.tensors[name] for name in tensors]
    if any(
        (one.code, one.shape) != (stored[0].code, stored[0].shape) or one.code not in DTYPES for one in stored
    ):
        return False
    held = checkpoint.read(first).reshape(-1).view(np.uint8)
    return all(np.array_equal(held, checkpoint.read(name).reshape(-1).view(np.uint8)) for name in others)


def _with_files(checkpoint: Checkpoint, tensors: Sequence[str]) -> str:
    return " and ".join(f"'{name}' ({checkpoint.tensors[name].file.name})" for name in sorted(tensors))
