"""Read single rows of an embedding that an adapter replaces: PEFT's ``trainable_token_indices``.

Source: PEFT 0.21, ``tuners/trainable_tokens/layer.py`` (the "delta" holds the new rows themselves) and
``utils/other.py`` (a list of indices is the input embedding's; an object has one list for each module name).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_export.adapter import Adapter, Array, TokenRows
from lora_export.formats.reading.tensors import value_problems
from lora_export.untrusted.shown import shown

KEY = "trainable_token_indices"
TENSOR = "token_adapter.trainable_tokens_delta"
_ROWS = re.compile(rf"^(?P<path>.+)\.{re.escape(TENSOR)}(\.default)?$")


def is_rows(path: str) -> bool:
    """Return whether a path, without PEFT's prefix, is that of a tensor of single rows."""
    return _ROWS.match(path) is not None


def read_rows(
    tensors: Mapping[str, tuple[str, Array]], config: Mapping[str, Any], problems: list[str]
) -> dict[str, TokenRows]:
    """Return the rows by the embedding's parameter path.

    Args:
        tensors: Path without PEFT's prefix → the tensor's name and values.
        config: The adapter's config.
        problems: List to add a line to for each tensor that can't be used.
    """
    given = config.get(KEY)
    if given and not tensors:
        problems.append(f"config {KEY}: the file has no token_adapter.trainable_tokens_delta")
    found: dict[str, TokenRows] = {}
    shared, said = _shared(given), shown(repr(given))
    for path, (name, values) in tensors.items():
        match = _ROWS.match(path)
        assert match is not None
        indices = _indices(given, match["path"], shared)
        if indices is None or len(set(indices)) != len(indices):
            problems.append(f"{name}: the config's {KEY} {said} doesn't state the indices of these rows")
        elif values.ndim != 2 or len(values) != len(indices):
            problems.append(f"{name}: shape {values.shape}, but the config lists {len(indices)} rows")
        else:
            problems += value_problems([(name, values)])
            found[f"{match['path']}.weight"] = TokenRows(indices, values, name)
    return found


def stated_rows(adapter: Adapter) -> Any:
    """Return a value of `KEY` with the indices of an adapter's rows: its own, if it states all of them."""
    rows = {name.rpartition(".")[0]: one.indices for name, one in adapter.token_rows.items()}
    given = adapter.config.get(KEY)
    is_whole = not isinstance(given, Mapping) or len(given) == len(rows)
    if is_whole and all(_indices(given, path, _shared(given)) == indices for path, indices in rows.items()):
        return given
    return {path: list(indices) for path, indices in rows.items()}


def _shared(given: Any) -> list[Any]:
    """Return the value of all keys as a list, if they have the same one; else nothing.

    PEFT also writes the rows of tied modules, but the config has only the embedding's list.
    """
    values = list(given.values()) if isinstance(given, Mapping) else []
    return values[:1] if all(value == values[0] for value in values) else []


def _indices(given: Any, path: str, shared: list[Any]) -> tuple[int, ...] | None:
    if isinstance(given, Mapping):
        fitting = [value for key, value in given.items() if f".{path}".endswith(f".{key}")]
        fitting = fitting or shared
        given = fitting[0] if len(fitting) == 1 else None
    if not isinstance(given, list):
        return None
    sound = all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in given)
    return tuple(given) if sound else None
