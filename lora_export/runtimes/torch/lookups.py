"""Record which rows of a model's embeddings its runs read.

A table of positions is read up to the input's length, whatever its values: an error in the other rows shows
in no output. So the lookups themselves are recorded: `torch.nn.functional.embedding`, and rows that are cut
out of the table. A read of the whole table, as by a tied head, does not count as a lookup.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_export.adapter import Array
from lora_export.runtimes.torch.find_parameters import OwnedTensor

# Function that takes a table's path and the row numbers that were read, in the shape of the lookup.
Seen = Callable[[str, Array], None]


@contextlib.contextmanager
def record_lookups(tables: Mapping[str, OwnedTensor], seen: Seen) -> Iterator[None]:
    """Call ``seen`` with every lookup inside.

    Args:
        tables: Path of an embedding → owner of its table, which may be replaced for a run.
        seen: Function that takes the path and the numbers of the rows.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def note(table: Any, index: Any) -> None:
        path = next((path for path, owner in tables.items() if owner.get() is table), None)
        if path is not None:
            rows = torch.arange(len(table))
            seen(path, rows[index.cpu() if isinstance(index, torch.Tensor) else index].numpy())

    class Recording(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for it
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            if func is torch.nn.functional.embedding:
                named = dict(zip(("input", "weight"), args, strict=False)) | given
                note(named["weight"], named["input"])
            elif func is torch.Tensor.__getitem__:
                note(args[0], args[1][0] if isinstance(args[1], tuple) and args[1] else args[1])
            return func(*args, **given)

    with Recording():
        yield
